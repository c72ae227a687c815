"""MLM loss at the masked positions: cross entropy of hidden · weightᵀ + bias against the vocabulary.

A composite of PyTorch's own functions: on the CPU, `F.linear` + `F.cross_entropy` on gathered rows is within 1.4 × of its
three matrix products, and chunked `F.linear_cross_entropy` is slower; there is no kernel of ours to choose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import expect, expect_values
from ._scores import IGNORE, loss_dtype
from .token_contrastive import check_reduction

_NAME = "mlm_cross_entropy"


def mlm_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *, reduction: str = "mean"
) -> Tensor:
    """Cross entropy of the LM head's decoder at the rows whose target is not -100.

    Args:
        hidden: [N, D] rows that go into the decoder (after the head's transform).
        weight: [V, D] decoder weight, hidden's dtype (under autocast PyTorch casts both).
        bias: [V] or None.
        target: int64 [N] token ids; -100 ignores the row. Ignored rows are dropped before the product; under
            torch.compile, where shapes stay fixed, they are multiplied and then ignored.
        reduction: "mean" over rows not ignored, "sum", or "none".

    Returns:
        Scalar, or [N] with "none" (0 at ignored rows); float32 (float64 for float64). No valid row: 0, zero gradients.

    Raises:
        ValueError: a shape, dtype or option breaks its rule.
        RuntimeError: a target outside [0, V) (checked on the CPU).

    >>> hidden, weight = torch.zeros(2, 4), torch.zeros(8, 4)
    >>> round(mlm_cross_entropy(hidden, weight, None, torch.tensor([3, -100])).item(), 4)  # log 8
    2.0794
    """
    expect(_NAME, hidden.dim() == 2, "hidden", "of shape [N, D]", list(hidden.shape))
    n, d = hidden.shape
    expect(_NAME, weight.dim() == 2 and weight.shape[1] == d, "weight", f"of shape [V, D = {d}]", list(weight.shape))
    if bias is not None:
        expect(_NAME, bias.shape == weight.shape[:1], "bias", f"of shape [V = {weight.shape[0]}]", list(bias.shape))
    expect(_NAME, target.shape == (n,), "target", f"of shape [N = {n}]", list(target.shape))
    expect(_NAME, target.dtype == torch.int64, "target", "int64", target.dtype)
    check_reduction(_NAME, reduction)
    valid = target != IGNORE
    if torch.compiler.is_compiling():
        rows, labels = hidden, target
    else:
        rows, labels = hidden[valid], target[valid]
        if labels.device.type == "cpu" and labels.numel():
            low, high = labels.aminmax()
            inside = int(low) >= 0 and int(high) < weight.shape[0]
            expect_values(_NAME, inside, "target", f"in [0, V = {weight.shape[0]}) or {IGNORE}", [int(low), int(high)])
    logits = F.linear(rows, weight, bias)
    losses = F.cross_entropy(logits.to(loss_dtype(logits.dtype)), labels, reduction="none", ignore_index=IGNORE)
    if reduction == "none":
        return losses if losses.shape[0] == n else losses.new_zeros(n).masked_scatter(valid, losses)
    total = losses.sum()
    return total / valid.sum().clamp_min(1) if reduction == "mean" else total
