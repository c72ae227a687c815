"""Rows of token ids to a padded or packed batch, and what the mask op must know of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ._errors import check_tokenizer, fail

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
    """Rows of `tokenize_texts` to one batch of plain tensors: B rows padded to L tokens, or packed end to end to T.

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

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if rows:
            if "sample_id" not in rows[0]:
                raise fail("CMLMDataCollator", "rows", "those of tokenize_texts, with a sample_id", f"columns {list(rows[0])}")
            return self._pack(rows) if self.packed else self._pad(rows)
        nothing = {"input_ids": [self.tokenizer.mask_token_id], "attention_mask": [1], "sample_id": 0}
        return {**(self._pack([nothing]) if self.packed else self._pad([nothing])), "stand_in": True}

    def _pack(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows = sorted(rows, key=lambda row: -len(row["input_ids"]))  # stable: equal lengths keep their order
        lengths = np.array([len(row["input_ids"]) for row in rows])
        # NumPy takes a fifth of the time that a tensor for each row does.
        dtypes = {"input_ids": np.int64, "token_type_ids": np.int64, "unit_ids": np.int32}
        batch: dict[str, Any] = {
            name: torch.from_numpy(np.concatenate([np.asarray(row[name], dtype) for row in rows]))
            for name, dtype in dtypes.items() if name in rows[0]
        }  # fmt: skip
        batch["cu_seqlens"] = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
        batch["lengths"] = lengths
        batch["sample_ids"] = torch.tensor([int(row["sample_id"]) for row in rows], dtype=torch.int64)
        if self._more_special.numel():
            batch["eligible"] = ~torch.isin(batch["input_ids"], self._more_special)
        elif "unit_ids" not in batch:
            can = ~torch.isin(batch["input_ids"], self._special)
            before = torch.nn.functional.pad(can.cumsum(0), (1, 0))[batch["cu_seqlens"].long()]
            batch["eligible_counts"] = before.diff().numpy()
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
