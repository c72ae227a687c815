"""Drop blank and repeated texts; hold out a share of the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from ._errors import as_text_dataset, fail
from .tokens import rows_at_once


class TextCounts(NamedTuple):
    """Row counts of `clean_texts`: rows = empty + duplicates + kept."""

    rows: int
    empty: int
    duplicates: int
    kept: int


def clean_texts(dataset: Dataset | Sequence[str]) -> tuple[Dataset, TextCounts]:
    """Drop rows whose texts are all blank, and exact repeats of an earlier row (a pair counts as one); keep the order.

    Takes a Dataset with a column text (and text_pair), or a list of texts. Needs about 120 bytes of memory per row.
    Raises ValueError if nothing is left.

    Example:
        >>> clean_texts(Dataset.from_dict({"text": ["a", " ", "a"]}))[1]
        TextCounts(rows=3, empty=1, duplicates=1, kept=1)
    """
    dataset = as_text_dataset(dataset, "clean_texts")
    columns = [name for name in ("text", "text_pair") if name in dataset.column_names]
    digests, filled = bytearray(), []
    for batch in dataset.with_format(None).select_columns(columns).iter(batch_size=rows_at_once(dataset, 10_000)):
        for row in zip(*(batch[name] for name in columns), strict=True):
            texts = [text or "" for text in row]
            filled.append(any(text.strip() for text in texts))
            # The length distinguishes ("ab", "c") from ("a", "bc").
            digests += hashlib.blake2b(f"{len(texts[0])}:{''.join(texts)}".encode(), digest_size=16).digest()
    rows = np.flatnonzero(np.array(filled, dtype=bool))
    first = np.unique(np.frombuffer(bytes(digests), dtype="S16")[rows], return_index=True)[1]
    keep = rows[np.sort(first)]
    counts = TextCounts(len(filled), len(filled) - len(rows), len(rows) - len(keep), len(keep))
    if counts.kept == 0:
        raise fail("clean_texts", "dataset", "one with a text that is not blank", f"{counts.rows} blank rows")
    return (dataset if counts.kept == counts.rows else dataset.select(keep)), counts


def split_evaluation(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """Hold out round(share * rows) texts, at least one, drawn by `seed`; share 0 holds out none. Both keep the order.

    Split texts, not sequences, so that no evaluation sequence is a chunk of a training text. Raises ValueError if dataset is
    not a Dataset, or if share is outside [0, 1) or leaves either side without a text.

    Example:
        >>> train, evaluation = split_evaluation(texts, share=0.05, seed=42)
    """
    if not isinstance(dataset, Dataset):
        raise fail("split_evaluation", "dataset", "a Dataset", type(dataset).__name__)
    if not 0.0 <= share < 1.0:
        raise fail("split_evaluation", "share", "in [0, 1)", share)
    if share == 0.0:
        return dataset, None
    rows = len(dataset)
    held = max(1, round(share * rows))
    if held >= rows:
        raise fail("split_evaluation", "share", "small enough to leave a text to train on", f"{share} of {rows} texts")
    order = np.random.default_rng(seed).permutation(rows)
    return dataset.select(np.sort(order[held:])), dataset.select(np.sort(order[:held]))
