"""The checked data of an experiment: labelled texts to draw from, and texts to score."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..options import arguments_named, expect
from .cells import fingerprint, fingerprint_rows
from .draws import classes_of, draw
from .finetune import Text
from .methods import Method

if TYPE_CHECKING:
    from datasets import Dataset

    from .experiment import FewShotExperiment

logger = logging.getLogger(__name__)


class Task:
    """Texts and labels of train and test. Every fault is a one-line ValueError; what may mislead is a warning.

    Args:
        experiment: names the files, columns and rows.
        methods: the methods to run on them.
        most: maximum texts per class in a draw.
    """

    def __init__(self, experiment: FewShotExperiment, methods: Mapping[str, Method], most: int) -> None:
        self._options = experiment
        path = Path(experiment.train)
        self.name = experiment.name or (path.absolute().parent.name if path.stem == "train" else path.stem)
        self.train = self._read("train", experiment.paraphrase_column)
        if experiment.test is not None:
            test = self._read("test", None)
        else:
            self.train, test = hold_out(self.train, experiment.validation, experiment.seed)
            self.name += " (validation)"
        self.labels, self.test_labels = self.train["label"][:], test["label"][:]
        self.texts, self.test_texts = _texts(self.train), _texts(test)
        filled = any("".join(text).strip() for text in self.texts)
        expect(filled, "train", "texts that are not all blank", experiment.train)
        classes = classes_of(self.labels)
        expect(len(classes) >= 2, "train", "texts of at least two classes", classes)
        unseen = sorted(set(self.test_labels) - set(classes))
        expect(not unseen, "test", f"texts with labels among {', '.join(classes[:20])}", ", ".join(unseen[:5]))
        draw(self.labels, most, 0)  # fail now if a class has fewer texts
        if any(method.second == "paraphrase" for method in methods.values()):
            column, rule = repr(experiment.paraphrase_column), "a column with a text"
            rows = zip(self.texts, self.train["paraphrase"], strict=True)
            texts = ["".join(text).strip() for text, other in rows if (other or "").strip()]  # those with a paraphrase
            expect(bool(texts), "paraphrase_column", rule, f"{column}, all blank")
            expect(any(texts), "paraphrase_column", f"{rule} beside one of train", f"{column}, with texts beside blanks alone")
        self._look_for_repeats()

    def _read(self, which: str, paraphrase_column: str | None) -> Dataset:
        from ..data import load_labelled

        o = self._options
        with arguments_named(path=which):
            return load_labelled(getattr(o, which), label_column=o.label_column, text_column=o.text_column,
                                 text_pair_column=o.text_pair_column, paraphrase_column=paraphrase_column,
                                 split=which)  # fmt: skip

    def _look_for_repeats(self) -> None:
        seen = len(set(self.test_texts) & set(self.texts))
        expect(seen < len(set(self.test_texts)), "test", "texts that are not all in train", self._options.test)
        if seen:
            logger.warning("%s: %d texts of the test set are in train too; scores may be too high", self.name, seen)
        if again := len(self.texts) - len(set(self.texts)):
            otherwise = len(set(zip(self.texts, self.labels, strict=True))) - len(set(self.texts))
            logger.warning("%s: %d texts of train are repeats, %d of them with another label", self.name, again, otherwise)

    @cached_property
    def texts_id(self) -> str:
        """Fingerprint of the unlabelled texts."""
        return fingerprint_rows(self.texts)

    @cached_property
    def data_id(self) -> str:
        """Fingerprint of all texts and labels."""
        return fingerprint([fingerprint_rows(x) for x in (self.texts, self.labels, self.test_texts, self.test_labels)])

    @cached_property
    def paraphrases_id(self) -> str:
        """Fingerprint of the paraphrases."""
        return fingerprint_rows(self.train["paraphrase"])


def hold_out(train: Dataset, rows: int, seed: int) -> tuple[Dataset, Dataset]:
    """Hold out `rows` texts of train, stratified by class; both parts keep their order."""
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
