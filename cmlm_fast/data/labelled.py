"""Read labelled texts from a file or a saved folder into a `Dataset`: columns text, label (and text_pair, paraphrase)."""

from __future__ import annotations

from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Value

from ._errors import TEXT_TYPES, fail
from .load import read_columns


def load_labelled(path: str | Path, *, label_column: str = "label", text_column: str | None = None,
                  text_pair_column: str | None = None, paraphrase_column: str | None = None,
                  split: str = "train") -> Dataset:  # fmt: skip
    """Read the labelled texts of a file, or of a folder saved with `datasets`, in order, all columns as strings.

    Args:
        path: as for `load_texts`, in a format that has columns.
        label_column: column of the classes: words, whole numbers, or the classes of a `datasets.ClassLabel`.
        text_column, text_pair_column: as for `load_texts`; the label column never counts as text.
        paraphrase_column: column with a paraphrase of each text.
        split: split to read from a saved folder with several.

    Returns:
        Dataset with columns text, label (and text_pair, paraphrase).

    Raises:
        FileNotFoundError: no such file.
        ValueError: as for `load_texts`; a label column that is missing, has another type, or has an empty row.

    Example:
        >>> load_labelled("intents.tsv", label_column="intent").column_names
        ['text', 'label']
    """
    others = {"label": ("label_column", label_column)}
    if paraphrase_column is not None:
        others["paraphrase"] = ("paraphrase_column", paraphrase_column)
    dataset = read_columns(path, text_column, text_pair_column, others, split)
    kind = dataset.features["label"]
    if isinstance(kind, ClassLabel):
        labels = [None if i is None or i < 0 else kind.int2str(i) for i in dataset["label"]]
    elif str(getattr(kind, "dtype", kind)).startswith(("int", "uint", "string", "large_string", "bool")):
        labels = [None if label is None else str(label).strip() for label in dataset["label"]]
    else:
        raise fail("load_labelled", "label_column", "a column of words or whole numbers", f"{label_column!r} of type {kind}")
    if empty := [row for row, label in enumerate(labels) if not label]:
        got = f"{label_column!r} with {len(empty)}, the first in row {empty[0] + 1}"
        raise fail("load_labelled", "label_column", "a column without an empty row", got)
    if "paraphrase" in dataset.column_names and str(dataset.features["paraphrase"].dtype) not in TEXT_TYPES:
        got = f"{paraphrase_column!r} of type {dataset.features['paraphrase']}"
        raise fail("load_labelled", "paraphrase_column", "a column of text", got)
    columns = {name: dataset[name][:] for name in dataset.column_names if name != "label"}
    strings = Features({name: Value("string") for name in (*columns, "label")})
    return Dataset.from_dict({**columns, "label": labels}, features=strings)
