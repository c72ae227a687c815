"""Which numbers dropout keeps, a bit for each: what torch.compile would draw as a word of 32 bits for each number.

    bit b of byte n = 1 where half b of the Philox words at counter n, step = 0, sample = 0, key = seed is >= round(p · 2¹⁶)

The halves of a word w_i are its low 16 bits (b = 2i) and its high ones (b = 2i + 1); a number is dropped with probability
round(p · 2¹⁶) / 2¹⁶, `exact_rate(p)`. Used by `layers.Dropout` inside compiled layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._library import Contract, contracts, declare, expect
from ._philox import philox

_NAME = "dropout_bits"


def threshold(p: float) -> int:
    """Halves below it are of dropped numbers; some are kept whatever p is."""
    return min(int(p * 2.0**16 + 0.5), 2**16 - 1)


def exact_rate(p: float) -> float:
    """The share that is dropped for p."""
    return threshold(p) / 2.0**16


def check(seed: Tensor, count: int, p: float) -> None:
    """Raise ValueError where an argument breaks its rule."""
    expect(_NAME, seed.dim() == 0 and seed.dtype == torch.int64, "seed", "an int64 tensor of no dimension", seed)
    expect(_NAME, count >= 0, "count", ">= 0", count)
    expect(_NAME, 0.0 <= p < 1.0, "p", "in [0, 1)", p)


def _reference(seed: Tensor, count: int, p: float) -> Tensor:
    check(seed, count, p)
    at = torch.arange(count, device=seed.device)
    words = torch.stack(philox(at, torch.zeros_like(at), int(seed), 0), -1)
    halves = torch.stack([words & 0xFFFF, words >> 16], -1).view(count, 8)
    places = torch.arange(8, device=seed.device)
    return ((halves >= threshold(p)).long() << places).sum(-1).to(torch.uint8)


def _fake(seed: Tensor, count: int, p: float) -> Tensor:
    check(seed, count, p)
    return seed.new_empty(count, dtype=torch.uint8)


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Counts that are no multiple of a block, one, and none; seeds of both signs; everything kept, and nearly nothing."""
    cases = (("odd-bits", -(2**40) - 7, 1234, 0.1), ("half", 5, 1, 0.5), ("all", 1, 9, 0.0), ("rare", 7, 600, 0.9999999),
             ("none", 0, 0, 0.1))  # fmt: skip
    for label, seed, count, p in cases:
        yield label, (torch.tensor(seed, dtype=dtype, device=device), count, p)


declare(_NAME, "(Tensor seed, SymInt count, float p) -> Tensor", _reference, _fake)
contracts[_NAME] = Contract(_NAME, _samples, (torch.int64,), exact=True)
