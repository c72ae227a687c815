"""info_nce in Triton: the launches of _pairs.py. Grid, tiles, bytes and sums: _scores.py and _products.py.

cross     z1 against z2, softmax over rows and (symmetric) columns in one pass: 8·B²·D operations with gradients
nt_xent   z = [z1; z2] against itself, self excluded by a token per row. The scores and their gradient are symmetric, so
          one product gives both views' gradients: 6·(2B)²·D operations
labels    as nt_xent, with the keys of a row's label as positives
Up to 64 rows (B, or 2B for nt_xent and labels; up to 32 for float32, and on sm_100 with Triton before 3.8), one launch
does all of it: _small.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._scores import check_temperature, loss_dtype
from ..ops.info_nce import _check
from . import chip, interpreted, on_device
from ._pairs import FUSED, Pairs, Side, peak_of
from ._small import info_nce_small

#: Rows whose scores fit into the registers of one block, and (BK, BD) of its tiles; float64 has none.
SMALL = {torch.float32: (32, 32, 32), torch.bfloat16: (64, 64, 32), torch.float16: (64, 64, 32)}


def most_rows(dtype: torch.dtype) -> int:
    """Most rows that one launch can take."""
    # Triton before 3.8 fails to compile a block of 64 rows for Blackwell's tensor memory (TritonNvidiaGPUOptimizeTMemLayouts).
    fails = chip().startswith("sm_10") and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
    return min(SMALL.get(dtype, (0,))[0], 32 if fails else 64)


@on_device
def info_nce(z1: Tensor, z2: Tensor, tau: Tensor, labels: Tensor | None, scheme: str, symmetric: bool, normalize: bool,
             reduction: str, z1_grad: bool, z2_grad: bool) -> tuple[Tensor, ...]:  # fmt: skip
    """The op: loss and, for "mean" and "sum", its gradients."""
    _check(z1, z2, tau, labels, scheme, symmetric, normalize, reduction, z1_grad, z2_grad)
    rows = z1.shape[0] * (1 if labels is None and scheme == "cross" else 2)
    if 0 < rows <= most_rows(z1.dtype):
        return _small(z1, z2, tau, labels, rows, symmetric, normalize, reduction, z1_grad, z2_grad)
    weight = None
    if reduction != "none":  # every row counts: the other view always has a row's label
        share = 1 / max(rows, 1) if reduction == "mean" else 1.0
        weight = torch.full((rows,), share, dtype=loss_dtype(z1.dtype), device=z1.device)
    loss, *gradients = _run(weight, z1, z2, tau, labels, scheme, symmetric, normalize, z1_grad, z2_grad)
    return (loss if weight is None else (weight * loss).sum()), *gradients


def _small(z1: Tensor, z2: Tensor, tau: Tensor, labels: Tensor | None, rows: int, symmetric: bool, normalize: bool,
           reduction: str, z1_grad: bool, z2_grad: bool) -> tuple[Tensor, ...]:  # fmt: skip
    """All of it in one launch."""
    if interpreted(z1):
        check_temperature("info_nce", tau)
    (batch, width), wanted, together = z1.shape, reduction != "none", rows > z1.shape[0]
    z1_grad, z2_grad = z1_grad and wanted, z2_grad and wanted
    z1, z2 = z1.contiguous(), z2.contiguous()
    d1, d2 = torch.empty_like(z1) if z1_grad else z1.new_empty(0), torch.empty_like(z2) if z2_grad else z2.new_empty(0)
    loss, dtau = (torch.empty_like(tau), torch.empty_like(tau)) if wanted else (tau.new_empty(rows), torch.zeros_like(tau))
    block, (_, depth, strip) = max(triton.next_power_of_2(rows), 16), SMALL[z1.dtype]
    info_nce_small[(triton.cdiv(width, strip) if z1_grad or z2_grad else 1,)](
        z1, z2, tau, None if labels is None else labels.contiguous(), loss, d1, d2, dtau,
        1 / rows if reduction == "mean" else 1.0, batch, width, together, labels is not None, symmetric and not together,
        normalize, wanted, z1_grad, z2_grad, 2.0**14 if z1.dtype == torch.float16 else 1.0, block, depth, strip, "ieee",
        tl.float64 if z1.dtype == torch.float32 else tl.float32, tl.float32, num_warps=8 if block == 64 else 4,
        num_stages=2, **FUSED,
    )  # fmt: skip
    return loss, d1, d2, dtau


@on_device
def info_nce_backward(weight: Tensor, z1: Tensor, z2: Tensor, tau: Tensor, labels: Tensor | None, scheme: str,
                      symmetric: bool, normalize: bool, z1_grad: bool,
                      z2_grad: bool) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of Σ weight_i·loss_i."""
    _check(z1, z2, tau, labels, scheme, symmetric, normalize, "none", z1_grad, z2_grad)
    return _run(weight.contiguous(), z1, z2, tau, labels, scheme, symmetric, normalize, z1_grad, z2_grad)[1:]


def _run(weight: Tensor | None, z1: Tensor, z2: Tensor, tau: Tensor, labels: Tensor | None, scheme: str,
         symmetric: bool, normalize: bool, z1_grad: bool, z2_grad: bool) -> tuple[Tensor, ...]:  # fmt: skip
    """Each row's loss, and with `weight` the gradients of the weighted sum."""
    if interpreted(z1):
        check_temperature("info_nce", tau)
    batch, empty, zero = z1.shape[0], z1.new_empty(0), torch.zeros_like(tau)
    z1_grad, z2_grad = z1_grad and weight is not None, z2_grad and weight is not None
    if batch == 0:
        d1, d2 = torch.zeros_like(z1) if z1_grad else empty, torch.zeros_like(z2) if z2_grad else empty.clone()
        return tau.new_zeros(0), d1, d2, zero
    if labels is None and scheme == "cross":
        target = torch.arange(batch, device=z1.device)
        return _cross(Pairs(z1, z2, tau, normalize, target=target, columns=symmetric), weight, z1_grad, z2_grad)
    z, index = torch.cat([z1, z2]), torch.arange(2 * batch, device=z1.device)
    other_view = (index + batch) % (2 * batch) if labels is None else None
    classes, count = (None, None) if labels is None else _classes(labels)
    pairs = Pairs(z, z, tau, normalize, target=other_view, x_token=index, y_token=index, labels=classes)
    state, _, own_score = pairs.state()
    if weight is None:
        return pairs.side(state, own_score, None, None, count).loss, empty, empty.clone(), zero
    peak = peak_of(weight)
    row = pairs.side(state, own_score, weight, peak, count)
    assert row.tau_part is not None
    dz = pairs.gradients(row, row, peak, z1_grad or z2_grad, False)[0]
    # An op's outputs must not share memory, hence the copies.
    d1, d2 = dz[:batch].clone() if z1_grad else empty, dz[batch:].clone() if z2_grad else empty.clone()
    return row.loss, d1, d2, row.tau_part.sum()


def _cross(pairs: Pairs, weight: Tensor | None, z1_grad: bool, z2_grad: bool) -> tuple[Tensor, ...]:
    rows, columns, own_score = pairs.state()
    peak = half = None
    if weight is not None:
        half = weight / 2 if pairs.columns else weight
        peak = peak_of(half)
    row = pairs.side(rows, own_score, half, peak)
    column: Side | None = pairs.side(columns, own_score, half, peak) if columns is not None else None
    loss = row.loss if column is None else (row.loss + column.loss) / 2
    if peak is None:
        empty = pairs.x.new_empty(0)
        return loss, empty, empty.clone(), torch.zeros_like(pairs.tau)
    parts: list[Any] = [side.tau_part.sum() for side in (row, column) if side is not None and side.tau_part is not None]
    return loss, *pairs.gradients(row, column, peak, z1_grad, z2_grad), sum(parts[1:], parts[0])


def _classes(labels: Tensor) -> tuple[Tensor, Tensor]:
    """[2B] int32, equal where labels are, and how many other rows of both views carry a row's label; at least 1."""
    order = labels.sort().values
    first, last = torch.searchsorted(order, labels), torch.searchsorted(order, labels, right=True)
    return first.to(torch.int32).repeat(2), (2 * (last - first) - 1).repeat(2)
