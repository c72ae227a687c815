"""info_nce in Triton: the launches of _pairs.py. Grid, tiles, bytes and sums: _scores.py and _products.py.

cross     z1 against z2, softmax over rows and (symmetric) columns of one pass: 8·B²·D operations with gradients
nt_xent   z = [z1; z2] against itself, self excluded by a token of its own. The scores and their gradient are symmetric,
          so one product makes both views' gradients: 6·(2B)²·D operations
labels    as nt_xent, with the keys of a row's label as positives
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops._scores import check_temperature, loss_dtype
from ..ops.info_nce import _check
from . import interpreted, on_device
from ._pairs import Pairs, Side, peak_of


@on_device
def info_nce(z1: Tensor, z2: Tensor, tau: Tensor, labels: Tensor | None, scheme: str, symmetric: bool, normalize: bool,
             reduction: str, z1_grad: bool, z2_grad: bool) -> tuple[Tensor, ...]:  # fmt: skip
    """The op: loss and, for "mean" and "sum", its gradients."""
    _check(z1, z2, tau, labels, scheme, symmetric, normalize, reduction, z1_grad, z2_grad)
    rows = z1.shape[0] * (1 if labels is None and scheme == "cross" else 2)
    weight = None
    if reduction != "none":  # every row counts: the other view always has a row's label
        share = 1 / max(rows, 1) if reduction == "mean" else 1.0
        weight = torch.full((rows,), share, dtype=loss_dtype(z1.dtype), device=z1.device)
    loss, *gradients = _run(weight, z1, z2, tau, labels, scheme, symmetric, normalize, z1_grad, z2_grad)
    return (loss if weight is None else (weight * loss).sum()), *gradients


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
    twice, count = (None, None) if labels is None else (torch.cat([labels, labels]), _others_of_label(labels))
    pairs = Pairs(z, z, tau, normalize, target=other_view, x_token=index, y_token=index, labels=twice)
    state, _, own_score = pairs.state()
    if weight is None:
        return pairs.side(state, own_score, None, None, count).loss, empty, empty.clone(), zero
    peak = peak_of(weight)
    row = pairs.side(state, own_score, weight, peak, count)
    assert row.tau_part is not None
    dz = pairs.gradients(row, row, peak, z1_grad or z2_grad, False)[0]
    # An op's outputs are tensors of their own, hence the copies.
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


def _others_of_label(labels: Tensor) -> Tensor:
    """[2B]: how many other rows of both views carry a row's label; at least 1."""
    order = labels.sort().values
    same = torch.searchsorted(order, labels, right=True) - torch.searchsorted(order, labels)
    return (2 * same - 1).repeat(2)
