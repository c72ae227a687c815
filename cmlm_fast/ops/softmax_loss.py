"""Cross entropy of rows of logits, and its gradient with respect to them, in the same pass.

    losses_i  = log Σ_j exp x_ij − x_(i, target_i)
    slopes_ij = exp x_ij / Σ_k exp x_ik − [j = target_i];   both 0 where target is −100

The slopes, in the logits' dtype, are what a backward pass would compute, so a float32 copy of the logits, their log-softmax
and its gradient never reach memory. Used by `mlm_cross_entropy`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._library import Contract, contracts, declare, expect, expect_values
from ._scores import FLOATING, IGNORE, loss_dtype, random_rows

_NAME = "softmax_loss"


def _check(logits: Tensor, target: Tensor) -> None:
    expect(_NAME, logits.dim() == 2 and logits.shape[1] >= 1, "logits", "of shape [N, V], V >= 1", list(logits.shape))
    expect(_NAME, logits.dtype in FLOATING, "logits", "float32, bfloat16, float16 or float64", logits.dtype)
    right = target.shape == logits.shape[:1] and target.dtype == torch.int64 and target.device == logits.device
    expect(_NAME, right, "target", f"int64 of shape [N = {logits.shape[0]}] on {logits.device}", target)


def check_values(logits: Tensor, target: Tensor) -> None:
    """Raise RuntimeError if a target is not a column."""
    vocabulary = logits.shape[1]
    good = ((target >= 0) & (target < vocabulary)) | (target == IGNORE)
    expect_values(_NAME, good.all(), "target", f"in [0, V = {vocabulary}) or {IGNORE}", target[~good].tolist()[:1])


def _reference(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    _check(logits, target)
    check_values(logits, target)
    x, valid = logits.to(loss_dtype(logits.dtype)), (target != IGNORE)[:, None]
    column = target.clamp_min(0)[:, None]
    x = x - x.amax(1, keepdim=True)  # else losses would be rounded at a logit's magnitude
    losses = torch.where(valid, torch.logsumexp(x, 1, keepdim=True) - x.gather(1, column), 0.0)[:, 0]
    slopes = torch.softmax(x, 1).scatter_add(1, column, -torch.ones_like(x[:, :1]))
    return losses, torch.where(valid, slopes, 0.0).to(logits.dtype)


def _fake(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    _check(logits, target)
    losses = logits.new_empty(logits.shape[:1], dtype=loss_dtype(logits.dtype))
    return losses, torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
    (slopes,) = ctx.saved_tensors
    return None if grad is None else (slopes * grad[:, None]).to(slopes.dtype), None


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """A vocabulary that is not a multiple of the vector width, ignored rows, large logits, all far below or above zero, a
    single peak, one column, no rows, non-contiguous views."""
    shapes = (("odd", 7, 100, 1.0), ("large", 3, 64, 30.0), ("one-column", 2, 1, 1.0), ("no-rows", 0, 5, 1.0))
    for label, rows, width, scale in shapes:
        logits = next(random_rows([(rows, width)], dtype, device, rows + width)) * scale
        yield label, (logits, torch.arange(rows, device=device) * 13 % width)
    x = next(random_rows([(6, 70)], dtype, device, 4))
    yield "below", (x - 200, torch.arange(6, device=device))
    yield "above", (x + 1000, torch.arange(6, device=device))
    yield "peak", (x.index_fill(1, torch.tensor([37], device=device), 150.0), torch.arange(34, 40, device=device))
    yield "non-contiguous", (x.T, (torch.arange(140, device=device) % 6)[::2])
    yield "ignored", (next(random_rows([(5, 40)], dtype, device, 3)), torch.tensor([1, IGNORE, 39, IGNORE, 0], device=device))


declare(_NAME, "(Tensor logits, Tensor target) -> (Tensor losses, Tensor slopes)", _reference, _fake, _setup_context, _backward)
contracts[_NAME] = Contract(_NAME, _samples, FLOATING, differentiable=(0,))
