"""The token-level score matrix itself, for inspection and plots: s_ij as in token_contrastive, −inf where j not in C(i)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._library import Contract, contracts, declare, expect_flag
from ..backends import resolve
from ._scores import (
    FLOATING,
    as_temperature,
    autocast_rows,
    candidates,
    check_temperature,
    through_unit_rows,
    unit_rows,
)
from .token_contrastive import _samples as contrastive_samples
from .token_contrastive import check_pairs, check_target

_NAME = "token_similarity"
_SCHEMA = (
    "(Tensor query, Tensor key, Tensor? target, Tensor temperature, Tensor? key_start, Tensor? key_end, "
    "Tensor? query_token, Tensor? key_token, bool normalize) -> Tensor"
)


def _reference(query: Tensor, key: Tensor, target: Tensor | None, temperature: Tensor, *rest: Any) -> Tensor:
    *options, normalize = rest
    check_pairs(_NAME, query, key, target, temperature, *options)
    check_temperature(_NAME, temperature)
    if target is not None:
        check_target(_NAME, target, key.shape[0])
    s = unit_rows(query, normalize)[0] @ unit_rows(key, normalize)[0].T / temperature
    mask = candidates(query, key, target, *options)
    return s.masked_fill(~mask, float("-inf")).to(query.dtype)


def _fake(query: Tensor, key: Tensor, target: Tensor | None, temperature: Tensor, *rest: Any) -> Tensor:
    check_pairs(_NAME, query, key, target, temperature, *rest[:-1])
    return query.new_empty(query.shape[0], key.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.normalize = inputs[-1]
    ctx.save_for_backward(inputs[0], inputs[1], inputs[3], output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, temperature, scores = ctx.saved_tensors
    q, q_norm = unit_rows(query, ctx.normalize)
    k, k_norm = unit_rows(key, ctx.normalize)
    candidate = scores != float("-inf")
    grad = torch.where(candidate, grad.to(q.dtype), 0.0)
    finite = torch.where(candidate, scores.to(q.dtype), 0.0)
    dq = through_unit_rows(grad @ k / temperature, q, q_norm, query.dtype)
    dk = through_unit_rows(grad.T @ q / temperature, k, k_norm, key.dtype)
    return dq, dk, None, -(grad * finite).sum() / temperature, *(None,) * 5


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for label, args in contrastive_samples(dtype, device):
        yield label, args[:9]
        if label == "same-token":
            yield "no-target", (*args[:2], None, *args[3:9])


declare(_NAME, _SCHEMA, _reference, _fake, _setup_context, _backward)
contracts[_NAME] = Contract(_NAME, _samples, FLOATING, differentiable=(0, 1, 3))


def token_similarity(
    query: Tensor,
    key: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.05,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    query_token: Tensor | None = None,
    key_token: Tensor | None = None,
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor:
    """The [N, M] scores that `token_contrastive` takes its softmax over, −inf where a key is not a candidate.

    Arguments, dtypes and errors are those of `token_contrastive`; without `target`, no key is exempt from the other rules.

    Returns:
        [N, M] of query's dtype, differentiable in query, key and temperature.

    >>> token_similarity(torch.eye(2), torch.eye(2), temperature=0.5)
    tensor([[2., 0.],
            [0., 2.]])
    """
    query, key = autocast_rows(_NAME, query=query, key=key)
    tau = as_temperature(_NAME, temperature, query)
    check_pairs(_NAME, query, key, target, tau, key_start, key_end, query_token, key_token)
    expect_flag(_NAME, "normalize", normalize)
    scores: Tensor = resolve(_NAME, query.device, backend, query.dtype)(
        query, key, target, tau, key_start, key_end, query_token, key_token, normalize
    )
    return scores
