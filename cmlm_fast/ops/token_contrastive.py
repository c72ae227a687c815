"""Token-level contrast: each masked token against the same token seen in the other view.

    s_ij   = cos(q_i, k_j) / τ                      (q_i · k_j / τ with normalize=False)
    C(i)   = {key_start_i <= j < key_end_i} minus {key_token_j = query_token_i} minus {key_token_j = -1}, plus target_i
    loss_i = log Σ_{j in C(i)} exp s_ij − s_{i,target_i};   target −100 ignores row i

query [N, D], key [M, D]; the compiled kernels keep at most one chunk of the N×M scores. With reduction "mean" or "sum" the
gradient is computed in the forward pass (6·N·M·D operations in all, 8·N·M·D in Triton), except for float16, whose loss
scale is known only later. For float16, and with "none", the backward pass recomputes the scores.
Sources: arXiv 2106.02327 (token level), van den Oord et al. 2018 (InfoNCE).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._library import Contract, contracts, declare, expect, expect_flag, expect_values, op
from ..backends import resolve
from ._scores import (
    FLOATING,
    IGNORE,
    as_temperature,
    autocast_rows,
    candidates,
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

_NAME = "token_contrastive"
_INPUTS = (
    "Tensor query, Tensor key, Tensor target, Tensor temperature, Tensor? key_start, Tensor? key_end, "
    "Tensor? query_token, Tensor? key_token, bool normalize"
)
_GRADIENTS = "Tensor grad_query, Tensor grad_key, Tensor grad_temperature"
_SCHEMA = f"({_INPUTS}, str reduction, bool query_grad, bool key_grad) -> (Tensor loss, {_GRADIENTS})"
_BACKWARD_SCHEMA = f"(Tensor grad_loss, {_INPUTS}, bool query_grad, bool key_grad) -> ({_GRADIENTS})"


def check_pairs(op_name: str, query: Tensor, key: Tensor, target: Tensor | None, temperature: Tensor,
                key_start: Tensor | None, key_end: Tensor | None, query_token: Tensor | None,
                key_token: Tensor | None) -> None:  # fmt: skip
    """Check the arguments that token_contrastive and token_similarity share."""
    check_rows(op_name, "query", query, "key", key, temperature)
    n, m, device = query.shape[0], key.shape[0], query.device
    check_vector(op_name, "target", target, n, (torch.int64,), device)
    check_vector(op_name, "key_start", key_start, n, (torch.int32,), device)
    check_vector(op_name, "key_end", key_end, n, (torch.int32,), device)
    check_vector(op_name, "query_token", query_token, n, (torch.int64, torch.int32), device)
    check_vector(op_name, "key_token", key_token, m, (torch.int64, torch.int32), device)
    if query_token is not None:
        expect(op_name, key_token is not None, "key_token", "given when query_token is", None)
        assert key_token is not None
        same = query_token.dtype == key_token.dtype
        expect(op_name, same, "key_token", f"{query_token.dtype} like query_token", key_token.dtype)


def check_target(op_name: str, target: Tensor, m: int) -> None:
    """Check the values of `target`."""
    outside = ((target < 0) & (target != IGNORE)) | (target >= m)
    if outside.any():
        expect_values(op_name, False, "target", f"in [0, M = {m}) or {IGNORE}", int(target[outside][0]))


def _gradients(weight: Tensor, query: Tensor, key: Tensor, target: Tensor, temperature: Tensor, key_start: Tensor | None,
               key_end: Tensor | None, query_token: Tensor | None, key_token: Tensor | None, normalize: bool,
               query_grad: bool, key_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss [N] and the gradients of Σ weight_i·loss_i."""
    valid = (target != IGNORE)[:, None]
    q, q_norm = unit_rows(torch.where(valid, query, 0.0), normalize)  # an ignored row's values, NaN say, reach no key
    k, k_norm = unit_rows(key, normalize)
    mask = candidates(query, key, target, key_start, key_end, query_token, key_token) & valid
    positive = (torch.arange(key.shape[0], device=query.device) == target[:, None]).to(q.dtype)
    s = (q @ k.T / temperature).masked_fill(~mask, float("-inf"))
    finite = s.masked_fill(~mask, 0.0)
    above = s - (positive * finite).sum(1, keepdim=True)  # a loss near 0 must not be the difference of two large numbers
    loss = torch.where(valid[:, 0], torch.logsumexp(above, 1), 0.0)
    g = torch.where(mask, torch.softmax(s, 1) - positive, 0.0) * weight[:, None]
    empty = query.new_empty(0)
    dq = through_unit_rows(g @ k / temperature, q, q_norm, query.dtype) if query_grad else empty
    dk = through_unit_rows(g.T @ q / temperature, k, k_norm, key.dtype) if key_grad else empty.clone()
    return loss, dq, dk, -(g * finite).sum() / temperature


def _reference(query: Tensor, key: Tensor, target: Tensor, temperature: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *options, normalize, reduction, query_grad, key_grad = rest
    _check(query, key, target, temperature, *rest)
    check_target(_NAME, target, key.shape[0])
    check_temperature(_NAME, temperature)
    weight = reduction_weight(target != IGNORE, reduction, loss_dtype(query.dtype))
    wanted = reduction != "none"
    inputs = (query, key, target, temperature, *options, normalize, query_grad and wanted, key_grad and wanted)
    loss, dq, dk, dt = _gradients(weight, *inputs)
    return (loss if reduction == "none" else (weight * loss).sum()), dq, dk, dt if wanted else torch.zeros_like(dt)


def _backward_reference(grad_loss: Tensor, query: Tensor, key: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    check_target(_NAME, target, key.shape[0])
    return _gradients(grad_loss, query, key, target, *rest)[1:]


def _check(query: Tensor, key: Tensor, target: Tensor, temperature: Tensor, key_start: Tensor | None,
           key_end: Tensor | None, query_token: Tensor | None, key_token: Tensor | None, normalize: bool,
           reduction: str, query_grad: bool, key_grad: bool) -> None:  # fmt: skip
    check_pairs(_NAME, query, key, target, temperature, key_start, key_end, query_token, key_token)
    expect_flag(_NAME, "normalize", normalize)
    check_reduction(_NAME, reduction)


def _fake(query: Tensor, key: Tensor, target: Tensor, temperature: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _check(query, key, target, temperature, *rest)
    _, reduction, query_grad, key_grad = rest[-4:]
    wanted = reduction != "none"
    loss = torch.empty_like(temperature) if wanted else temperature.new_empty(query.shape[0])
    gradients = fake_gradients(query, key, temperature, query_grad and wanted, key_grad and wanted)
    return loss, *gradients


def _fake_backward(grad_loss: Tensor, query: Tensor, key: Tensor, target: Tensor, temperature: Tensor,
                   *rest: Any) -> tuple[Tensor, ...]:  # fmt: skip
    return fake_gradients(query, key, temperature, *rest[-2:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.normalize, ctx.reduction, ctx.query_grad, ctx.key_grad = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    *inputs, dq, dk, dt = ctx.saved_tensors
    want_query, want_key = ctx.needs_input_grad[:2]
    made = ctx.reduction != "none" and want_query <= ctx.query_grad and want_key <= ctx.key_grad
    if grad is not None and made:
        dq, dk, dt = scaled(dq, grad), scaled(dk, grad), grad * dt
    elif grad is not None:
        valid = inputs[2] != IGNORE
        # An ignored row has no gradient, whatever the upstream gradient: 0 · NaN would reach all keys.
        weight = torch.where(valid, grad * reduction_weight(valid, ctx.reduction, grad.dtype), 0.0)
        dq, dk, dt = op("token_contrastive_backward", ctx.backend)(weight, *inputs, ctx.normalize, want_query, want_key)
    else:
        want_query = want_key = False
        dt = None
    return (dq if want_query else None, dk if want_key else None, None, dt, *(None,) * 8)


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Odd shapes, ragged ranges, same-token exclusion, ignored rows, τ = 0.01, huge scores, strided rows, empty inputs."""
    generator = torch.Generator().manual_seed(1)

    def make(n: int, m: int, d: int, tau: float = 0.05, ignored: float = 0.0, **options: Any) -> tuple[Any, ...]:
        query, key = random_rows([(n, d), (m, d)], dtype, device, n + m)
        target = torch.randint(0, max(m, 1), (n,), generator=generator)
        target[torch.rand(n, generator=generator) < ignored] = IGNORE
        o: dict[str, Any] = {"start": None, "end": None, "qt": None, "kt": None, "normalize": True,
                             "reduction": "mean", **options}  # fmt: skip
        temperature = torch.full((), tau, dtype=loss_dtype(dtype), device=device)
        return (query, key, target.to(device), temperature, o["start"], o["end"], o["qt"], o["kt"], o["normalize"],
                o["reduction"], True, True)  # fmt: skip

    def integers(high: int, size: int, kind: torch.dtype) -> Tensor:
        return torch.randint(0, high, (size,), generator=generator).to(device, kind)

    yield "63x1000", make(63, 1000, 40, ignored=0.2)
    yield "one-row", make(1, 1, 3)
    yield "one-number", make(1, 1, 1, normalize=False)
    yield "all-ignored", make(5, 9, 8, ignored=1.1)
    yield "no-rows", make(0, 7, 8)
    yield "nothing", make(0, 0, 8)
    yield "sum-dot", make(17, 33, 24, tau=1.0, normalize=False, reduction="sum")
    yield "rows-ranges", make(130, 257, 33, reduction="none", start=integers(257, 130, torch.int32),
                              end=integers(258, 130, torch.int32))  # fmt: skip
    start = torch.arange(0, 640, 64, dtype=torch.int32, device=device).repeat_interleave(13)
    yield "blocks", make(130, 640, 64, start=start, end=start + 64)
    tokens = integers(20, 200, torch.int64)
    tokens[::7] = -1
    yield "same-token", make(90, 200, 16, qt=integers(20, 90, torch.int64), kt=tokens, ignored=0.1)
    yield "cold", make(40, 70, 12, tau=0.01)
    query, key, _, *rest = make(20, 40, 32, tau=0.01, normalize=False)
    key = 23.5 * key / key.norm(dim=1, keepdim=True)
    query = key[:20] + 0.1 * query  # scores of 5.5·10⁴, which bfloat16 rounds by up to 200
    yield "huge-dot", (query, key, torch.arange(20, device=device), *rest)
    query, key, *rest = make(30, 50, 20)
    yield "non-contiguous", (query.T.contiguous().T, torch.cat([key, key], 1)[:, :20], *rest)


declare(_NAME, _SCHEMA, _reference, _fake, _setup_context, _backward)
declare(_NAME + "_backward", _BACKWARD_SCHEMA, _backward_reference, _fake_backward)
contracts[_NAME] = Contract(_NAME, _samples, FLOATING, differentiable=(0, 1, 3))


def token_contrastive(
    query: Tensor,
    key: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    query_token: Tensor | None = None,
    key_token: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Contrast each query with its target among the candidate keys; scores are computed in chunks, not stored.

    Equivalent eager code, without the optional arguments:
    `F.cross_entropy(F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T / temperature, target)`.

    Args:
        query: [N, D], float32, bfloat16, float16 or float64.
        key: [M, D], query's dtype.
        target: int64 [N], index of each row's positive key; -100 ignores the row.
        temperature: τ > 0, a number or a one-element tensor (which then gets a gradient).
        key_start, key_end: int32 [N]; row i's candidates are the keys in [key_start_i, key_end_i).
        query_token, key_token: int32 or int64, [N] and [M]; a key with the row's token is not a negative, and a key marked -1
            is not a candidate. The target is always a candidate.
        normalize: True for cosine similarity, False for the dot product.
        reduction: "mean" over the rows not ignored, "sum", or "none".
        backend: "reference", "cpp", "cuda" or "triton"; None: the current choice (see `use_backend`).

    Returns:
        Scalar, or [N] with "none" (0 at ignored rows); float32 (float64 for float64 inputs). Without a valid row, 0
        with zero gradients. Gradients flow to query, key and temperature. Under autocast, query and key are cast to its dtype.

    Raises:
        ValueError: a shape, dtype, device or option is invalid.
        RuntimeError: a target is outside [0, M), or a temperature tensor is not finite or not > 0 (checked on the CPU).

    >>> query, key = torch.eye(3, requires_grad=True), torch.eye(3)
    >>> loss = token_contrastive(query, key, torch.tensor([0, 1, -100]), temperature=0.1)
    >>> round(loss.item(), 6), loss.backward()
    (9.1e-05, None)
    """
    query, key = autocast_rows(_NAME, query=query, key=key)
    expect(_NAME, isinstance(target, Tensor), "target", "a tensor", type(target).__name__)
    tau = as_temperature(_NAME, temperature, query)
    recording = torch.is_grad_enabled() and gradients_in_forward(query.dtype)
    args = (query, key, target, tau, key_start, key_end, query_token, key_token, normalize, reduction,
            recording and query.requires_grad, recording and key.requires_grad)  # fmt: skip
    _check(*args)
    size = query.shape[0] * key.shape[0]
    loss: Tensor = resolve(_NAME, query.device, backend, query.dtype, size)(*args)[0]
    return loss
