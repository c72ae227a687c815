"""Encode both views of a batch in one pass, padded or packed end to end."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Lengths, packing_of

#: The number of rows in the encoder and the LM head is rounded up to a multiple of this.
ROUND = 32


def encode_padded(encoder: Any, view1: Tensor, view2: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None,
                  jitter: Tensor | None, first: int | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Last hidden states [B·L, D] of both views, encoded as one batch of 2B.

    Args:
        encoder: `base_model` of a masked LM.
        view1, view2, attention_mask, token_type_ids, jitter: as in `CMLMModel.forward`.
        first: id of the first position; None lets the encoder count positions.
    """
    inputs: dict[str, Any] = {"attention_mask": attention_mask.repeat(2, 1), "return_dict": True}  # overrides the config
    if (types := known_types(encoder, token_type_ids)) is not None:
        inputs["token_type_ids"] = types.repeat(2, 1)
    if first is not None:
        position = (attention_mask.cumsum(1) - 1).clamp_min(0) + first
        inputs["position_ids"] = torch.cat([position, position if jitter is None else position + jitter[:, None]])
    hidden = encoder(input_ids=torch.cat([view1, view2]), **inputs).last_hidden_state
    hidden1, hidden2 = hidden.flatten(0, 1).chunk(2)
    return hidden1, hidden2


def encode_packed(encoder: Any, view1: Tensor, view2: Tensor, cu_seqlens: Tensor, lengths: Lengths,
                  token_type_ids: Tensor | None, jitter: Tensor | None, first: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Last hidden states [T, D] of both views, encoded as one row of 2T: all of view 1, then all of view 2.

    Arguments as for `encode_padded`.
    """
    tokens = view1.numel()
    position = positions(cu_seqlens, tokens) + first
    shifted = position
    if jitter is not None:
        shifted = position + torch.repeat_interleave(jitter, cu_seqlens.diff().long(), output_size=tokens)
    types = None if token_type_ids is None else token_type_ids.repeat(2)
    twice = torch.cat([cu_seqlens, cu_seqlens[1:] + tokens])
    states = encode_row(encoder, torch.cat([view1, view2]), twice, np.tile(lengths, 2), types, torch.cat([position, shifted]))
    hidden1, hidden2, *_ = states.split(tokens)  # its gradient takes one pass; slices would take one each
    return hidden1, hidden2


def encode_row(encoder: Any, input_ids: Tensor, cu_seqlens: Tensor, lengths: Lengths, token_type_ids: Tensor | None,
               position_ids: Tensor) -> Tensor:  # fmt: skip
    """Last hidden states of sequences packed end to end to [T], followed by fewer than ROUND padding rows.

    One extra sequence rounds the row up, so that a library that prepares a kernel per shape (oneDNN) sees few shapes.
    """
    rest = -input_ids.numel() % ROUND
    inputs = {"input_ids": input_ids, "position_ids": position_ids}
    if (types := known_types(encoder, token_type_ids)) is not None:
        inputs["token_type_ids"] = types
    lengths = tuple(map(int, lengths))
    if rest:
        inputs = {name: F.pad(value, (0, rest)) for name, value in inputs.items()}
        lengths, cu_seqlens = (*lengths, rest), torch.cat([cu_seqlens, cu_seqlens[-1:] + rest])
    inputs = {name: value[None] for name, value in inputs.items()}
    states: Tensor = encoder(packing=packing_of(lengths, cu_seqlens), return_dict=True, **inputs).last_hidden_state
    return states.squeeze(0)


def known_types(encoder: Any, token_type_ids: Tensor | None) -> Tensor | None:
    """None for an encoder with one token type: a BERT-style tokenizer numbers the texts of a pair regardless."""
    return None if getattr(encoder.config, "type_vocab_size", 2) < 2 else token_type_ids


def positions(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Position of each token in its sequence, from 0; int64 [tokens]."""
    begins = torch.repeat_interleave(cu_seqlens[:-1].long(), cu_seqlens.diff().long(), output_size=tokens)
    return torch.arange(tokens, device=cu_seqlens.device) - begins


def row_bounds(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of a padded batch [B, L] as one row of B·L: where each sequence begins, int32 [B + 1], and its first token."""
    batch, length = attention_mask.shape
    begins = torch.arange(batch + 1, dtype=torch.int32, device=attention_mask.device) * length
    return begins, begins[:-1] + attention_mask.long().argmax(1)  # not 0 with pads on the left
