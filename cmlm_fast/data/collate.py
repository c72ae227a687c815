"""Collate rows of token ids into a padded or packed batch; derive the mask op's settings from a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from ._errors import check_tokenizer, fail
from .fetch import Rows, TableRows, longest_first

_MAX_SPECIAL_IDS = 16  # the maximum that `complementary_mask` accepts


def _special_ids(tokenizer: Any) -> list[int]:
    named = [getattr(tokenizer, f"{kind}_token_id", None) for kind in ("cls", "sep", "pad", "mask", "bos", "eos")]
    others = [i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id]
    return list(dict.fromkeys(i for i in (*named, *others) if i is not None))


def mask_settings(tokenizer: Any) -> dict[str, Any]:
    """Arguments of `complementary_mask` that depend on the tokenizer: mask_token_id, vocab_size, special_ids (at most 16).

    vocab_size is the largest id + 1, which equals len(tokenizer) unless the ids have gaps. special_ids is a tuple of cls, sep,
    pad, mask, bos, eos and the tokenizer's extra special tokens; beyond 16, `CMLMDataCollator` marks the rest as not
    eligible. The unknown token is not included: an unknown word is a word of the text.

    Example:
        >>> mask_settings(bert_tokenizer)
        {'mask_token_id': 103, 'vocab_size': 30522, 'special_ids': (101, 102, 0, 103)}
    """
    check_tokenizer(tokenizer, "mask_settings")
    return {"mask_token_id": tokenizer.mask_token_id, "vocab_size": max(tokenizer.get_vocab().values()) + 1,
            "special_ids": tuple(_special_ids(tokenizer)[:_MAX_SPECIAL_IDS])}  # fmt: skip


@dataclass
class CMLMDataCollator:
    """Collate rows of `tokenize_texts`, a list or a `pyarrow.Table`, into one batch: padded to [B, L] or packed to [T].

    Padded: input_ids, attention_mask and (if present) token_type_ids int64 [B, L], always padded on the right, whatever the
    tokenizer's padding side, so that masks and positions depend on the text alone; sample_ids int64 [B]; unit_ids int32
    [B, L], 0 at pads, if the rows have them; eligible bool [B, L] only for a tokenizer with more than 16 special tokens. Masks
    are made later, on the device.

    Packed: the same tensors of shape [T] without attention_mask, longest sequence first; cu_seqlens int32 [B + 1], sequence b
    is [cu_seqlens[b], cu_seqlens[b + 1]); lengths, B ints.

    Both layouts include eligible_counts, B ints, if tokens are masked individually (no unit_ids, no eligible): they tell the
    host how many tokens exact sampling masks. Code that adds `eligible` or `unit_ids` need not remove them. Like lengths, they
    are NumPy arrays, because code that moves a batch to a device would visit each number of a tuple.

    An empty list of rows (a rank's share of a round with too few batches, see `RankShare`) becomes one sequence of a special
    token with the entry stand_in = True: the encoder runs as on every other rank, and the result counts for nothing.

    Args:
        tokenizer: the tokenizer passed to `tokenize_texts`.
        pad_to_multiple_of: round L up to a multiple of this.
        packed: pack, for a `CMLMModel` whose encoder accepts packed batches.

    Example:
        >>> DataLoader(dataset, batch_size=8, collate_fn=CMLMDataCollator(tokenizer, pad_to_multiple_of=8))
    """

    tokenizer: Any
    pad_to_multiple_of: int | None = None
    packed: bool = False

    def __post_init__(self) -> None:
        check_tokenizer(self.tokenizer, "CMLMDataCollator")
        special = torch.tensor(_special_ids(self.tokenizer), dtype=torch.int64)
        self._special, self._more_special = special[:_MAX_SPECIAL_IDS], special[_MAX_SPECIAL_IDS:]

    def __call__(self, rows: Rows) -> dict[str, Any]:
        if rows:
            names = rows.column_names if isinstance(rows, pa.Table) else list(rows[0])
            if "sample_id" not in names:
                raise fail("CMLMDataCollator", "rows", "those of tokenize_texts, with a sample_id", f"columns {names}")
            if self.packed:
                return self._pack(rows)
            return self._pad(rows.to_pylist() if isinstance(rows, pa.Table) else rows)
        nothing = {"input_ids": [self.tokenizer.mask_token_id], "attention_mask": [1], "sample_id": 0}
        return {**(self._pack([nothing]) if self.packed else self._pad([nothing])), "stand_in": True}

    def _pack(self, rows: Rows) -> dict[str, Any]:
        flat, lengths, sample_ids = longest_first(rows)
        batch: dict[str, Any] = {name: torch.from_numpy(numbers) for name, numbers in flat.items()}
        batch["cu_seqlens"] = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
        batch["lengths"] = lengths
        batch["sample_ids"] = torch.from_numpy(sample_ids)
        if self._more_special.numel():
            batch["eligible"] = ~torch.isin(batch["input_ids"], self._more_special)
        elif "unit_ids" not in batch:
            # NumPy again: PyTorch would wake a thread on every core for each of these small calls.
            can = np.isin(batch["input_ids"].numpy(), self._special.numpy(), invert=True)
            batch["eligible_counts"] = np.diff(np.concatenate([[0], can.cumsum()])[batch["cu_seqlens"].numpy()])
        return batch

    def _pad(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        inputs = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in rows[0]]
        padded = self.tokenizer.pad([{name: row[name] for name in inputs} for row in rows], return_tensors="pt",
                                    return_attention_mask=True, pad_to_multiple_of=self.pad_to_multiple_of,
                                    padding_side="right")  # fmt: skip
        batch: dict[str, Any] = dict(padded)
        batch["sample_ids"] = torch.tensor([int(row["sample_id"]) for row in rows], dtype=torch.int64)
        real = batch["attention_mask"].bool()
        if "unit_ids" in rows[0]:
            units = torch.cat([torch.as_tensor(row["unit_ids"], dtype=torch.int32) for row in rows])
            batch["unit_ids"] = torch.zeros(real.shape, dtype=torch.int32).masked_scatter_(real, units)
        if self._more_special.numel():
            batch["eligible"] = real & ~torch.isin(batch["input_ids"], self._more_special)
        elif "unit_ids" not in batch:
            batch["eligible_counts"] = (real & ~torch.isin(batch["input_ids"], self._special)).sum(1).numpy()
        return batch


def as_table_rows(dataset: Any, collate: Any) -> Any:
    """The data set a loader with this `collate_fn` should read: `TableRows` of a plain `datasets.Dataset` if `collate` packs.

    Anything else is returned as it is: a data set with a user-set format, and subclasses of either, which may override
    something.
    """
    if type(dataset) is not Dataset or type(collate) is not CMLMDataCollator or not collate.packed:
        return dataset
    names, seen = set(dataset.column_names), set(dataset.format["columns"])
    # If one of the two columns is missing, `collate` raises the error that names it.
    plain = dataset.format["type"] is None and seen == names and {"input_ids", "sample_id"} <= names
    return TableRows(dataset) if plain else dataset
