"""dropout_bits in Triton: grid count/BLOCK → BLOCK bytes of eight draws, a Philox call each; nothing is read, one writer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.dropout_bits import check, threshold
from . import on_device
from ._philox import philox

_BLOCK = 256


@triton.jit(do_not_specialize=["count", "threshold"])
def draw_bits(seed, bits, count, threshold, BLOCK: tl.constexpr):
    """bits uint8 [count]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key, zero = tl.load(seed), tl.zeros((BLOCK,), tl.uint32)
    w0, w1, w2, w3 = philox(at.to(tl.uint32), zero, zero, zero, key.to(tl.uint32), (key >> 32).to(tl.uint32))
    byte = two_bits(w0, threshold) | (two_bits(w1, threshold) << 2)
    byte |= (two_bits(w2, threshold) << 4) | (two_bits(w3, threshold) << 6)
    tl.store(bits + at, byte.to(tl.uint8), mask=at < count)


@triton.jit
def two_bits(word, threshold):
    """Of the low half, then of the high one."""
    low, high = (word & 0xFFFF).to(tl.int32), (word >> 16).to(tl.int32)
    return (low >= threshold).to(tl.int32) | ((high >= threshold).to(tl.int32) << 1)


@on_device
def dropout_bits(seed: Tensor, count: int, p: float) -> Tensor:
    """The op: uint8 [count]."""
    check(seed, count, p)
    bits = torch.empty(count, dtype=torch.uint8, device=seed.device)
    if count:
        draw_bits[(triton.cdiv(count, _BLOCK),)](seed, bits, count, threshold(p), BLOCK=_BLOCK)
    return bits
