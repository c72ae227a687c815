"""Attention over sequences packed end to end, registered with transformers as `cmlm_varlen`.

A packed call carries `packing`, the locations of its sequences; in each view, sequences of equal length are adjacent. Without
it the call is an ordinary padded one and goes to transformers' own SDPA. Kernels that run a packed call:

    CPU; CUDA with Triton, if no sequence is longer than SHORT and no head's row takes more than NARROW bytes
                    the op varlen_attention, unless a named backend has no kernel for it, or none that was built
    CUDA from compute capability 8.0 on, 16-bit dtypes
                    flash attention, one launch for all sequences
    else            F.scaled_dot_product_attention, one call for all sequences of one length: no padding
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from .backends import replacement_op
from .ops import varlen_attention
from .ops.varlen_attention import tile_row_bytes

NAME = "cmlm_varlen"

logger = logging.get_logger(__name__)

#: Most tokens at which the op's tiles waste less than those of flash attention, which are 128 tokens long; and most bytes of a
#: head's row at which its backward kernel spills no registers on sm_90.
SHORT, NARROW = 128, 256


#: Number of tokens in each sequence of a packed batch, on the host.
Lengths = Sequence[int] | np.ndarray


class Packing:
    """Locations of a packed batch's sequences: `lengths` and `longest` on the host; `cu_seqlens`, int32 [B + 1], on the device.

    A class, not a tuple: torch.compile recompiles when numbers that compiled layers read change.
    """

    def __init__(self, lengths: tuple[int, ...], cu_seqlens: Tensor) -> None:
        self.lengths, self.cu_seqlens, self.longest = lengths, cu_seqlens, max(lengths, default=0)


class PackingForOp(Packing):
    """Packing that suits the op varlen_attention. A class, since a flag would not tell compiled layers apart."""


def packing_of(lengths: tuple[int, ...], cu_seqlens: Tensor) -> Packing:
    """The packing of a batch."""
    short = cu_seqlens.device.type == "cpu" or max(lengths, default=0) <= SHORT
    fits = short and replacement_op("varlen_attention", cu_seqlens.device) is not None
    return (PackingForOp if fits else Packing)(lengths, cu_seqlens)


def use_packed_attention(lm: Any) -> bool:
    """Let a masked LM take packed batches; False if its attention cannot be replaced."""
    if not getattr(lm, "_supports_attention_backend", False) or not getattr(lm, "_supports_sdpa", False):
        return False
    lm.config.output_attentions = False  # none are made, and transformers would not save a configuration that requests them
    lm.set_attn_implementation(NAME)
    return True


def attention_forward(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                      scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
                      packing: Packing | None = None, **options: Any) -> tuple[Tensor, None]:  # fmt: skip
    """query, key, value [1, heads, T, D] of packed sequences; returns [1, T, heads, D].

    Args:
        sliding_window: positions i, j attend to each other if |i − j| < sliding_window.
        packing: the sequences' locations; None for a padded batch, [B, heads, L, D] with its `attention_mask`.
    """
    if options.get("output_attentions"):
        logger.warning_once("cmlm_varlen attention returns no attention maps; load another copy for output_attentions")
    if packing is None:
        if attention_mask is None and sliding_window is not None:
            attention_mask = _band(query.shape[2], sliding_window, query.device)
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                        is_causal=False)  # fmt: skip
        return out, None
    if not isinstance(packing, PackingForOp) or (query.is_cuda and tile_row_bytes(query) > NARROW):
        return _by_torch(query, key, value, packing, scaling, dropout, sliding_window), None
    q, k, v = map(_rows, (query, key, value))
    backend = "triton" if q.is_cuda else None  # no other backend has kernels there
    # The seed is drawn from the device's default generator, whose state checkpoints save and activation checkpointing replays.
    out = varlen_attention(q, k, v, packing.cu_seqlens, scale=scaling, dropout=dropout, window=sliding_window or 0,
                           backend=backend)  # fmt: skip
    return out[None], None


def _rows(x: Tensor) -> Tensor:
    """[1, heads, T, D] to [T, heads, D]; the gradient of x[0] would be a copy into zeros."""
    return x.squeeze(0).transpose(0, 1)


@torch.compiler.disable  # compiled code would fit these lengths alone; and dropout's seed is not a tensor
def _by_torch(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, dropout: float,
              sliding_window: int | None) -> Tensor:  # fmt: skip
    """Like `attention_forward`, with PyTorch's kernels."""
    q, k, v = map(_rows, (query, key, value))
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] in range(8, 257, 8) and _has_flash(q.device):
        return _flash(q, k, v, packing.cu_seqlens, packing.longest, scaling, dropout, sliding_window)[None]
    runs: dict[int, list[tuple[int, int]]] = {}  # length -> (first token, number of sequences) of each run
    begin = 0
    for length, run in groupby(packing.lengths):
        count = len(list(run))
        if length:
            runs.setdefault(length, []).append((begin, count))
        begin += count * length
    if not runs:
        return q[None]
    parts: dict[int, Tensor] = {}
    for length, found in runs.items():
        sizes = [count * length for _, count in found]
        rows = [slice(begin, begin + size) for (begin, _), size in zip(found, sizes, strict=True)]
        shape = (sum(count for _, count in found), length)
        qs, ks, vs = (torch.cat([x[each] for each in rows]).unflatten(0, shape).transpose(1, 2) for x in (q, k, v))
        mask = None if sliding_window is None or length <= sliding_window else _band(length, sliding_window, q.device)
        part = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask, dropout_p=dropout, scale=scaling)
        parts |= zip((each.start for each in rows), part.transpose(1, 2).flatten(0, 1).split(sizes), strict=True)
    return torch.cat([parts[begin] for begin in sorted(parts)])[None]


@cache
def _has_flash(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scaling: float | None, dropout: float,
           sliding_window: int | None) -> Tensor:  # fmt: skip
    """PyTorch's own flash attention: its `varlen_attn` or, for dropout, which that lacks, the op below it."""
    reach = -1 if sliding_window is None else sliding_window - 1
    if dropout == 0.0:
        from torch.nn.attention.varlen import varlen_attn

        out: Any = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scaling, window_size=(reach, reach))
        return cast(Tensor, out)
    forward = torch.ops.aten._flash_attention_forward
    return cast(Tensor, forward(q, k, v, cu_seqlens, cu_seqlens, longest, longest, dropout, False, False, scale=scaling,
                                window_size_left=reach, window_size_right=reach)[0])  # fmt: skip


def _band(length: int, sliding_window: int, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device)
    return (position[:, None] - position).abs() < sliding_window


def _mask(*args: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """A packed batch has no mask; a padded one has SDPA's."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **options)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, _mask)
