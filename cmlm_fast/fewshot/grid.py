"""A checked experiment at work: it resumes where it stopped and never repeats a finished cell.

The order is breadth first, draw by draw: stop it at any time and what is there is a fair table. A cell's key is a
fingerprint of all that its number depends on: the start, texts and labels, method, schedule, fine-tuning, draw.
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
from torch import nn

from ..backends import chosen, use_backend
from ..checkpoints import discard, in_use
from ..config import CMLMConfig
from ..errors import DivergedError
from ..machine import fast_in_bf16
from ..options import arguments_named, expect
from ..output import disk_errors
from ..same_run import fingerprint_of_weights
from ..start import check_vocabulary, load_model, load_tokenizer, sequence_length
from .cells import CELLS, Cell, append_cell, fingerprint, fingerprint_rows, read_cells
from .draws import classes_of, draw
from .finetune import Text, fine_tune
from .methods import Method
from .tables import write_tables

if TYPE_CHECKING:
    from datasets import Dataset

    from .experiment import FewShotExperiment
    from .post_training import UnlabelledTexts

logger = logging.getLogger(__name__)

_MODELS = "models"
_OF_THE_FILE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
_PROTOCOL = 1  # part of every key; raise it when the same settings give another number


class Grid:
    """A checked experiment: data, start and cells."""

    def __init__(self, experiment: FewShotExperiment, methods: dict[str, Method]) -> None:
        self.options = experiment
        self.methods = methods
        self.shots = sorted(set(experiment.shots))
        self.folder = Path(experiment.output_dir)
        path = Path(experiment.train)
        self.name = experiment.name or (path.absolute().parent.name if path.stem == "train" else path.stem)
        train = self._read("train", experiment.paraphrase_column)
        if experiment.test is not None:
            test = self._read("test", None)
        else:
            train, test = _hold_out(train, experiment.validation, experiment.seed)
            self.name += " (validation)"
        self.train, self.test = train, test
        self.labels, self.test_labels = train["label"][:], test["label"][:]
        self.texts, self.test_texts = _texts(train), _texts(test)
        classes = classes_of(self.labels)
        expect(len(classes) >= 2, "train", "texts of at least two classes", classes)
        unseen = sorted(set(self.test_labels) - set(classes))
        expect(not unseen, "test", f"texts with labels among {', '.join(classes[:20])}", ", ".join(unseen[:5]))
        draw(self.labels, self.shots[-1], 0)  # a class with fewer texts is an error now
        if any(method.second == "paraphrase" for method in methods.values()):
            filled = any((text or "").strip() for text in train["paraphrase"])
            expect(filled, "paraphrase_column", "a column with a text", f"{experiment.paraphrase_column!r}, all blank")
        seen = len(set(self.test_texts) & set(self.texts))
        expect(seen < len(set(self.test_texts)), "test", "texts that are not all in train", experiment.test)
        if seen:
            logger.warning("%s: %d texts of the test set are in train too; scores may be too high", self.name, seen)
        if again := len(self.texts) - len(set(self.texts)):
            otherwise = len(set(zip(self.texts, self.labels, strict=True))) - len(set(self.texts))
            logger.warning("%s: %d texts of train are repeats, %d of them with another label", self.name, again, otherwise)
        self.bf16 = fast_in_bf16() if experiment.bf16 is None else experiment.bf16
        self.tokenizer, self.start, self.start_id = self._load_start()
        if any(method.whole_word for method in methods.values()):  # a tokenizer that knows no words is an error now
            from ..data import tokenize_texts

            tokenize_texts(train.select_columns("text").select([0]), self.tokenizer, whole_word=True)
        self.cells = {(cell["key"], cell["method"]): cell for cell in read_cells(self.folder / CELLS)}

    def run(self, report: Callable[[str], None]) -> list[Cell]:
        """As `FewShotExperiment.run`."""
        grid = [(d, name) for d in range(self.options.draws) for name in self.methods]
        wanted = [self._id(name, shots, d) for d, name in grid for shots in self.shots]
        report(f"{self.name}: {len(wanted)} cells, {sum(one in self.cells for one in wanted)} of them done before")
        self.folder.mkdir(parents=True, exist_ok=True)
        failed: list[str] = []
        kept = "the finished cells are kept"
        with disk_errors(self.folder, kept), use_backend(self.options.backend or chosen()), _same_bits_every_time():
            try:
                for d, name in grid:
                    failed += self._cells_of(name, d, report)
            finally:
                if cells := read_cells(self.folder / CELLS):  # other runs may have added to the file in the meantime
                    write_tables(self.folder, cells, self.options.baseline)
        if failed:
            missing = sum(one not in self.cells for one in wanted)
            raise DivergedError(f"{self.name}: {missing} of {len(wanted)} cells failed; {failed[0]}")
        return [self.cells[one] for one in wanted]

    def _id(self, name: str, shots: int, d: int) -> tuple[str, str]:
        """A cell's key, and the method's name: what two names say in different words is done once, and has a row for each."""
        return fingerprint(self.facts(name, shots, d)), name

    def _cells_of(self, name: str, d: int, report: Callable[[str], None]) -> list[str]:
        """Do what is not done yet of one method and draw; returns what diverged, which leaves the rest of the grid alone."""
        todo = [shots for shots in self.shots if self._id(name, shots, d) not in self.cells]
        done = {key: cell for (key, _), cell in self.cells.items()}
        for shots in todo:
            if twin := done.get(self._id(name, shots, d)[0]):
                self._add({**twin, "method": name}, report)
        todo = [shots for shots in todo if self._id(name, shots, d) not in self.cells]
        failed: list[str] = []
        with self._noting(failed, f"draw {d}, {name}", report):
            if not todo:
                return failed
            with self._checkpoint(name, d, report) as (checkpoint, facts):
                for shots in todo:
                    with self._noting(failed, f"{shots} a class, draw {d}, {name}", report):
                        self._add(self._cell(name, shots, d, checkpoint, facts), report)
        return failed

    @contextmanager
    def _noting(self, failed: list[str], what: str, report: Callable[[str], None]) -> Iterator[None]:
        try:
            yield
        except DivergedError as error:
            failed.append(f"{what}: {error}")
            report(f"{self.name}, {what}: failed, {error}")

    def _add(self, cell: Cell, report: Callable[[str], None]) -> None:
        append_cell(self.folder / CELLS, cell)
        self.cells[cell["key"], cell["method"]] = cell
        report(f"{self.name}, {cell['shots']} a class, draw {cell['draw']}, {cell['method']}: accuracy {cell['accuracy']:.4f}, "
               f"macro-F1 {cell['macro_f1']:.4f}, {cell['fine_tune_seconds']:.0f} s")  # fmt: skip

    def facts(self, name: str, shots: int, d: int) -> dict[str, Any]:
        """All that the number of one cell depends on."""
        method = self.methods[name].facts
        return {"post_training": self._post_training_facts(name, d), "contrast": method["contrast"], "shots": shots,
                "draw": d, "fine_tuning": self.setup["fine_tuning"], "labelled": self._data_id}  # fmt: skip

    def _post_training_facts(self, name: str, d: int) -> dict[str, Any]:
        method = self.methods[name].facts
        common = {"protocol": _PROTOCOL, "dataset": self.name, "start": self.start_id, "seed": self.options.seed + d,
                  "bf16": self.bf16, "max_length": self.max_length}  # fmt: skip
        if method["objective"] is None:
            return common
        kept = {field: method[field] for field in ("objective", "second", "whole_word")}
        schedule = asdict(self._schedule)
        paraphrases = self._paraphrases_id if method["second"] == "paraphrase" else None
        return {**common, **kept, "schedule": schedule, "texts": self._texts_id, "paraphrases": paraphrases}

    @property
    def setup(self) -> dict[str, Any]:
        """What cells must have in common to be compared, and the start's name."""
        options = self.options
        fine_tuning = {field: getattr(options, f"fine_tune_{field}") for field in ("epochs", "batch_size", "learning_rate")}
        return {"protocol": _PROTOCOL, "model": Path(options.model).name, "start": self.start_id, "data": self._data_id,
                "fine_tuning": fine_tuning, "max_length": self.max_length, "bf16": self.bf16,
                "seed": options.seed}  # fmt: skip

    @contextmanager
    def _checkpoint(self, name: str, d: int, report: Callable[[str], None]) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The checkpoint to fine-tune and what was done for it. One that nobody keeps goes with the last run that uses it."""
        from .post_training import FACTS

        while True:
            folder = self._made(name, d, report)
            with in_use(folder) as alone:
                if alone is None:  # another run has removed it in the meantime
                    continue
                facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
                yield folder, facts
                if facts.get("passing") and not self.options.keep_models and alone():
                    discard(folder)
                return

    def _made(self, name: str, d: int, report: Callable[[str], None]) -> Path:
        """The folder of the checkpoint, made where it is not there yet."""
        from .post_training import post_train, save

        models = Path(self.options.cache_dir) if self.options.cache_dir else self.folder / _MODELS
        start = models / f"start-{self.start_id}"
        if not start.exists():
            save(self.start, self.tokenizer, {"steps": 0, "encoder_tokens": 0, "seconds": 0.0}, start)
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
        options = self.options
        chosen = draw(self.labels, shots, options.seed + d)
        score = fine_tune(
            checkpoint, [self.texts[i] for i in chosen], [self.labels[i] for i in chosen], self.test_texts, self.test_labels,
            epochs=options.fine_tune_epochs, learning_rate=options.fine_tune_learning_rate,
            batch_size=options.fine_tune_batch_size, max_length=self.max_length, seed=options.seed + d, bf16=self.bf16,
            contrast=self.methods[name].contrast,
        )  # fmt: skip
        facts, setup = self.facts(name, shots, d), self.setup
        method = self.methods[name].facts
        if method["objective"] is not None:
            method["schedule"] = asdict(self._schedule)
        if method["second"] == "paraphrase":
            method["paraphrases"] = self._paraphrases_id
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

        return UnlabelledTexts(self.train.remove_columns("label"), self.tokenizer, self.max_length)

    @cached_property
    def _schedule(self) -> Any:
        from .post_training import Schedule

        o = self.options
        return Schedule(o.epochs, o.max_steps, o.batch_size, o.learning_rate, o.warmup)

    @cached_property
    def _texts_id(self) -> str:
        return fingerprint_rows(self.texts)

    @cached_property
    def _data_id(self) -> str:
        return fingerprint([fingerprint_rows(x) for x in (self.texts, self.labels, self.test_texts, self.test_labels)])

    @cached_property
    def _paraphrases_id(self) -> str:
        return fingerprint_rows(self.train["paraphrase"])

    def _read(self, which: str, paraphrase_column: str | None) -> Dataset:
        from ..data import load_labelled

        o = self.options
        with arguments_named(path=which):
            return load_labelled(getattr(o, which), label_column=o.label_column, text_column=o.text_column,
                                 text_pair_column=o.text_pair_column, paraphrase_column=paraphrase_column)  # fmt: skip

    def _load_start(self) -> tuple[Any, Any, str]:
        """Tokenizer, model, and a fingerprint of both. A head that the checkpoint lacks is made from the seed."""
        from transformers import set_seed

        tokenizer = load_tokenizer(self.options.model)
        set_seed(self.options.seed)
        model = load_model(self.options.model, CMLMConfig())
        check_vocabulary(model, tokenizer)
        objectives = [method.objective for method in self.methods.values() if method.objective]
        jitter = max((each.position_jitter for each in objectives), default=0)
        self.max_length = sequence_length(model, tokenizer, self.options.max_length, jitter)
        # Of the tokenizer all that it does, of the configuration all but where it comes from.
        config = {name: value for name, value in model.config.to_diff_dict().items() if name not in _OF_THE_FILE}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
        side = getattr(tokenizer, "truncation_side", "right")
        settings = json.dumps([config, words, *([side] if side != "right" else [])], sort_keys=True, default=str)
        self._check_dropout(model.lm)
        return tokenizer, model, fingerprint_of_weights(model, settings)

    def _check_dropout(self, lm: Any) -> None:
        """Raise ValueError where a method contrasts two dropout passes and the encoder has no dropout."""
        layers = (module.p for module in lm.base_model.modules() if isinstance(module, nn.Dropout))
        if max(layers, default=0.0) > 0 or getattr(lm.config, "attention_dropout", 0.0) > 0:
            return
        for name, method in self.methods.items():
            seen = method.objective
            same = method.second == "masked" and seen is not None and seen.rate == seen.complement_rate == 0
            rule = f"one with dropout for method {name}, whose two passes differ by nothing else"
            expect(method.contrast is None and not same, "model", rule, f"{self.options.model}, without")


@contextmanager
def _same_bits_every_time() -> Iterator[None]:
    """On a GPU, kernels that add in one order; on the CPU all do. What has no such kernel says so in a warning."""
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


def _hold_out(train: Dataset, rows: int, seed: int) -> tuple[Dataset, Dataset]:
    """`rows` texts held out of train, every class in its share; both parts keep the order."""
    from sklearn.model_selection import train_test_split

    labels = train["label"][:]
    classes = classes_of(labels)
    rule = f">= {len(classes)} and <= {len(labels) - len(classes)}, so that each side has all classes"
    expect(len(classes) <= rows <= len(labels) - len(classes), "validation", rule, rows)
    single = [label for label in classes if labels.count(label) < 2]
    expect(not single, "train", "at least two texts of each class, for a validation", f"one of {', '.join(single[:5])}")
    kept, held = train_test_split(range(len(labels)), test_size=rows, stratify=labels, random_state=seed)
    for part, rule in ((kept, "so small that each class keeps a text"), (held, "so large that it holds a text of each class")):
        lost = sorted(set(classes) - {labels[i] for i in part})
        expect(not lost, "validation", rule, f"{rows}, which leaves none of {', '.join(lost[:5])}")
    return train.select(sorted(kept)), train.select(sorted(held))


def _texts(dataset: Dataset) -> list[Text]:
    texts = [text or "" for text in dataset["text"]]
    if "text_pair" not in dataset.column_names:
        return list(texts)
    return list(zip(texts, [text or "" for text in dataset["text_pair"]], strict=True))
