"""The one error pattern of the data side, and the checks that more than one function makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def fail(function: str, argument: str, rule: str, value: object) -> ValueError:
    return ValueError(f"{function}: expected {argument} to be {rule}, got {value}")


def check_text_column(dataset: Dataset, function: str) -> None:
    """Raise ValueError unless the dataset has a column `text`."""
    if "text" not in dataset.column_names:
        raise fail(function, "dataset", "one with a column 'text'", f"columns {dataset.column_names}")


def check_tokenizer(tokenizer: Any, function: str) -> None:
    """Raise ValueError, naming the tokenizer, unless it has a mask token and a pad token."""
    for kind in ("mask", "pad"):
        if getattr(tokenizer, f"{kind}_token_id", None) is None:
            name = f"{type(tokenizer).__name__} {getattr(tokenizer, 'name_or_path', '')!r}"
            raise fail(function, "tokenizer", f"one with a {kind} token", f"{name}, which has none")
