"""Sequence-level InfoNCE between two views.

    cross     S = cos(z1, z2)/τ [B, B];  ½·[mean_i CE(S_i·, i) + mean_j CE(S_·j, j)]; symmetric=False keeps the first term
    nt_xent   z = [z1; z2], S = cos(z, z)/τ [2B, 2B], self excluded, positive = the other view; mean over 2B
    labels    S as in nt_xent; P(i) = all other rows with i's label: log Σ_{a≠i} exp s_ia − mean_{p in P(i)} s_ip;
              the other view is always a positive

z1, z2 [B, D]. The compiled kernels keep O(B · chunk) of S, on the CPU up to the 2²⁴ scores of 4,096 pairs. For "mean" and
"sum" the gradient is computed in the forward pass, except for float16, whose loss scale is known only later.
Sources: van den Oord et al. 2018 (cross), Chen et al. 2020, SimCLR (nt_xent), Khosla et al. 2020, SupCon (labels).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._library import Contract, contracts, declare, expect, expect_flag, op
from ..backends import resolve
from ._distributed import info_nce_across_ranks
from ._scores import (
    FLOATING,
    as_temperature,
    autocast_rows,
    check_reduction,
    check_rows,
    check_temperature,
    check_vector,
    fake_gradients,
    gradients_in_forward,
    loss_dtype,
    random_rows,
    reduction_weight,
    scaled,
    through_unit_rows,
    unit_rows,
)

_NAME = "info_nce"
_INPUTS = "Tensor z1, Tensor z2, Tensor temperature, Tensor? labels, str scheme, bool symmetric, bool normalize"
_GRADIENTS = "Tensor grad_z1, Tensor grad_z2, Tensor grad_temperature"
_SCHEMA = f"({_INPUTS}, str reduction, bool z1_grad, bool z2_grad) -> (Tensor loss, {_GRADIENTS})"
_BACKWARD_SCHEMA = f"(Tensor grad_loss, {_INPUTS}, bool z1_grad, bool z2_grad) -> ({_GRADIENTS})"


def _check(z1: Tensor, z2: Tensor, temperature: Tensor, labels: Tensor | None, scheme: str, symmetric: bool,
           normalize: bool, reduction: str, z1_grad: bool, z2_grad: bool) -> None:  # fmt: skip
    check_rows(_NAME, "z1", z1, "z2", z2, temperature)
    expect(_NAME, z1.shape[0] == z2.shape[0], "z2", f"of shape {list(z1.shape)} like z1", list(z2.shape))
    expect(_NAME, scheme in ("cross", "nt_xent"), "scheme", "'cross' or 'nt_xent'", repr(scheme))
    check_vector(_NAME, "labels", labels, z1.shape[0], (torch.int64,), z1.device)
    expect_flag(_NAME, "symmetric", symmetric)
    expect_flag(_NAME, "normalize", normalize)
    one_sided = not symmetric and (scheme != "cross" or labels is not None)
    expect(_NAME, not one_sided, "symmetric", "True unless scheme is 'cross' and labels are not given", symmetric)
    check_reduction(_NAME, reduction)


def _positives(labels: Tensor | None, batch: int, like: Tensor) -> Tensor:
    """[2B, 2B] weights of each row's positives, summing to 1."""
    index = torch.arange(2 * batch, device=like.device)
    if labels is None:
        return (index == (index[:, None] + batch) % max(2 * batch, 1)).to(like.dtype)
    twice = torch.cat([labels, labels])
    same = ((twice == twice[:, None]) & (index != index[:, None])).to(like.dtype)
    return same / same.sum(1, keepdim=True)


def _rows(z1: Tensor, z2: Tensor, temperature: Tensor, labels: Tensor | None, scheme: str, symmetric: bool,
          normalize: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss of each row, and the unit vectors' scores."""
    (u1, _), (u2, _) = unit_rows(z1, normalize), unit_rows(z2, normalize)
    if labels is None and scheme == "cross":
        s = u1 @ u2.T / temperature
        # Subtract the positive's score first, here and below: a loss near 0 must not be the difference of two large numbers.
        loss = torch.logsumexp(s - s.diagonal()[:, None], 1)
        if symmetric:
            loss = (loss + torch.logsumexp(s - s.diagonal(), 0)) / 2
        return loss, s
    z = torch.cat([u1, u2])
    positive = _positives(labels, z1.shape[0], z)
    s = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    finite = s.clone().fill_diagonal_(0.0)
    return torch.logsumexp(s - (positive * finite).sum(1, keepdim=True), 1), s


def _row_count(z1: Tensor, labels: Tensor | None, scheme: str) -> int:
    return z1.shape[0] * (1 if labels is None and scheme == "cross" else 2)


def _row_weight(z1: Tensor, labels: Tensor | None, scheme: str, reduction: str) -> Tensor:
    """Weight of each row's loss in the reduced loss, [B] or [2B]."""
    every = z1.new_ones(_row_count(z1, labels, scheme), dtype=torch.bool)
    return reduction_weight(every, reduction, loss_dtype(z1.dtype))


def _gradients(weight: Tensor, z1: Tensor, z2: Tensor, temperature: Tensor, labels: Tensor | None, scheme: str,
               symmetric: bool, normalize: bool, z1_grad: bool, z2_grad: bool) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of Σ weight_i·loss_i, from the gradient g of the scores."""
    batch = z1.shape[0]
    (u1, norm1), (u2, norm2) = unit_rows(z1, normalize), unit_rows(z2, normalize)
    s = _rows(z1, z2, temperature, labels, scheme, symmetric, normalize)[1]
    if labels is None and scheme == "cross":
        eye = torch.eye(batch, dtype=s.dtype, device=s.device)
        g = (torch.softmax(s, 1) - eye) * weight[:, None]
        if symmetric:
            g = (g + (torch.softmax(s, 0) - eye) * weight) / 2
        d1, d2 = g @ u2, g.T @ u1
    else:
        g = (torch.softmax(s, 1) - _positives(labels, batch, s)) * weight[:, None]
        d1, d2 = ((g + g.T) @ torch.cat([u1, u2])).tensor_split(2)
    empty = z1.new_empty(0)
    g1 = through_unit_rows(d1 / temperature, u1, norm1, z1.dtype) if z1_grad else empty
    g2 = through_unit_rows(d2 / temperature, u2, norm2, z2.dtype) if z2_grad else empty.clone()
    return g1, g2, -torch.where(g == 0, 0.0, g * s).sum() / temperature


def _reference(z1: Tensor, z2: Tensor, temperature: Tensor, labels: Tensor | None, scheme: str, symmetric: bool,
               normalize: bool, reduction: str, z1_grad: bool, z2_grad: bool) -> tuple[Tensor, ...]:  # fmt: skip
    _check(z1, z2, temperature, labels, scheme, symmetric, normalize, reduction, z1_grad, z2_grad)
    check_temperature(_NAME, temperature)
    inputs = (z1, z2, temperature, labels, scheme, symmetric, normalize)
    loss, _ = _rows(*inputs)
    if reduction == "none":
        empty = z1.new_empty(0)
        return loss, empty, empty.clone(), torch.zeros_like(temperature)
    weight = _row_weight(z1, labels, scheme, reduction)
    return (weight * loss).sum(), *_gradients(weight, *inputs, z1_grad, z2_grad)


def _backward_reference(grad_loss: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _gradients(grad_loss, *rest)


def _fake(z1: Tensor, z2: Tensor, temperature: Tensor, labels: Tensor | None, scheme: str, *rest: Any) -> tuple[Tensor, ...]:
    _check(z1, z2, temperature, labels, scheme, *rest)
    _, _, reduction, z1_grad, z2_grad = rest
    wanted = reduction != "none"
    loss = torch.empty_like(temperature) if wanted else temperature.new_empty(_row_count(z1, labels, scheme))
    return loss, *fake_gradients(z1, z2, temperature, z1_grad and wanted, z2_grad and wanted)


def _fake_backward(grad_loss: Tensor, z1: Tensor, z2: Tensor, temperature: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return fake_gradients(z1, z2, temperature, *rest[-2:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z1, z2, temperature, labels, ctx.scheme, ctx.symmetric, ctx.normalize, ctx.reduction, ctx.z1_grad, ctx.z2_grad = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z1, z2, temperature, labels, *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    z1, z2, temperature, labels, g1, g2, gt = ctx.saved_tensors
    want1, want2 = ctx.needs_input_grad[:2]
    if grad is None:
        return (None,) * 10
    if ctx.reduction != "none" and want1 <= ctx.z1_grad and want2 <= ctx.z2_grad:
        g1, g2, gt = scaled(g1, grad), scaled(g2, grad), grad * gt
    else:
        weight = grad * _row_weight(z1, labels, ctx.scheme, ctx.reduction)
        inputs = (z1, z2, temperature, labels, ctx.scheme, ctx.symmetric, ctx.normalize)
        g1, g2, gt = op("info_nce_backward", ctx.backend)(weight, *inputs, want1, want2)
    return g1 if want1 else None, g2 if want2 else None, gt, *(None,) * 7


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Both schemes, one-sided, labels (also all different), B = 1, B = 0, odd shapes, dot products, τ = 0.01."""
    generator = torch.Generator().manual_seed(2)

    def make(b: int, d: int, tau: float = 0.05, **options: Any) -> tuple[Any, ...]:
        z1, z2 = random_rows([(b, d), (b, d)], dtype, device, b + d)
        o: dict[str, Any] = {"labels": None, "scheme": "cross", "symmetric": True, "normalize": True,
                             "reduction": "mean", **options}  # fmt: skip
        temperature = torch.full((), tau, dtype=loss_dtype(dtype), device=device)
        return z1, z2, temperature, o["labels"], o["scheme"], o["symmetric"], o["normalize"], o["reduction"], True, True

    def labels(classes: int, b: int) -> Tensor:
        return torch.randint(0, classes, (b,), generator=generator).to(device)

    yield "cross-65", make(65, 40)
    yield "cross-one-sided", make(33, 24, symmetric=False)
    yield "cross-rows", make(37, 20, reduction="none")
    yield "nt_xent-63", make(63, 33, scheme="nt_xent")
    yield "nt_xent-rows", make(20, 16, scheme="nt_xent", reduction="none")
    yield "labels-50", make(50, 16, labels=labels(6, 50))
    yield "labels-all-different", make(9, 8, labels=torch.arange(9, device=device), reduction="none")
    yield "dot-sum", make(21, 12, tau=1.0, normalize=False, reduction="sum")
    yield "cold", make(30, 8, tau=0.01)
    yield "cold-nt_xent", make(30, 8, tau=0.01, scheme="nt_xent")
    for scheme in ("cross", "nt_xent"):
        yield f"{scheme}-one", make(1, 4, scheme=scheme)
        yield f"{scheme}-none", make(0, 4, scheme=scheme)
    z1, z2, *rest = make(40, 30)
    yield "non-contiguous", (z1.T.contiguous().T, torch.cat([z2, z2], 1)[:, :30], *rest)


declare(_NAME, _SCHEMA, _reference, _fake, _setup_context, _backward)
declare(_NAME + "_backward", _BACKWARD_SCHEMA, _backward_reference, _fake_backward)
contracts[_NAME] = Contract(_NAME, _samples, FLOATING, differentiable=(0, 1, 2))


def info_nce(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    scheme: str = "cross",
    symmetric: bool = True,
    labels: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE between the vectors of two views of the same sequences; the B×B scores are computed in chunks.

    Equivalent eager code for scheme "cross", with S = normalize(z1) @ normalize(z2).T / temperature and i = arange(B):
    `(F.cross_entropy(S, i) + F.cross_entropy(S.T, i)) / 2`.

    Args:
        z1, z2: [B, D], both float32, bfloat16, float16 or float64; row i of each belongs to sequence i.
        temperature: τ > 0, a number or a one-element tensor (which then gets a gradient).
        scheme: "cross" contrasts view 1 with view 2 in both directions; "nt_xent" (SimCLR) contrasts all 2B vectors.
        symmetric: False keeps only the view 1 → view 2 half of "cross".
        labels: int64 [B]; if given, the loss is SupCon over the 2B vectors: a row's positives are all other vectors with its
            label, in both views, and `scheme` is ignored.
        normalize: True for cosine similarity, False for the dot product.
        reduction: "mean" over rows, "sum", or "none".
        group: a `torch.distributed` process group (`dist.group.WORLD`): negatives come from all its ranks, whose batches may
            differ in size. Loss and gradients equal those of one process on the concatenated batch: every rank returns the
            whole loss, and its own z1, z2 get the whole loss's gradient. A temperature, like all parameters behind z1 and
            z2, gets this rank's part of its gradient; the parts of all ranks sum to the whole. (DDP averages parameter
            gradients over ranks: multiply the loss by the world size there.) The call and its backward pass are
            collectives: every rank must make both, with inputs that require gradients on all ranks or on none. Requires
            reduction "mean" or "sum".
        backend: "reference", "cpp", "cuda" or "triton"; None: the current choice (see `use_backend`).

    Returns:
        Scalar; with "none", [B] for "cross" (½(row + column), or the row term alone) and [2B] for "nt_xent" and labels
        (view 1, then view 2). float32 (float64 for float64 inputs). B = 0 gives 0 with zero gradients. Under autocast, z1
        and z2 are cast to its dtype.

    Raises:
        ValueError: a shape, dtype, device or option is invalid.
        RuntimeError: a temperature tensor is not finite or not > 0 (checked on the CPU).

    >>> z = torch.eye(4, requires_grad=True)
    >>> loss = info_nce(z, torch.eye(4), temperature=0.5)
    >>> round(loss.item(), 4), loss.backward()
    (0.3408, None)
    """
    z1, z2 = autocast_rows(_NAME, z1=z1, z2=z2)
    tau = as_temperature(_NAME, temperature, z1)
    recording = torch.is_grad_enabled() and gradients_in_forward(z1.dtype)
    labels = labels.contiguous() if isinstance(labels, Tensor) else labels
    args = (z1, z2, tau, labels, scheme, symmetric, normalize, reduction, recording and z1.requires_grad,
            recording and z2.requires_grad)  # fmt: skip
    _check(*args)
    if group is not None:
        return info_nce_across_ranks(*args[:8], group=group, backend=backend)
    loss: Tensor = resolve(_NAME, z1.device, backend, z1.dtype, z1.shape[0] ** 2)(*args)[0]
    return loss
