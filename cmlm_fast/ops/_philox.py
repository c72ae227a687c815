"""Philox4x32-10 (Salmon et al., SC'11) on int64 tensors that hold 32-bit words; the same bits as csrc/common/philox.h."""

from __future__ import annotations

from operator import index
from typing import Any

import torch
from torch import Tensor

from .._library import expect, is_whole

_WORD = 0xFFFFFFFF


def signed_seed(op: str, seed: Any) -> int:
    """`seed`, a signed or unsigned 64-bit integer, as the int64 with the same bits."""
    rule = "a whole number in [-2⁶³, 2⁶⁴)"
    if not isinstance(seed, int):
        expect(op, is_whole(seed), "seed", rule, seed)
        seed = int(seed)
    # Compiled code, where a changing seed is a symbol, has no integers beyond 64 bits: nothing is masked, and from 2⁶³ on
    # `index` makes the seed a constant again.
    expect(op, -(2**63) <= seed < 2**64, "seed", rule, seed)
    return index(seed) - 2**64 if seed >= 2**63 else seed


def philox(counter: Tensor, sample: Tensor, seed: int, step: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words w0..w3 (int64) of each draw.

    Args:
        counter: int64, the first counter word c (0 ≤ c < 2³²).
        sample: int64, broadcastable to `counter`: the 64-bit sample id.
        seed: 64-bit key (any Python int; only its low 64 bits are used).
        step: 32-bit step, or int64 steps broadcastable to `counter`.
    """
    if isinstance(step, Tensor):
        c0, sample, c1 = torch.broadcast_tensors(counter & _WORD, sample, step & _WORD)
    else:
        c0, sample = torch.broadcast_tensors(counter & _WORD, sample)
        c1 = torch.full_like(c0, step & _WORD)
    c2, c3 = sample & _WORD, (sample >> 32) & _WORD
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # int64 products wrap; shifting and masking the wrapped bits still gives the unsigned high and low words.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def position_shift(sample_ids: Tensor, jitter: int, seed: int, step: int) -> Tensor:
    """Offset in [0, jitter] of view 2's position ids, int64 [B]: w3·(jitter + 1) >> 32 of the draw at c = 2³² − 1."""
    words = philox(torch.full_like(sample_ids, _WORD), sample_ids, seed, step)
    return (words[3] * (jitter + 1)) >> 32
