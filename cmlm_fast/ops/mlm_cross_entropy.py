"""MLM loss at the masked positions: cross entropy of hidden · weightᵀ + bias against the vocabulary.

A composite: the matrix products are PyTorch's own (for float32 on the CPU, the faster library's; see _linear.py); between
them, the op `softmax_loss` computes loss and gradient in one pass over the logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import expect, expect_values, is_traced, no_second_derivative
from ..backends import replacement_op
from ._linear import product
from ._scores import FLOATING, IGNORE, autocast_is_on, autocast_rows, check_reduction, loss_dtype

_NAME = "mlm_cross_entropy"
_VOCABULARY_PART = 4096
_EVEN = 64  # cuBLAS multiplies matrices with 30,522 columns at a third of the rate


def mlm_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *, reduction: str = "mean"
) -> Tensor:
    """Cross entropy of an LM head's decoder over the rows whose target is not -100.

    Equivalent eager code: `F.cross_entropy(F.linear(hidden, weight, bias), target)`.

    Args:
        hidden: [N, D], the decoder's input (after the head's transform).
        weight: [V, D], the decoder's weight, in hidden's dtype (under autocast PyTorch casts hidden, weight and bias).
        bias: [V], in the same dtype, or None.
        target: int64 [N] token ids; -100 ignores the row. Ignored rows are dropped before the product, for which the host
            waits on a GPU; so a CUDA graph cannot capture it. Under torch.compile, and wherever else shapes are fixed (fake
            tensors, `make_fx`), they are multiplied and then ignored.
        reduction: "mean" over the rows not ignored, "sum", or "none".

    Returns:
        Scalar, or [N] with "none" (0 at ignored rows); float32 (float64 for float64 inputs). Without a valid row, 0
        with zero gradients.

    Raises:
        ValueError: a shape, dtype or option is invalid.
        RuntimeError: a target is outside [0, V) (checked on the CPU; on a GPU loss and gradients are NaN, or a device assert
            fails).

    >>> hidden, weight = torch.zeros(2, 4), torch.zeros(8, 4)
    >>> round(mlm_cross_entropy(hidden, weight, None, torch.tensor([3, -100])).item(), 4)  # log 8
    2.0794
    """
    parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    given = {"hidden": hidden, **parameters, "target": target}
    for name, tensor in given.items():
        expect(_NAME, isinstance(tensor, Tensor), name, "a tensor", type(tensor).__name__)
        expect(_NAME, tensor.layout is torch.strided, name, "a dense tensor", tensor.layout)
    expect(_NAME, hidden.dim() == 2, "hidden", "of shape [N, D]", list(hidden.shape))
    n, d = hidden.shape
    fits = weight.dim() == 2 and weight.shape[1] == d and weight.shape[0] >= 1
    expect(_NAME, fits, "weight", f"of shape [V >= 1, D = {d}]", list(weight.shape))
    expect(_NAME, hidden.dtype in FLOATING, "hidden", "float32, bfloat16, float16 or float64", hidden.dtype)
    if bias is not None:
        expect(_NAME, bias.shape == weight.shape[:1], "bias", f"of shape [V = {weight.shape[0]}]", list(bias.shape))
    if not autocast_is_on(hidden.device.type):
        for name, parameter in parameters.items():
            expect(_NAME, parameter.dtype == hidden.dtype, name, f"{hidden.dtype} like hidden", parameter.dtype)
    expect(_NAME, target.shape == (n,), "target", f"of shape [N] = {[n]}", list(target.shape))
    expect(_NAME, target.dtype == torch.int64, "target", "int64", target.dtype)
    for name, tensor in given.items():
        expect(_NAME, tensor.device == hidden.device, name, f"on {hidden.device} like hidden", tensor.device)
    check_reduction(_NAME, reduction)
    valid = target != IGNORE
    if is_traced() or hidden.is_meta:
        rows, labels = torch.where(valid[:, None], hidden, 0.0), target  # a NaN would spread to the gradients of all weights
    else:
        rows, labels = hidden[valid], target[valid]
        if labels.device.type == "cpu" and labels.numel():
            low, high = labels.aminmax()
            inside = int(low) >= 0 and int(high) < weight.shape[0]
            expect_values(_NAME, inside, "target", f"in [0, V = {weight.shape[0]}) or {IGNORE}", [int(low), int(high)])
    losses = head_losses(rows, weight, bias, labels)
    if reduction == "none":
        return losses if losses.shape[0] == n else losses.new_zeros(n).masked_scatter(valid, losses)
    total = losses.sum()
    return total / valid.sum().clamp_min(1) if reduction == "mean" else total


def head_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """Cross entropy of each row, [N], 0 where its target is -100; drops no row and never waits for the device."""
    softmax_loss = None if is_traced() else replacement_op("softmax_loss", hidden.device)
    if softmax_loss is not None:
        (hidden,) = autocast_rows(_NAME, hidden=hidden)
        losses: Tensor = _HeadLosses.apply(hidden, weight, bias, target, softmax_loss)
        return losses
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.to(loss_dtype(logits.dtype)), target, reduction="none", ignore_index=IGNORE)


class _HeadLosses(torch.autograd.Function):
    """weight and bias may have a dtype of their own; products run in that of hidden."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, softmax_loss: Any) -> Tensor:
        ctx.parameters, ctx.vocabulary = weight.dtype, len(weight)
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        rest = -len(weight) % _EVEN if hidden.is_cuda and hidden.element_size() == 2 else 0
        if rest:  # columns whose softmax is 0; a target among them is as invalid as one beyond
            target = torch.where(target < ctx.vocabulary, target, ctx.vocabulary + rest)
            bias = weight.new_zeros(len(weight)) if bias is None else bias
            weight, bias = F.pad(weight, (0, 0, 0, rest)), F.pad(bias, (0, rest), value=float("-inf"))
        losses, slopes = softmax_loss(product(hidden, weight, bias), target)
        ctx.save_for_backward(hidden, weight, slopes)
        out: Tensor = losses
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        no_second_derivative(_NAME)
        hidden, weight, slopes = ctx.saved_tensors
        by_hidden, by_weight, by_bias, *_ = ctx.needs_input_grad
        # Multiply the upstream gradient into the narrow operand of each product, not into the slopes [N, V]. It scales hidden
        # in its own dtype: rounded to 16 bits, it would put the same error into all rows. For the bias, it is that operand.
        of_weight, of_bias, dtype, grad = None, None, hidden.dtype, grad[:, None]
        if by_weight:
            of_weight, scaled = torch.empty_like(weight, dtype=ctx.parameters), (hidden * grad).to(dtype).T
            size = len(weight) if weight.is_cuda else _VOCABULARY_PART  # each part is widened while in the CPU's cache
            for begin in range(0, len(weight), size):
                part = slice(begin, begin + size)
                of_weight[part] = product(slopes[:, part].T, scaled)
            of_weight = of_weight[: ctx.vocabulary]
        if by_bias:
            of_bias = (grad.to(dtype).T @ slopes).to(ctx.parameters)[0, : ctx.vocabulary]
        of_hidden = (product(slopes, weight.T) * grad).to(dtype) if by_hidden else None
        return of_hidden, of_weight, of_bias, None, None
