"""Rows of a matrix by an index without repeats: the gradient is written to its rows, not added up one after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = rows.shape[0]
        return rows[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        whole = grad.new_zeros(ctx.count, *grad.shape[1:])
        whole[index] = grad
        return whole, None


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index]; rows [N, D], index int64 [M] of different numbers."""
    out: Tensor = _TakeRows.apply(rows, index)
    return out
