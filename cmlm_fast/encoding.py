"""Both views of a batch through an encoder in one pass, padded or packed end to end."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attention import Lengths, packing_of
from .ops._rows import take_rows

#: The rows of the encoder and of the LM head are rounded up to a multiple of this.
ROUND = 32


def encode_padded(encoder: Any, view1: Tensor, view2: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None,
                  jitter: Tensor | None, first: int | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Last hidden states [B·L, D] of both views, the rows of one batch of 2B.

    Args:
        encoder: `base_model` of a masked LM.
        view1, view2, attention_mask, token_type_ids, jitter: as `CMLMModel.forward` takes them.
        first: the id of the first position; None lets the encoder count positions.
    """
    inputs: dict[str, Tensor] = {"attention_mask": attention_mask.repeat(2, 1)}
    if token_type_ids is not None:
        inputs["token_type_ids"] = token_type_ids.repeat(2, 1)
    if first is not None:
        position = (attention_mask.cumsum(1) - 1).clamp_min(0) + first
        inputs["position_ids"] = torch.cat([position, position if jitter is None else position + jitter[:, None]])
    hidden = encoder(input_ids=torch.cat([view1, view2]), **inputs).last_hidden_state
    hidden1, hidden2 = hidden.flatten(0, 1).chunk(2)
    return hidden1, hidden2


def encode_packed(encoder: Any, view1: Tensor, view2: Tensor, cu_seqlens: Tensor, lengths: Lengths,
                  token_type_ids: Tensor | None, jitter: Tensor | None, first: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Last hidden states [T, D] of both views: each sequence's view 2 stands right behind its view 1, in one row of 2T.

    One more sequence rounds the row up: a library that prepares a kernel for each new shape (oneDNN) then meets few.
    Arguments as for `encode_padded`.
    """
    length = cu_seqlens.diff().long()
    sequence = torch.repeat_interleave(length, output_size=view1.numel())
    before = cu_seqlens[:-1].long()[sequence]
    position = torch.arange(view1.numel(), device=view1.device) - before
    at1 = before + before + position
    at2 = at1 + length[sequence]
    rest = -2 * view1.numel() % ROUND

    def interleave(one: Tensor, two: Tensor, fill: int = 0) -> Tensor:
        both = one.new_empty(2 * one.numel() + rest)
        both[2 * one.numel() :] = fill
        return both.scatter_(0, at1, one).scatter_(0, at2, two)[None]

    position = position + first
    inputs = {"position_ids": interleave(position, position if jitter is None else position + jitter[sequence], first)}
    if token_type_ids is not None:
        inputs["token_type_ids"] = interleave(token_type_ids, token_type_ids)
    twice = (*np.repeat(lengths, 2).tolist(), *([rest] if rest else []))
    cu_twice = torch.cat([cu_seqlens[:-1] * 2, cu_seqlens[:-1] + cu_seqlens[1:]]).view(2, -1).T.flatten()
    cu_twice = torch.cat([cu_twice, cu_seqlens[-1:] * 2, *([cu_seqlens[-1:] * 2 + rest] if rest else [])])
    hidden = encoder(input_ids=interleave(view1, view2), packing=packing_of(twice, cu_twice), **inputs)
    states = hidden.last_hidden_state.squeeze(0)
    return take_rows(states, at1), take_rows(states, at2)


def row_bounds(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of a padded batch [B, L], seen as one row of B·L: where each sequence's begins, int32 [B + 1], and its first token."""
    batch, length = attention_mask.shape
    begins = torch.arange(batch + 1, dtype=torch.int32, device=attention_mask.device) * length
    return begins, begins[:-1] + attention_mask.long().argmax(1)  # not 0 where pads stand on the left
