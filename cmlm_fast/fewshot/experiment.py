"""The user-facing description of an experiment; `grid` does the work.

    for each draw, for each method:   post-train on all train texts, without their labels   (once for all shots)
        for each number of shots k:   fine-tune on k labels per class, score the whole test set -> one line of cells.jsonl
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..machine import check_backend_here
from ..options import check_warmup, expect
from ..ranks import world_size
from .cells import Cell
from .grid import Grid
from .methods import find_method


@dataclass(frozen=True)
class FewShotExperiment:
    """Few-shot evaluation of post-training methods on one data set.

    Attributes:
        model: folder or hub id of the checkpoint every method starts from, with an LM head (see `cmlm-fast warm-head`).
        train: labelled texts, as `data.load_labelled` reads them; post-training uses all of them, without their labels.
        output_dir: gets cells.jsonl, results.md, results.csv and results.png; may hold other data sets' cells, which stay.
        test: texts to score, with the same columns as train.
        validation: instead of test: hold out this many texts of train, stratified by class, and score them.
        name: name of the data set in the tables; default: the train file's name, or its folder's if that is "train".
        label_column, text_column, text_pair_column, paraphrase_column: as for `data.load_labelled`.
        methods: names from `METHODS`, or "name:field=value" to change fields of the objective.
        shots: labelled texts per class.
        draws: how often to draw the labelled texts and repeat everything with other random numbers.
        epochs, max_steps, batch_size, learning_rate, warmup: for post-training, as in `PostTrainOptions`.
        fine_tune_epochs, fine_tune_batch_size, fine_tune_learning_rate: for fine-tuning.
        max_length: maximum tokens per sequence; None: 128, or the model's maximum if that is less.
        bf16: None: if this machine multiplies bfloat16 in hardware.
        seed: draw d takes its random numbers from seed + d.
        baseline: the method that the others are compared with, draw by draw.
        cache_dir: where checkpoints are kept between cells; default: output_dir/models.
        keep_models: keep the post-trained checkpoints there; otherwise each is removed once its cells are done.
        backend: which kernels run; see `cmlm_fast.use_backend`. None: the current choice, for example CMLM_FAST_BACKEND.

    Example:
        >>> cells = FewShotExperiment("bert-base-uncased", "train.tsv", "out", test="test.tsv", methods=("ft", "cmlm")).run()
        >>> cells[0]["accuracy"]
    """

    model: str
    train: str
    output_dir: str
    test: str | None = None
    validation: int = 0
    name: str | None = None
    label_column: str = "label"
    text_column: str | None = None
    text_pair_column: str | None = None
    paraphrase_column: str | None = None
    methods: Sequence[str] = ("ft", "tapt", "cmlm")
    shots: Sequence[int] = (16,)
    draws: int = 5
    epochs: float = 2.0
    max_steps: int = -1
    batch_size: int = 32
    learning_rate: float = 5e-5
    warmup: float = 0.06
    fine_tune_epochs: float = 10.0
    fine_tune_batch_size: int = 16
    fine_tune_learning_rate: float = 2e-4
    max_length: int | None = None
    bf16: bool | None = None
    seed: int = 0
    baseline: str = "ft"
    cache_dir: str | None = None
    keep_models: bool = False
    backend: str | None = None

    def run(self, report: Callable[[str], None] = lambda line: None) -> list[Cell]:
        """Run the cells that are not in cells.jsonl yet and write the tables; returns the cells of this grid in its order.

        `report` is called with a line about each cell. Every input error is a one-line ValueError, OSError or
        ModuleNotFoundError, raised before anything is computed or written.
        """
        return self.check().run(report)

    def check(self) -> Grid:
        """Check everything, read the texts and load the starting checkpoint; writes nothing."""
        return self._of_plain_numbers()._checked()

    def _of_plain_numbers(self) -> FewShotExperiment:
        """Normalise numbers, so that 2 and 2.0 epochs, or NumPy scalars, mean the same cells."""
        several = isinstance(self.shots, Sequence) and not isinstance(self.shots, str)
        expect(several, "shots", "a sequence such as (16,)", repr(self.shots))
        values: dict[str, Any] = {"shots": tuple(_plain("shots", "int", each) for each in self.shots)}
        for field in fields(self):
            kind, value = str(field.type).removesuffix(" | None"), getattr(self, field.name)
            if kind in ("int", "float") and (value is not None or kind == field.type):
                values[field.name] = _plain(field.name, kind, value)
        return replace(self, **values)

    def _checked(self) -> Grid:
        expect(world_size() == 1, "WORLD_SIZE", "1, since a few-shot experiment is one process", world_size())
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # every Trainer would use it, and no cell would record it
        expect(launcher == "no", "ACCELERATE_MIXED_PRECISION", "no, since bf16 says it for a few-shot experiment", launcher)
        for name, least in (("draws", 1), ("batch_size", 1), ("fine_tune_batch_size", 1)):
            expect(getattr(self, name) >= least, name, f">= {least}", getattr(self, name))
        expect(self.max_length is None or self.max_length >= 8, "max_length", ">= 8", self.max_length)
        for name in ("epochs", "learning_rate", "fine_tune_epochs", "fine_tune_learning_rate"):
            value = getattr(self, name)
            expect(math.isfinite(value) and value > 0, name, "finite and > 0", value)
        expect(self.max_steps == -1 or self.max_steps >= 1, "max_steps", ">= 1, or -1 for whole epochs", self.max_steps)
        check_warmup(self.warmup)
        expect(self.validation >= 0, "validation", ">= 0", self.validation)
        expect(0 <= self.seed < 2**31, "seed", "in [0, 2^31)", self.seed)
        several = isinstance(self.methods, Sequence) and not isinstance(self.methods, str)
        expect(several, "methods", 'a sequence such as ("ft",)', repr(self.methods))
        expect(bool(self.methods), "methods", "at least one", self.methods)
        expect(bool(self.shots) and min(self.shots) >= 1, "shots", "at least one number, all >= 1", self.shots)
        methods = {name: find_method(name) for name in dict.fromkeys(self.methods)}
        find_method(self.baseline)
        for name, method in methods.items():
            needed = method.second == "paraphrase"
            expect(not needed or self.paraphrase_column is not None, "paraphrase_column", f"given for method {name}", None)
        expect((self.test is None) == (self.validation > 0), "test or validation", "given, one of them",
               "both" if self.test else "neither")  # fmt: skip
        folder = Path(self.output_dir)
        for name, path in (("output_dir", folder), ("cache_dir", Path(self.cache_dir or folder))):
            blocked = any(each.exists() and not each.is_dir() for each in (path, *path.absolute().parents))
            expect(not blocked, name, "a folder, or a path where one can be made", path)
        expect(not (folder / "config.json").exists(), "output_dir", "a folder that holds no checkpoint", folder)
        check_backend_here(self.backend)
        return Grid(self, methods)


def _plain(name: str, kind: str, value: Any) -> Any:
    try:
        return operator.index(value) if kind == "int" else float(value)
    except (TypeError, ValueError):
        rule = "a whole number" if kind == "int" else "a number"
        raise ValueError(f"expected {name} to be {rule}, got {value!r}") from None
