"""The one error pattern of the data side, and the checks that more than one function makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def fail(function: str, argument: str, rule: str, value: object) -> ValueError:
    return ValueError(f"{function}: expected {argument} to be {rule}, got {value}")


def texts_of(dataset: Dataset | Sequence[str], function: str) -> Dataset:
    """The dataset, or one of a list of texts; ValueError where it has no column `text`."""
    from datasets import Dataset

    if isinstance(dataset, (list, tuple)) and all(isinstance(text, str) for text in dataset):
        try:
            return Dataset.from_dict({"text": list(dataset)})
        except UnicodeEncodeError as error:
            found = repr(error.object[error.start : error.end])
            raise fail(function, "dataset", "texts that UTF-8 can hold, no half of a surrogate pair", found) from error
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list) or "text" not in columns:
        found = type(dataset).__name__ if columns is None else f"columns {columns}"
        raise fail(function, "dataset", "a list of texts, or a Dataset with a column 'text'", found)
    return dataset


def check_tokenizer(tokenizer: Any, function: str) -> None:
    """Raise ValueError, naming the tokenizer, unless it has a mask token and a pad token."""
    for kind in ("mask", "pad"):
        if getattr(tokenizer, f"{kind}_token_id", None) is None:
            name = f"{type(tokenizer).__name__} {getattr(tokenizer, 'name_or_path', '')!r}"
            raise fail(function, "tokenizer", f"one with a {kind} token", f"{name}, which has none")
