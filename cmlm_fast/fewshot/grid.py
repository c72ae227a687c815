"""Run a checked experiment: it resumes where it stopped and never repeats a finished cell.

The order is breadth first, draw by draw, so that the results are a fair table whenever the run stops. A cell's key is a
fingerprint of everything its score depends on: the start, texts and labels, method, schedule, fine-tuning, draw.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..backends import named_backend, use_backend
from ..checkpoints import discard, in_use
from ..errors import DivergedError
from ..machine import fast_in_bf16
from ..output import disk_errors
from .cells import CELLS, Cell, append_cell, fingerprint, read_cells
from .draws import draw
from .finetune import fine_tune
from .methods import Method
from .starting import load_start
from .tables import write_tables
from .task import Task

if TYPE_CHECKING:
    from .experiment import FewShotExperiment
    from .post_training import UnlabelledTexts

logger = logging.getLogger(__name__)

_MODELS = "models"
_PROTOCOL = 1  # part of every key; increment it when the same settings give another score


class Grid:
    """A checked experiment: data, starting checkpoint and cells."""

    def __init__(self, experiment: FewShotExperiment, methods: dict[str, Method]) -> None:
        self.options = experiment
        self.methods = methods
        self.shots = sorted(set(experiment.shots))
        self.folder = Path(experiment.output_dir)
        self.task = Task(experiment, methods, self.shots[-1])
        self.name = self.task.name
        self.bf16 = fast_in_bf16() if experiment.bf16 is None else experiment.bf16
        self.start = load_start(experiment, methods)
        self.cells = {(cell["key"], cell["method"]): cell for cell in read_cells(self.folder / CELLS)}

    def run(self, report: Callable[[str], None]) -> list[Cell]:
        """As `FewShotExperiment.run`."""
        grid = [(d, name) for d in range(self.options.draws) for name in self.methods]
        wanted = [self._id(name, shots, d) for d, name in grid for shots in self.shots]
        report(f"{self.name}: {len(wanted)} cells, {sum(one in self.cells for one in wanted)} of them done before")
        self.folder.mkdir(parents=True, exist_ok=True)
        failed: list[str] = []
        kept = "the finished cells are kept"
        with disk_errors(self.folder, kept), use_backend(self.options.backend or named_backend()), _same_bits_every_time():
            try:
                for d, name in grid:
                    failed += self._cells_of(name, d, report)
            finally:
                if cells := read_cells(self.folder / CELLS):  # other runs may have added to the file
                    write_tables(self.folder, cells, self.options.baseline)
        if failed:
            missing = sum(one not in self.cells for one in wanted)
            raise DivergedError(f"{self.name}: {missing} of {len(wanted)} cells failed; {failed[0]}")
        return [self.cells[one] for one in wanted]

    def _id(self, name: str, shots: int, d: int) -> tuple[str, str]:
        """A cell's key and the method's name: two names for the same settings are computed once, and each gets a row."""
        return fingerprint(self.facts(name, shots, d)), name

    def _cells_of(self, name: str, d: int, report: Callable[[str], None]) -> list[str]:
        """Run the missing cells of one method and draw; returns those that diverged, without stopping the rest of the grid."""
        todo = [shots for shots in self.shots if self._id(name, shots, d) not in self.cells]
        done = {key: cell for (key, _), cell in self.cells.items()}
        for shots in todo:
            if twin := done.get(self._id(name, shots, d)[0]):
                self._add({**twin, "method": name}, report)
        todo = [shots for shots in todo if self._id(name, shots, d) not in self.cells]
        failed: list[str] = []
        with self._record_divergence(failed, f"draw {d}, {name}", report):
            if not todo:
                return failed
            with self._checkpoint(name, d, report) as (checkpoint, facts):
                for shots in todo:
                    with self._record_divergence(failed, f"{shots} per class, draw {d}, {name}", report):
                        self._add(self._cell(name, shots, d, checkpoint, facts), report)
        return failed

    @contextmanager
    def _record_divergence(self, failed: list[str], what: str, report: Callable[[str], None]) -> Iterator[None]:
        try:
            yield
        except DivergedError as error:
            failed.append(f"{what}: {error}")
            report(f"{self.name}, {what}: failed, {error}")

    def _add(self, cell: Cell, report: Callable[[str], None]) -> None:
        append_cell(self.folder / CELLS, cell)
        self.cells[cell["key"], cell["method"]] = cell
        report(f"{self.name}, {cell['shots']} per class, draw {cell['draw']}, {cell['method']}: "
               f"accuracy {cell['accuracy']:.4f}, macro-F1 {cell['macro_f1']:.4f}, "
               f"{cell['fine_tune_seconds']:.0f} s")  # fmt: skip

    def facts(self, name: str, shots: int, d: int) -> dict[str, Any]:
        """Everything that the score of one cell depends on."""
        method = self.methods[name].facts
        return {"post_training": self._post_training_facts(name, d), "contrast": method["contrast"], "shots": shots,
                "draw": d, "fine_tuning": self.setup["fine_tuning"], "labelled": self.task.data_id}  # fmt: skip

    def _post_training_facts(self, name: str, d: int) -> dict[str, Any]:
        method = self.methods[name].facts
        common = {"protocol": _PROTOCOL, "dataset": self.name, "start": self.start.id, "seed": self.options.seed + d,
                  "bf16": self.bf16, "max_length": self.start.max_length}  # fmt: skip
        if method["objective"] is None:
            return common
        kept = {field: method[field] for field in ("objective", "second", "whole_word")}
        schedule = asdict(self._schedule)
        paraphrases = self.task.paraphrases_id if method["second"] == "paraphrase" else None
        return {**common, **kept, "schedule": schedule, "texts": self.task.texts_id, "paraphrases": paraphrases}

    @property
    def setup(self) -> dict[str, Any]:
        """The settings that cells must share to be compared, and the name of the starting checkpoint."""
        options = self.options
        fine_tuning = {field: getattr(options, f"fine_tune_{field}") for field in ("epochs", "batch_size", "learning_rate")}
        return {"protocol": _PROTOCOL, "model": Path(options.model).name, "start": self.start.id, "data": self.task.data_id,
                "fine_tuning": fine_tuning, "max_length": self.start.max_length, "bf16": self.bf16,
                "seed": options.seed}  # fmt: skip

    @contextmanager
    def _checkpoint(self, name: str, d: int, report: Callable[[str], None]) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The checkpoint to fine-tune, and its facts. Unless it is to be kept, the last run that uses it removes it."""
        from .post_training import FACTS

        while True:
            folder = self._ensure_checkpoint(name, d, report)
            with in_use(folder) as alone:
                if alone is None:  # another run has just removed it
                    continue
                facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
                yield folder, facts
                if facts.get("passing") and not self.options.keep_models and alone():
                    discard(folder)
                return

    def _ensure_checkpoint(self, name: str, d: int, report: Callable[[str], None]) -> Path:
        """The folder of the checkpoint, which is made if missing."""
        from .post_training import post_train, save

        models = Path(self.options.cache_dir) if self.options.cache_dir else self.folder / _MODELS
        start = models / f"start-{self.start.id}"
        if not start.exists():
            save(self.start.model, self.start.tokenizer, {"steps": 0, "encoder_tokens": 0, "seconds": 0.0}, start)
        folder, method = start, self.methods[name]
        if method.objective is not None:
            folder = models / fingerprint(self._post_training_facts(name, d))
            if not folder.exists():
                report(f"{self.name}, draw {d}, {name}: post-training")
                done = post_train(start, self._unlabelled, method, self._schedule, seed=self.options.seed + d, bf16=self.bf16,
                                  folder=folder, passing=not self.options.keep_models)  # fmt: skip
                report(f"{self.name}, draw {d}, {name}: post-trained, {done['steps']} steps, {done['seconds']:.0f} s")
        return folder

    def _cell(self, name: str, shots: int, d: int, checkpoint: Path, done: dict[str, Any]) -> Cell:
        options, task = self.options, self.task
        drawn = draw(task.labels, shots, options.seed + d)
        score = fine_tune(
            checkpoint, [task.texts[i] for i in drawn], [task.labels[i] for i in drawn], task.test_texts, task.test_labels,
            epochs=options.fine_tune_epochs, learning_rate=options.fine_tune_learning_rate,
            batch_size=options.fine_tune_batch_size, max_length=self.start.max_length, seed=options.seed + d, bf16=self.bf16,
            contrast=self.methods[name].contrast,
        )  # fmt: skip
        facts, setup = self.facts(name, shots, d), self.setup
        method = self.methods[name].facts
        if method["objective"] is not None:
            method["schedule"] = asdict(self._schedule)
        if method["second"] == "paraphrase":
            method["paraphrases"] = self.task.paraphrases_id
        compared = {field: value for field, value in setup.items() if field != "model"}
        return {
            "dataset": self.name, "method": name, "shots": shots, "draw": d, "accuracy": score.accuracy,
            "macro_f1": score.macro_f1, "fine_tune_seconds": round(score.seconds, 2), "post_train_seconds": done["seconds"],
            "steps": done["steps"], "encoder_tokens": done["encoder_tokens"], "threads": torch.get_num_threads(),
            "device": _device(), "torch": torch.__version__, "setup": setup, "setup_id": fingerprint(compared), **method,
            "method_id": fingerprint(method), "key": fingerprint(facts),
        }  # fmt: skip

    @cached_property
    def _unlabelled(self) -> UnlabelledTexts:
        from .post_training import UnlabelledTexts

        return UnlabelledTexts(self.task.train.remove_columns("label"), self.start.tokenizer, self.start.max_length)

    @cached_property
    def _schedule(self) -> Any:
        from .post_training import Schedule

        o = self.options
        return Schedule(o.epochs, o.max_steps, o.batch_size, o.learning_rate, o.warmup)


@contextmanager
def _same_bits_every_time() -> Iterator[None]:
    """Deterministic kernels on a GPU, a warning for ops without one; on the CPU all kernels add in a fixed order."""
    if not torch.cuda.is_available():
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    settings: Any = torch.utils.deterministic
    fills, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False  # nothing here reads such memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fills


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
