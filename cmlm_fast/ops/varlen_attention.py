"""Self-attention of sequences packed end to end: each token attends to the tokens of its own sequence.

    s_ij = scale · q_i · k_j      for j in i's sequence, and |i − j| < window where window > 0
    p_i  = softmax(s_i);   out_i = Σ_j p_ij · m_ij / (1 − dropout) · v_j
    m_ij = 0 with probability dropout, else 1: the Philox word w_(j mod 4) at c = j div 4, step = i, sample = sequence·H + head,
           key = seed, kept where w >= floor(dropout · 2³²); i, j count inside the sequence

query, key, value [T, H, D]; cu_seqlens int32 [B + 1]. Besides the inputs, one log-sum-exp per row and head is saved for
the backward pass. The compiled kernels hold blocks of 32 or 64 rows of scores.
Source: Dao et al. 2022 (FlashAttention), of which sequences in encoder post-training need a single tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._library import Contract, contracts, declare, expect, expect_values, is_number, op
from ..backends import resolve
from ._philox import philox, signed_seed
from ._scores import FLOATING, autocast_rows, loss_dtype, random_rows

_NAME = "varlen_attention"
_AT_ONCE = 2**20  # dropout words that the reference draws at once: Philox needs several 64-bit temporaries for each
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens"
_OPTIONS = "float scale, float dropout, Tensor seed, int window"
_SCHEMA = f"({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor lse)"
_BACKWARD_SCHEMA = (
    f"(Tensor grad_out, {_INPUTS}, Tensor lse, {_OPTIONS}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)


def _check(query: Tensor, key: Tensor, value: Tensor, cu: Tensor, scale: float, dropout: float, seed: Tensor,
           window: int) -> None:  # fmt: skip
    expect(_NAME, query.dim() == 3 and query.shape[2] >= 1, "query", "of shape [T, H, D], D >= 1", list(query.shape))
    expect(_NAME, query.dtype in FLOATING, "query", "float32, bfloat16, float16 or float64", query.dtype)
    for name, tensor in (("key", key), ("value", value)):
        expect(_NAME, tensor.shape == query.shape, name, f"of shape {list(query.shape)} like query", list(tensor.shape))
        expect(_NAME, tensor.dtype == query.dtype, name, f"{query.dtype} like query", tensor.dtype)
        expect(_NAME, tensor.device == query.device, name, f"on {query.device} like query", tensor.device)
    expect(_NAME, cu.dtype == torch.int32 and cu.dim() == 1 and cu.shape[0] >= 1, "cu_seqlens", "int32 of shape [B + 1]",
           f"{cu.dtype} {list(cu.shape)}")  # fmt: skip
    expect(_NAME, cu.device == query.device, "cu_seqlens", f"on {query.device}", cu.device)
    expect(_NAME, 0.0 <= dropout < 1.0, "dropout", "in [0, 1)", dropout)
    expect(_NAME, seed.dtype == torch.int64 and seed.dim() == 0, "seed", "int64 of shape []", seed)
    expect(_NAME, seed.device == query.device, "seed", f"on {query.device} like query", seed.device)
    expect(_NAME, window >= 0, "window", ">= 0", window)


def tile_row_bytes(x: Tensor) -> int:
    """Bytes of a head's row in a tile, whose width is a power of 2."""
    return (1 << (x.shape[-1] - 1).bit_length()) * x.element_size()


def _check_values(cu: Tensor, tokens: int) -> None:
    good = cu[0] == 0 and cu[-1] == tokens and not (cu.diff() < 0).any()
    expect_values(_NAME, bool(good), "cu_seqlens", f"non-decreasing from 0 to {tokens}", cu.tolist()[:8])


def keep_mask(length: int, heads: int, sequence: int, dropout: float, seed: int, device: torch.device) -> Tensor:
    """Bool [H, L, L]: the attention weights of one sequence that dropout keeps."""
    quads, rows = torch.arange((length + 3) // 4, device=device), torch.arange(length, device=device)
    samples = sequence * heads + torch.arange(heads, device=device)
    kept = []
    for some in samples.split(max(1, _AT_ONCE // length**2)):
        words = torch.stack(philox(quads, some[:, None, None], seed, rows[:, None]), -1).flatten(2)
        kept.append(words[:, :, :length] >= int(dropout * 2.0**32))
    return torch.cat(kept)


def _weights(query: Tensor, key: Tensor, rows: slice, sequence: int, scale: float, dropout: float, seed: Tensor,
             window: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One sequence's q, k [H, L, D] in the accumulation dtype, log-sum-exp, softmax, and dropout's factors on it."""
    q, k = (x[rows].transpose(0, 1).to(loss_dtype(x.dtype)) for x in (query, key))
    heads, length, _ = q.shape
    s = q @ k.mT * scale
    if window:
        position = torch.arange(length, device=s.device)
        s = s.masked_fill((position[:, None] - position).abs() >= window, float("-inf"))
    keep = torch.ones_like(s)
    if dropout:
        keep = keep_mask(length, heads, sequence, dropout, int(seed), s.device).to(s.dtype) / (1 - dropout)
    return q, k, torch.logsumexp(s, -1), torch.softmax(s, -1), keep


def _sequences(cu: Tensor) -> Iterator[tuple[int, slice]]:
    bounds = cu.tolist()
    return ((b, slice(bounds[b], bounds[b + 1])) for b in range(len(bounds) - 1) if bounds[b] < bounds[b + 1])


def _reference(query: Tensor, key: Tensor, value: Tensor, cu: Tensor, scale: float, dropout: float, seed: Tensor,
               window: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(query, key, value, cu, scale, dropout, seed, window)
    _check_values(cu, query.shape[0])
    out, lse = torch.empty_like(query, memory_format=torch.contiguous_format), _fake_lse(query)
    for b, rows in _sequences(cu):
        _, _, total, p, keep = _weights(query, key, rows, b, scale, dropout, seed, window)
        v = value[rows].transpose(0, 1).to(p.dtype)
        out[rows], lse[:, rows] = ((p * keep) @ v).transpose(0, 1).to(out.dtype), total
    return out, lse


def _backward_reference(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, cu: Tensor, lse: Tensor, scale: float,
                        dropout: float, seed: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    for b, rows in _sequences(cu):
        q, k, _, p, keep = _weights(query, key, rows, b, scale, dropout, seed, window)
        g, v = (x[rows].transpose(0, 1).to(p.dtype) for x in (grad, value))
        weights = p * keep
        dp = g @ v.mT * keep
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        for target, gradient in ((dq, ds @ k), (dk, ds.mT @ q), (dv, weights.mT @ g)):
            target[rows] = gradient.transpose(0, 1).to(target.dtype)
    return dq, dk, dv


def _fake_lse(query: Tensor) -> Tensor:
    return query.new_empty((query.shape[1], query.shape[0]), dtype=loss_dtype(query.dtype))


def _fake(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    _check(query, *args)
    return torch.empty_like(query, memory_format=torch.contiguous_format), _fake_lse(query)


def _fake_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.dropout, seed, ctx.window = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1], seed)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    *tensors, seed = ctx.saved_tensors
    options = (ctx.scale, ctx.dropout, seed, ctx.window)
    return *op("varlen_attention_backward", ctx.backend)(grad, *tensors, *options), *(None,) * 5


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Ragged lengths, empty and one-token sequences, odd widths, a window, dropout, non-contiguous views."""

    def make(lengths: list[int], heads: int, d: int, dropout: float = 0.0, window: int = 0, seed: int = 0) -> tuple[Any, ...]:
        tokens = sum(lengths)
        rows = random_rows([(tokens, heads * d)] * 3, dtype, device, tokens + d)
        q, k, v = (x.view(tokens, heads, d) for x in rows)
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
        return q, k, v, cu, d**-0.5, dropout, torch.tensor(seed, device=device), window

    yield "ragged", make([7, 1, 0, 33, 64, 32, 65], 2, 32)
    yield "odd-width", make([5, 18], 3, 13)
    yield "window", make([30, 4], 2, 8, window=5)
    yield "dropout", make([9, 21], 2, 16, dropout=0.25, seed=-(2**40) - 7)
    yield "dropout-window", make([19, 6], 1, 8, dropout=0.5, window=4, seed=3)
    yield "dropout-long", make([40, 2], 1, 8, dropout=0.3, seed=11)
    yield "no-tokens", make([0], 2, 8)
    q, k, v, *rest = make([11, 6], 4, 16)
    rest[0] = torch.stack([rest[0], rest[0] * 0], 1)[:, 0]
    yield "non-contiguous", (torch.cat([q, k], 2)[:, :, :16], k.transpose(0, 1).contiguous().transpose(0, 1), v, *rest)


declare(_NAME, _SCHEMA, _reference, _fake, _setup_context, _backward)
declare(_NAME + "_backward", _BACKWARD_SCHEMA, _backward_reference, _fake_backward)
contracts[_NAME] = Contract(_NAME, _samples, FLOATING, differentiable=(0, 1, 2))


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, *, scale: float | None = None,
                     dropout: float = 0.0, seed: int | Tensor | None = None, window: int = 0,
                     backend: str | None = None) -> Tensor:  # fmt: skip
    """Softmax attention of each token over the tokens of its own sequence.

    Equivalent eager code, sequence by sequence on [H, L, D]: `F.scaled_dot_product_attention(q, k, v, scale=scale)`.

    Args:
        query, key, value: [T, H, D], all float32, bfloat16, float16 or float64; tokens packed end to end.
        cu_seqlens: int32 [B + 1]; sequence b holds tokens [cu_seqlens[b], cu_seqlens[b + 1]).
        scale: factor on the scores; default 1/√D.
        dropout: probability that an attention weight is dropped, in [0, 1); also in evaluation, as there is no training mode.
        seed: 64-bit seed of the dropout, in [-2⁶³, 2⁶⁴), or an int64 scalar tensor; the same seed drops the same weights. None
            draws one from the generator of query's device: nothing synchronizes, and torch.compile can trace it.
        window: tokens i, j attend to each other if |i − j| < window; 0 means no window.
        backend: "reference", "cpp" or "triton"; None: the current choice (see `use_backend`). The Triton kernels are made
            for many sequences of at most a few hundred tokens; a sequence of thousands is one program per head.

    Returns:
        [T, H, D] of query's dtype, differentiable in query, key and value. Softmax and sums are float32 (float64 for float64).
        Under autocast, query, key and value are cast to its dtype.

    Raises:
        ValueError: a shape, dtype, device or number is invalid.
        RuntimeError: `cu_seqlens` is malformed (checked on the CPU).

    >>> q = torch.randn(5, 2, 4)
    >>> out = varlen_attention(q, q, q, torch.tensor([0, 2, 5], dtype=torch.int32))
    >>> torch.allclose(out[:2], varlen_attention(q[:2], q[:2], q[:2], torch.tensor([0, 2], dtype=torch.int32)), atol=1e-6)
    True
    """
    query, key, value = autocast_rows(_NAME, query=query, key=key, value=value)
    expect(_NAME, isinstance(cu_seqlens, Tensor), "cu_seqlens", "a tensor", type(cu_seqlens).__name__)
    expect(_NAME, not isinstance(scale, Tensor), "scale", "a number, which gets no gradient", "a tensor")
    expect(_NAME, scale is None or is_number(scale), "scale", "a number", scale)
    expect(_NAME, is_number(dropout), "dropout", "a number in [0, 1)", dropout)
    whole = isinstance(window, (int, np.integer)) and window < 2**63
    expect(_NAME, whole, "window", "a whole number in [0, 2⁶³)", window)
    scale = max(query.shape[-1], 1) ** -0.5 if scale is None else float(scale)
    if seed is None:
        seed = torch.randint(2**62, (), device=query.device) if dropout else 0
    if not isinstance(seed, Tensor):  # filled on the device: a copy from the host would wait
        seed = torch.full((), signed_seed(_NAME, seed), dtype=torch.int64, device=query.device)
    args = (query, key, value, cu_seqlens, scale, float(dropout), seed, window)
    _check(*args)
    out: Tensor = resolve(_NAME, query.device, backend, query.dtype, tile_row_bytes(query))(*args)[0]
    return out
