"""Row gather by an index without repeats, and means over runs of rows: a row's gradient is written once, not accumulated."""

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
    """rows[index]; rows [N, D], index int64 [M] without repeats."""
    out: Tensor = _TakeRows.apply(rows, index)
    return out


class _MeanRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counted: Tensor, bounds: Tensor) -> Tensor:
        bounds = bounds.long()
        wide = torch.promote_types(rows.dtype, torch.float32)
        parts = (torch.where(counted[:, None], rows, 0).to(wide), counted.to(wide)[:, None])
        total, count = (torch.segment_reduce(part, "sum", offsets=bounds, initial=0) for part in parts)
        count = count.clamp_min_(1)
        ctx.save_for_backward(counted, bounds, count)
        return (total / count).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        counted, bounds, count = ctx.saved_tensors
        share = torch.nn.functional.pad((grad / count).to(grad.dtype), (0, 0, 0, 1))  # a row of zeros, for rows not counted
        run = torch.repeat_interleave(bounds.diff(), output_size=counted.numel())
        return share[torch.where(counted, run, len(grad))], None, None


def mean_rows(rows: Tensor, counted: Tensor, bounds: Tensor) -> Tensor:
    """Means [B, D] over runs of rows [N, D], of the rows that are `counted`, bool [N]; zeros for a run without any.

    Run b starts at bounds[b]; bounds: int [B + 1], from 0 to N. Sums are at least float32.
    """
    out: Tensor = _MeanRows.apply(rows, counted, bounds)
    return out
