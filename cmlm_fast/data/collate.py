"""Rows of token ids to a padded or packed batch, and what the mask op must know of a tokenizer."""

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

_MAX_SPECIAL_IDS = 16  # `complementary_mask` takes as many


def _special_ids(tokenizer: Any) -> list[int]:
    named = [getattr(tokenizer, f"{kind}_token_id", None) for kind in ("cls", "sep", "pad", "mask", "bos", "eos")]
    others = [i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id]
    return list(dict.fromkeys(i for i in (*named, *others) if i is not None))


def mask_settings(tokenizer: Any) -> dict[str, Any]:
    """What `complementary_mask` asks of a tokenizer: mask_token_id, vocab_size and special_ids (a tuple, at most 16).

    vocab_size is the largest id + 1, which is len(tokenizer) unless ids have gaps. special_ids are cls, sep, pad, mask,
    bos, eos and the tokenizer's extra special tokens; where these are more than 16, `CMLMDataCollator` marks the rest
    as not eligible. The unknown token is not among them: an unknown word is a word of the text.

    Example:
        >>> mask_settings(bert_tokenizer)
        {'mask_token_id': 103, 'vocab_size': 30522, 'special_ids': (101, 102, 0, 103)}
    """
    check_tokenizer(tokenizer, "mask_settings")
    return {"mask_token_id": tokenizer.mask_token_id, "vocab_size": max(tokenizer.get_vocab().values()) + 1,
            "special_ids": tuple(_special_ids(tokenizer)[:_MAX_SPECIAL_IDS])}  # fmt: skip


@dataclass
class CMLMDataCollator:
    """Rows of `tokenize_texts`, a list or a `pyarrow.Table`, to one batch of plain tensors: B rows padded to L tokens, or
    packed end to end to T.

    Padded: input_ids, attention_mask and (where present) token_type_ids int64 [B, L], padded on the right, whatever the
    tokenizer's side, so that masks and positions are those of the text alone; sample_ids int64 [B]; unit_ids int32 [B, L], 0
    at pads, where the rows have them; eligible bool [B, L] only for a tokenizer of more than 16 special tokens. Masks are
    made later, on the device.

    Packed: the same of shape [T] without attention_mask, the longest sequence first; cu_seqlens int32 [B + 1], sequence b
    is [cu_seqlens[b], cu_seqlens[b + 1]); lengths, B ints.

    Both hold eligible_counts, B ints, where each token is masked for itself (no unit_ids, no eligible): from them the host
    knows how many tokens exact sampling masks. They and lengths are NumPy arrays: whoever moves a batch to a device would look
    at each number of a tuple.

    No rows (a rank's share of a round that has too few, see `RankShare`) become one sequence of a special token, and the entry
    stand_in = True: the encoder runs as on every rank, and nothing of it counts.

    Args:
        tokenizer: the tokenizer of `tokenize_texts`.
        pad_to_multiple_of: round L up to a multiple of this.
        packed: pack, for a `CMLMModel` whose encoder takes packed batches.

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
            # By NumPy, too: PyTorch would wake a thread on each core for each of these small calls.
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


def by_table(dataset: Any, collate: Any) -> Any:
    """What a loader with this `collate_fn` reads: a `datasets.Dataset` without a format of its user's by `TableRows`, where
    `collate` packs; any other, and subclasses of both, which may do something of their own, as it is."""
    if type(dataset) is not Dataset or type(collate) is not CMLMDataCollator or not collate.packed:
        return dataset
    names, seen = set(dataset.column_names), set(dataset.format["columns"])
    # Without one of the two columns `collate` says what is missing.
    plain = dataset.format["type"] is None and seen == names and {"input_ids", "sample_id"} <= names
    return TableRows(dataset) if plain else dataset
