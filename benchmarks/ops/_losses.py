"""What the losses share: a call runs forward and backward and returns loss and gradients; float64 is the ground truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cmlm_fast.testing import ROUNDING, error

from ..registry import Call, Wrong

#: Errors allowed to providers that are not ours: they may round in their own way, but not compute another formula.
LOOSE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-9}


def leaf(rows: int, d: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A Gaussian matrix [rows, d] that requires gradients."""
    return torch.randn(rows, d).to(device, dtype).requires_grad_()


def training(loss: Callable[..., Tensor], leaves: Sequence[Tensor]) -> Call:
    """A call that runs `loss(*leaves)` forward and backward and returns [loss, *gradients]."""

    def call() -> list[Tensor | None]:
        value = loss(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True)]

    return call


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for any size: measured to be as fast here as one compilation per size, and done once."""
    return torch.compile(function, dynamic=True)


def truth(part: Callable[..., Tensor], rows: int, columns: int, leaves: Sequence[Tensor]) -> list[Tensor]:
    """[loss, *gradients] in float64.

    `part(rows, *leaves)` is a slice of rows' share in the loss; slices keep the matrix of `columns` under 256 MB.
    """
    wide = [x.detach().double().requires_grad_() for x in leaves]
    sums = [torch.zeros((), dtype=torch.float64, device=wide[0].device), *(torch.zeros_like(x) for x in wide)]
    step = max(1, 2**25 // max(columns, 1))
    for begin in range(0, rows, step):
        loss = part(slice(begin, min(begin + step, rows)), *wide)
        for total, value in zip(sums, [loss.detach(), *torch.autograd.grad(loss, wide)], strict=True):
            total += value.detach()
    return sums


class Check:
    """Compares answers with float64: ours may have twice eager's error, others `LOOSE`. Eager's is measured when needed."""

    def __init__(self, exact: Callable[[], list[Tensor]], eager: Call | None, dtype: torch.dtype) -> None:
        self.exact, self.eager, self.dtype = cache(exact), eager, dtype
        self.eager_error = cache(lambda: None if eager is None else self.distance(eager()))

    def distance(self, answer: Sequence[Tensor | None]) -> float:
        """The largest relative error of the loss and the gradients; an input without gradient is not compared."""
        pairs = zip(answer, self.exact(), strict=True)
        return max(error(value.double(), exact) for value, exact in pairs if value is not None)

    def __call__(self, name: str, answer: Sequence[Tensor | None]) -> tuple[float, float | None]:
        if name.startswith("ours/") and any(value is None for value in answer):
            raise Wrong(f"{name}: a gradient is missing")
        got, eager = self.distance(answer), self.eager_error()
        bound = LOOSE[self.dtype]
        if name.startswith("ours/") and eager is not None:
            bound = 2 * eager + ROUNDING[self.dtype]
        if not got <= bound:
            raise Wrong(f"{name}: error {got:.3g} against float64, at most {bound:.3g} is right (eager's: {eager})")
        return got, eager


def products(x: Tensor, y: Tensor) -> Call:
    """The three matrix products that a loss of x [N, D] against y [M, D] cannot avoid: scores, both gradients."""
    x, y = x.detach(), y.detach()
    p = torch.randn(x.shape[0], y.shape[0], device=x.device).to(x.dtype)
    return lambda: (x @ y.T, p @ y, p.T @ x)


def loss_traffic(leaves: Sequence[Tensor]) -> float:
    """Bytes of the inputs, read once, and of their gradients, written once."""
    return float(sum(2 * x.numel() * x.element_size() for x in leaves))
