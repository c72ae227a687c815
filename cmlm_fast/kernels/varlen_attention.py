"""varlen_attention in Triton, for many short sequences: one program per sequence and head.

attend    grid sequences × heads → all rows of the sequence
gradient  the same grid → the gradients of all rows
Both are launched once per tile size. Sequences that fit into one tile compute their scores once, in a kernel that uses few
registers, so that many programs run at a time. Longer ones walk tiles: forward with the softmax of the keys seen so far,
backward three times (the rows' Σ p·dp, kept in `delta`; then dq; then dk and dv). A program whose sequence belongs to another
launch exits at once.
Memory: for a sequence in one tile, q, k, v and out are read or written once; in the backward pass, seven such arrays.
Tensor cores take operands of the rows' dtype; scores, softmax and sums are float32 (float64 for float64).
Deterministic: a row has one writer, and sums run in tile order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._scores import loss_dtype
from ..ops.varlen_attention import _check, _check_values
from . import interpreted, on_device
from ._philox import philox
from ._scores import multiply

_BLOCK = 32


@triton.jit
def rows_at(x, at, d, stride, inside, D: tl.constexpr):
    """Rows `at` of one head, [BLOCK, WIDTH]; zeros beyond the sequence and the width."""
    return tl.load(x + at.to(tl.int64)[:, None] * stride + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def scores_of(q, k, i, j, length, window, SCALE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """Scores [BLOCK, BLOCK] of rows i with keys j; −∞ beyond the sequence and the window."""
    zero = tl.zeros((i.shape[0], j.shape[0]), ACC)
    s = multiply(q, tl.trans(k), zero, PRECISION) * SCALE
    near = (window == 0) | (tl.abs(i[:, None] - j[None, :]) < window)
    return tl.where((j < length)[None, :] & near, s, float("-inf"))


@triton.jit
def kept(i, j0, sample, seed, threshold, GAIN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Dropout's factors, 0 or GAIN, on the weights of rows i and keys j0 … j0 + BLOCK. One draw gives four."""
    counter = (j0 // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    c0 = tl.zeros((BLOCK, BLOCK // 4), tl.uint32) + counter[None, :]
    c1 = tl.zeros((BLOCK, BLOCK // 4), tl.uint32) + i.to(tl.uint32)[:, None]
    c2 = tl.zeros((BLOCK, BLOCK // 4), tl.uint32) + sample.to(tl.uint32)
    c3 = tl.zeros((BLOCK, BLOCK // 4), tl.uint32) + (sample >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK, BLOCK))
    return tl.where(words.to(tl.int64) >= threshold, tl.full((), GAIN, ACC), tl.zeros((), ACC))


_RUNTIME = ["T", "H", "window", "threshold", "low", "high"]


@triton.jit(do_not_specialize=_RUNTIME)
def attend(q, k, v, cu, seed, out, lse, T, H, q_row, q_head, k_row, k_head, v_row, v_head, window, threshold,
           low, high, SCALE: tl.constexpr, GAIN: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
           PRECISION: tl.constexpr, ACC: tl.constexpr, ONE_TILE: tl.constexpr):  # fmt: skip
    """out [T, H, D] and lse [H, T] of the sequences with low < length <= high; with ONE_TILE, high is at most BLOCK."""
    sequence, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin = tl.minimum(tl.maximum(tl.load(cu + sequence), 0), T)  # a malformed cu must not reach out of bounds
    length = tl.minimum(tl.load(cu + sequence + 1), T) - begin
    if (length <= low) | (length > high):
        return
    walked = BLOCK if ONE_TILE else length
    sample, seed = sequence.to(tl.int64) * H + head, tl.load(seed)
    q, k, v = q + head * q_head, k + head * k_head, v + head * v_head
    d = tl.arange(0, WIDTH)
    for i0 in range(0, walked, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        query = rows_at(q, begin + i, d, q_row, i < length, D)
        total = tl.zeros((BLOCK, WIDTH), ACC)
        largest, weight = tl.full((BLOCK,), -1e30, ACC), tl.zeros((BLOCK,), ACC)
        for j0 in range(0, walked, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            s = scores_of(query, rows_at(k, begin + j, d, k_row, j < length, D), i, j, length, window, SCALE, PRECISION, ACC)
            raised = tl.maximum(largest, tl.max(s, 1))
            p = tl.exp(s - raised[:, None])
            down = tl.exp(largest - raised)
            weight = weight * down + tl.sum(p, 1)
            if GAIN != 1:
                p *= kept(i, j0, sample, seed, threshold, GAIN, ACC, BLOCK)
            value = rows_at(v, begin + j, d, v_row, j < length, D)
            total = multiply(p.to(value.dtype), value, total * down[:, None], PRECISION)
            largest = raised
        inside = i < length
        weight = tl.where(inside, weight, 1.0)
        at = (begin + i).to(tl.int64)
        tl.store(lse + head * T + at, largest + tl.log(weight), mask=inside)
        tl.store(out + (at * H + head)[:, None] * D + d[None, :], (total / weight[:, None]).to(out.dtype.element_ty),
                 mask=inside[:, None] & (d < D)[None, :])  # fmt: skip


@triton.jit
def weights_of(query, key, value, g, log_sum, i, j, j0, length, sample, window, seed, threshold, SCALE: tl.constexpr,
               GAIN: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """(softmax p, p after dropout, gradient with respect to p) of rows i and keys j."""
    s = scores_of(query, key, i, j, length, window, SCALE, PRECISION, ACC)
    p = tl.where((i < length)[:, None], tl.exp(s - log_sum[:, None]), 0.0)
    dp = multiply(g, tl.trans(value), tl.zeros((BLOCK, BLOCK), ACC), PRECISION)
    dropped = p
    if GAIN != 1:
        keep = kept(i, j0, sample, tl.load(seed), threshold, GAIN, ACC, BLOCK)  # loading seed only once costs 55 registers more
        dropped, dp = p * keep, dp * keep
    return p, dropped, dp


@triton.jit(do_not_specialize=_RUNTIME)
def gradient(g, q, k, v, cu, seed, lse, delta, dq, dk, dv, T, H, g_row, g_head, q_row, q_head, k_row, k_head, v_row, v_head,
             window, threshold, low, high, SCALE: tl.constexpr, GAIN: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
             BLOCK: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, ONE_TILE: tl.constexpr):  # fmt: skip
    """dq, dk, dv [T, H, D] from the gradient g of out, for sequences with low < length <= high; with ONE_TILE, high is at most
    BLOCK. delta [2, H, T] is scratch: mean gradients with respect to p, and 1 / Σ p."""
    sequence, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin = tl.minimum(tl.maximum(tl.load(cu + sequence), 0), T)  # a malformed cu must not reach out of bounds
    length = tl.minimum(tl.load(cu + sequence + 1), T) - begin
    if (length <= low) | (length > high):
        return
    sample = sequence.to(tl.int64) * H + head
    g, q, k, v = g + head * g_head, q + head * q_head, k + head * k_head, v + head * v_head
    lse, delta, inverse = lse + head * T, delta + head * T, delta + (H + head) * T
    d = tl.arange(0, WIDTH)
    columns = (d < D)[None, :]
    dtype = dq.dtype.element_ty
    if ONE_TILE:
        i = tl.arange(0, BLOCK)
        inside = i < length
        query, key = rows_at(q, begin + i, d, q_row, inside, D), rows_at(k, begin + i, d, k_row, inside, D)
        value, by = rows_at(v, begin + i, d, v_row, inside, D), rows_at(g, begin + i, d, g_row, inside, D)
        log_sum = tl.load(lse + begin + i, mask=inside, other=0.0)
        p, dropped, dp = weights_of(query, key, value, by, log_sum, i, i, 0, length, sample, window, seed, threshold,
                                    SCALE, GAIN, BLOCK, PRECISION, ACC)  # fmt: skip
        # Σ p is not quite 1: a large log_sum is rounded by more than the difference between dp and its mean.
        share = (1 / tl.where(inside, tl.sum(p, 1), 1.0))[:, None]
        p, dropped = p * share, dropped * share
        zero = tl.zeros((BLOCK, WIDTH), ACC)
        at = ((begin + i).to(tl.int64) * H + head)[:, None] * D + d[None, :]
        mask = inside[:, None] & columns
        tl.store(dv + at, multiply(tl.trans(dropped.to(by.dtype)), by, zero, PRECISION).to(dtype), mask=mask)
        ds = (p * (dp - tl.sum(dp * p, 1)[:, None]) * SCALE).to(query.dtype)
        tl.store(dq + at, multiply(ds, key, zero, PRECISION).to(dtype), mask=mask)
        tl.store(dk + at, multiply(tl.trans(ds), query, zero, PRECISION).to(dtype), mask=mask)
    else:
        for i0 in range(0, length, BLOCK):
            i = i0 + tl.arange(0, BLOCK)
            inside = i < length
            query, by = rows_at(q, begin + i, d, q_row, inside, D), rows_at(g, begin + i, d, g_row, inside, D)
            log_sum = tl.load(lse + begin + i, mask=inside, other=0.0)
            own, weight = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
            for j0 in range(0, length, BLOCK):
                j = j0 + tl.arange(0, BLOCK)
                key, value = rows_at(k, begin + j, d, k_row, j < length, D), rows_at(v, begin + j, d, v_row, j < length, D)
                p, _, dp = weights_of(query, key, value, by, log_sum, i, j, j0, length, sample, window, seed, threshold,
                                      SCALE, GAIN, BLOCK, PRECISION, ACC)  # fmt: skip
                own += tl.sum(dp * p, 1)
                weight += tl.sum(p, 1)
            weight = 1 / tl.where(inside, weight, 1.0)
            own *= weight
            tl.store(delta + begin + i, own, mask=inside)
            tl.store(inverse + begin + i, weight, mask=inside)
            total = tl.zeros((BLOCK, WIDTH), ACC)
            for j0 in range(0, length, BLOCK):
                j = j0 + tl.arange(0, BLOCK)
                key, value = rows_at(k, begin + j, d, k_row, j < length, D), rows_at(v, begin + j, d, v_row, j < length, D)
                p, _, dp = weights_of(query, key, value, by, log_sum, i, j, j0, length, sample, window, seed, threshold,
                                      SCALE, GAIN, BLOCK, PRECISION, ACC)  # fmt: skip
                ds = p * weight[:, None] * (dp - own[:, None]) * SCALE
                total = multiply(ds.to(key.dtype), key, total, PRECISION)
            at = ((begin + i).to(tl.int64) * H + head)[:, None] * D + d[None, :]
            tl.store(dq + at, total.to(dtype), mask=inside[:, None] & columns)
        tl.debug_barrier()  # threads read delta and inverse that others wrote
        for j0 in range(0, length, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            key, value = rows_at(k, begin + j, d, k_row, j < length, D), rows_at(v, begin + j, d, v_row, j < length, D)
            by_key, by_value = tl.zeros((BLOCK, WIDTH), ACC), tl.zeros((BLOCK, WIDTH), ACC)
            for i0 in range(0, length, BLOCK):
                i = i0 + tl.arange(0, BLOCK)
                inside = i < length
                query, by = rows_at(q, begin + i, d, q_row, inside, D), rows_at(g, begin + i, d, g_row, inside, D)
                log_sum = tl.load(lse + begin + i, mask=inside, other=0.0)
                own = tl.load(delta + begin + i, mask=inside, other=0.0)
                weight = tl.load(inverse + begin + i, mask=inside, other=0.0)[:, None]
                p, dropped, dp = weights_of(query, key, value, by, log_sum, i, j, j0, length, sample, window, seed, threshold,
                                            SCALE, GAIN, BLOCK, PRECISION, ACC)  # fmt: skip
                p, dropped = p * weight, dropped * weight
                by_value = multiply(tl.trans(dropped.to(by.dtype)), by, by_value, PRECISION)
                ds = (p * (dp - own[:, None]) * SCALE).to(query.dtype)
                by_key = multiply(tl.trans(ds), query, by_key, PRECISION)
            at = ((begin + j).to(tl.int64) * H + head)[:, None] * D + d[None, :]
            tl.store(dk + at, by_key.to(dtype), mask=(j < length)[:, None] & columns)
            tl.store(dv + at, by_value.to(dtype), mask=(j < length)[:, None] & columns)


def _launches(query: Tensor, tokens: int, scale: float, dropout: float,
              backward: bool = False) -> Iterator[tuple[int, int, dict[str, Any]]]:  # fmt: skip
    """(low, high, constants) of each launch."""
    width, sixteen = query.shape[2], query.element_size() == 2
    narrow = sixteen and width <= 64  # beyond, larger tiles and fewer warps would spill registers
    constants = {"SCALE": scale, "GAIN": 1 / (1 - dropout), "D": width, "PRECISION": "ieee",
                 "WIDTH": max(16, triton.next_power_of_2(width)),  # the least that tl.dot takes
                 "ACC": tl.float64 if query.dtype == torch.float64 else tl.float32, "num_stages": 1}  # fmt: skip
    warps = 4 if sixteen else 8
    small = 2 if narrow and not backward else warps
    walking = 2 if narrow and backward else warps
    yield 0, _BLOCK, {**constants, "BLOCK": _BLOCK, "ONE_TILE": True, "num_warps": small}
    if narrow:
        yield _BLOCK, 2 * _BLOCK, {**constants, "BLOCK": 2 * _BLOCK, "ONE_TILE": True, "num_warps": warps}
    yield (2 if narrow else 1) * _BLOCK, tokens, {**constants, "BLOCK": _BLOCK, "ONE_TILE": False, "num_warps": walking}


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


@on_device
def varlen_attention(query: Tensor, key: Tensor, value: Tensor, cu: Tensor, scale: float, dropout: float, seed: Tensor,
                     window: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op: out [T, H, D], lse [H, T]."""
    _check(query, key, value, cu, scale, dropout, seed, window)
    if interpreted(query):
        _check_values(cu, query.shape[0])
    cu = cu.contiguous()
    tokens, heads, _ = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((heads, tokens), dtype=loss_dtype(query.dtype))
    if out.numel() == 0:
        return out, lse
    rows = [_unit_stride(x) for x in (query, key, value)]
    strides = [x.stride(n) for x in rows for n in (0, 1)]
    for low, high, constants in _launches(query, tokens, scale, dropout):
        attend[(cu.shape[0] - 1, heads)](*rows, cu, seed, out, lse, tokens, heads, *strides, window, int(dropout * 2.0**32),
                                         low, high, **constants)  # fmt: skip
    return out, lse


@on_device
def varlen_attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, cu: Tensor, lse: Tensor,
                              scale: float, dropout: float, seed: Tensor, window: int) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients with respect to query, key and value."""
    cu = cu.contiguous()
    tokens, heads, _ = query.shape
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    if dq.numel() == 0:
        return dq, dk, dv
    rows = [_unit_stride(x) for x in (grad, query, key, value)]
    strides = [x.stride(n) for x in rows for n in (0, 1)]
    delta = lse.new_empty((2, *lse.shape))
    for low, high, constants in _launches(query, tokens, scale, dropout, backward=True):
        gradient[(cu.shape[0] - 1, heads)](*rows, cu, seed, lse, delta, dq, dk, dv, tokens, heads, *strides, window,
                                           int(dropout * 2.0**32), low, high, **constants)  # fmt: skip
    return dq, dk, dv
