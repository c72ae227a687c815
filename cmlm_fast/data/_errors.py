"""The error pattern of the data functions, and the checks that several of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


#: `datasets`' names for text types.
TEXT_TYPES = ("string", "large_string", "string_view")


def fail(function: str, argument: str, rule: str, value: object) -> ValueError:
    return ValueError(f"{function}: expected {argument} to be {rule}, got {value}")


def as_text_dataset(dataset: Dataset | Sequence[str], function: str) -> Dataset:
    """The dataset, or one made from a list of texts; ValueError if column `text` is missing or a text column holds no text."""
    from datasets import Dataset

    if isinstance(dataset, (list, tuple)) and all(isinstance(text, str) for text in dataset):
        try:
            return Dataset.from_dict({"text": list(dataset)})
        except UnicodeEncodeError as error:
            found = repr(error.object[error.start : error.end])
            raise fail(function, "dataset", "texts that UTF-8 can encode, without half a surrogate pair", found) from error
    if not isinstance(dataset, Dataset) or "text" not in dataset.column_names:
        found = f"columns {dataset.column_names}" if isinstance(dataset, Dataset) else type(dataset).__name__
        raise fail(function, "dataset", "a list of texts, or a Dataset with a column 'text'", found)
    for name in ("text", "text_pair"):
        kind = dataset.features.get(name, "null")
        if str(getattr(kind, "dtype", kind)) not in (*TEXT_TYPES, "null"):  # null: nothing but None
            raise fail(function, "dataset", f"one whose column {name!r} holds text", getattr(kind, "dtype", kind))
    return dataset


def check_tokenizer(tokenizer: Any, function: str) -> None:
    """Raise ValueError, naming the tokenizer, unless it has a mask token and a pad token."""
    for kind in ("mask", "pad"):
        if getattr(tokenizer, f"{kind}_token_id", None) is None:
            name = f"{type(tokenizer).__name__} {getattr(tokenizer, 'name_or_path', '')!r}"
            raise fail(function, "tokenizer", f"one with a {kind} token", f"{name}, which has none")
