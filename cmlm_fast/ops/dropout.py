"""Dropout whose mask is a function of a seed: nothing is saved for the backward pass, and every thread draws its own part.

    out_i = x_i · m_i / (1 − p)
    m_i   = 0 with probability p, else 1: in row r of the last dimension, at column c, the Philox word w_(c mod 4) at counter
            c div 4, step = 0, sample = r, key = seed, kept where w >= floor(p · 2³²)

The gradient is the same op applied to the upstream gradient. PyTorch's own dropout on the CPU draws in one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._library import Contract, contracts, declare, expect, op
from ._philox import philox
from ._scores import FLOATING, loss_dtype, random_rows

_NAME = "dropout"


def _check(x: Tensor, p: float, seed: int) -> None:
    expect(_NAME, x.dim() >= 1, "x", "of at least one dimension", list(x.shape))
    expect(_NAME, x.dtype in FLOATING, "x", "float32, bfloat16, float16 or float64", x.dtype)
    expect(_NAME, 0.0 <= p < 1.0, "p", "in [0, 1)", p)


def _reference(x: Tensor, p: float, seed: int) -> Tensor:
    _check(x, p, seed)
    width = x.shape[-1]
    rows = torch.arange(x.numel() // width if width else 0, device=x.device)
    words = torch.stack(philox(torch.arange((width + 3) // 4, device=x.device), rows[:, None], seed, 0), -1)
    keep = words.flatten(1)[:, :width].reshape(x.shape) >= int(p * 2.0**32)
    dtype = loss_dtype(x.dtype)
    factor = torch.tensor(1 / (1 - p), dtype=dtype, device=x.device)
    return (x.to(dtype) * torch.where(keep, factor, 0.0)).to(x.dtype).contiguous()


def _fake(x: Tensor, p: float, seed: int) -> Tensor:
    _check(x, p, seed)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.p, ctx.seed = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return op(_NAME, ctx.backend)(grad, ctx.p, ctx.seed), None, None


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Widths that are not a multiple of the vector width, three dimensions, a non-contiguous view, an empty tensor, and
    values that exceed float16 once divided by 1 - p."""
    shapes = (("wide", 3, 70, 0.1, 5), ("narrow", 9, 3, 0.5, -(2**40) - 7), ("whole", 4, 64, 0.25, 0),
              ("many-rows", 150, 6, 0.4, 2**62 + 1))  # fmt: skip
    for label, rows, width, p, seed in shapes:
        yield label, (next(random_rows([(rows, width)], dtype, device, rows)), p, seed)
    x = next(random_rows([(6, 40)], dtype, device, 1))
    yield "three-dimensions", (x.view(2, 3, 40), 0.3, 11)
    yield "non-contiguous", (x.T, 0.3, 11)
    yield "empty", (x[:0], 0.1, 0)
    yield "too-large", (torch.linspace(3e4, 6.5e4, 80, device=device).to(dtype).view(2, 40), 0.3, 2)


declare(_NAME, "(Tensor x, float p, SymInt seed) -> Tensor", _reference, _fake, _setup_context, _backward)
contracts[_NAME] = Contract(_NAME, _samples, FLOATING, differentiable=(0,), exact=True)
