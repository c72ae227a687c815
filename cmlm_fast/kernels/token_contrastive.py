"""token_contrastive in Triton: the launches of _pairs.py with targets, ranges and tokens.

Grid, tiles, bytes, sums and determinism: see _scores.py and _products.py. 8·N·M·D operations with gradients,
2·N·M·D without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops._scores import IGNORE, check_temperature, loss_dtype, reduction_weight
from ..ops.token_contrastive import _check, check_target
from . import interpreted, on_device
from ._pairs import Pairs, peak_of


@on_device
def token_contrastive(query: Tensor, key: Tensor, target: Tensor, tau: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The op: loss and, for "mean" and "sum", its gradients."""
    *options, normalize, reduction, query_grad, key_grad = rest
    _check(query, key, target, tau, *rest)
    _check_values(query, key, target, tau)
    wanted = reduction != "none"
    weight = reduction_weight(target != IGNORE, reduction, loss_dtype(query.dtype)) if wanted else None
    loss, dq, dk, dt = _run(weight, query, key, target, tau, options, normalize, query_grad, key_grad)
    return (loss if weight is None else (weight * loss).sum()), dq, dk, dt


@on_device
def token_contrastive_backward(weight: Tensor, query: Tensor, key: Tensor, target: Tensor, tau: Tensor,
                               *rest: Any) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of Σ weight_i·loss_i."""
    *options, normalize, query_grad, key_grad = rest
    _check(query, key, target, tau, *[*options, normalize, "none", query_grad, key_grad])
    _check_values(query, key, target, tau)
    return _run(weight.contiguous(), query, key, target, tau, options, normalize, query_grad, key_grad)[1:]


def _check_values(query: Tensor, key: Tensor, target: Tensor, tau: Tensor) -> None:
    if interpreted(query):
        check_target("token_contrastive", target, key.shape[0])
        check_temperature("token_contrastive", tau)


def _run(weight: Tensor | None, query: Tensor, key: Tensor, target: Tensor, tau: Tensor, options: list[Any],
         normalize: bool, query_grad: bool, key_grad: bool) -> tuple[Tensor, ...]:  # fmt: skip
    """Each row's loss, and with `weight` the gradients of the weighted sum."""
    query_grad, key_grad = query_grad and weight is not None, key_grad and weight is not None
    empty, zero = query.new_empty(0), torch.zeros_like(tau)
    if query.shape[0] == 0 or key.shape[0] == 0:
        dq = query.new_zeros(query.shape) if query_grad else empty
        dk = key.new_zeros(key.shape) if key_grad else empty.clone()
        return tau.new_zeros(query.shape[0]), dq, dk, zero
    start, end, *tokens = options
    pairs = Pairs(query, key, tau, normalize, target=target, start=start, end=end, x_token=tokens[0], y_token=tokens[1])
    state, _, own_score = pairs.state()
    if weight is None:
        return pairs.side(state, own_score, None, None).loss, empty, empty.clone(), zero
    peak = peak_of(weight)
    row = pairs.side(state, own_score, weight, peak)
    assert row.tau_part is not None
    return row.loss, *pairs.gradients(row, None, peak, query_grad, key_grad), row.tau_part.sum()
