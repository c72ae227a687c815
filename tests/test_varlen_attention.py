"""varlen_attention: dropout's bits, views as encoders pass them, long sequences."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from sweep import DEVICES

from cmlm_fast import available, varlen_attention
from cmlm_fast._library import op
from cmlm_fast.ops.varlen_attention import keep_mask
from cmlm_fast.testing import cast

CASES = [
    pytest.param(backend, device, id=f"{backend}-{device}", marks=[pytest.mark.gpu] if device == "cuda" else [])
    for device in DEVICES
    for backend, reason in available("varlen_attention", device).items()
    if reason is None and backend != "reference"
]


def packed(lengths, heads, d, dtype=torch.float32, device="cpu"):
    tokens = sum(lengths)
    rows = torch.randn(3, tokens, heads, d, generator=torch.Generator().manual_seed(tokens)).to(device, dtype)
    return *rows, torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)


@pytest.mark.parametrize(("backend", "device"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [5, 32, 47, 90, 300])
def test_dropout_keeps_what_the_reference_keeps(length, dtype, backend, device, monkeypatch):
    monkeypatch.setitem(keep_mask.__globals__, "_AT_ONCE", 47 * 47)  # with 47 tokens one head at a time, with fewer both
    # Values are unit vectors, so the output is the weights of the first 94 keys.
    q = torch.zeros(2 + length, 2, 96, dtype=dtype, device=device)
    v = torch.eye(2 + length, 96, dtype=dtype, device=device)[:, None].expand(-1, 2, -1)
    cu = torch.tensor([0, 2, 2 + length], dtype=torch.int32, device=device)
    out = varlen_attention(q, q, v, cu, dropout=0.3, seed=2**63 + 11, backend=backend)
    seen = (out[2:, :, 2 : 2 + length] != 0).transpose(0, 1)
    assert torch.equal(seen, keep_mask(length, 2, 1, 0.3, 2**63 + 11, torch.device(device))[:, :, :94])


@pytest.mark.parametrize(("backend", "device"), CASES)
def test_any_strides_give_the_same_bits(backend, device):
    *plain, cu = packed((9, 40, 3), 2, 16, device=device)
    grad = torch.randn(1, 2, 16, device=device).expand(52, 2, 16)

    def run(*inputs):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = varlen_attention(*leaves, cu, dropout=0.2, seed=1, backend=backend)
        return out, *torch.autograd.grad(out, leaves, grad)

    q, k, v = plain
    heads_first = k.transpose(0, 1).contiguous().transpose(0, 1)
    last_first = v.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    sliced = torch.cat([q, k, v], 2)[:, :, :16]
    assert all(map(torch.equal, run(*plain), run(sliced, heads_first, last_first)))


@pytest.mark.parametrize(("backend", "device"), CASES)
def test_what_is_no_number_stays_in_its_sequence(backend, device):
    q, k, v, cu = packed((40, 9), 1, 16, device=device)  # the shorter one is padded where the longer has rows
    for x in (q, k, v):
        x[:40] = float("nan")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = varlen_attention(*leaves, cu, backend=backend)
    for x in (out, *torch.autograd.grad(out.sum(), leaves)):
        assert x[:40].isnan().all() and x[40:].isfinite().all()


@pytest.mark.parametrize(("backend", "device"), CASES)
def test_a_window_of_any_size_is_none(backend, device):
    q = torch.randn(7, 2, 8, device=device)
    cu = torch.tensor([0, 3, 7], dtype=torch.int32, device=device)
    whole = varlen_attention(q, q, q, cu, backend=backend)
    assert torch.equal(varlen_attention(q, q, q, cu, window=2**63 - 1, backend=backend), whole)


@pytest.mark.parametrize(("backend", "device"), CASES)
@pytest.mark.parametrize("window", [0, 20])
def test_long_sequences(window, backend, device):
    # Longer than any tile: sums span several.
    *rows, cu = packed((150, 1), 1, 16, torch.bfloat16, device)
    grad = torch.randn(151, 1, 16, device=device).bfloat16()

    def run(suffix, *inputs):
        options = (0.25, 0.1, torch.tensor(7, device=device), window)
        out, lse = op("varlen_attention", suffix)(*inputs, cu, *options)
        upstream = grad.to(out.dtype)
        return out, lse, *op("varlen_attention_backward", suffix)(upstream, *inputs, cu, lse, *options)

    exact = run("_reference", *cast(tuple(rows), torch.float64))
    for got, expected in zip(run("_triton" if backend == "triton" else "", *rows), exact, strict=True):
        assert (got.double() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(("backend", "device"), CASES)
@pytest.mark.parametrize(("length", "shift"), [(30, 3.0), (70, 2.0), (70, 4.0)])
def test_large_scores_cost_no_more_of_the_gradient_than_in_eager(length, shift, backend, device):
    # A large log-sum-exp has few fractional bits left.
    *rows, cu = packed((length,), 2, 64, torch.float64)
    rows, cu = [(x + shift).float().to(device) for x in rows], cu.to(device)
    grad = torch.randn(length, 2, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)

    def gradients(attend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in rows]
        return torch.autograd.grad(attend(*leaves), leaves, grad.to(dtype))

    def eager(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1)

    exact, plain = gradients(eager, torch.float64), gradients(eager, torch.float32)
    ours = gradients(lambda *leaves: varlen_attention(*leaves, cu, backend=backend), torch.float32)
    for got, usual, true in zip(ours, plain, exact, strict=True):
        assert (got - true).norm() < 2 * (usual - true).norm()


def test_autocast_casts_as_it_does_for_torchs_attention():
    q, k, v = (torch.randn(7, 2, 8, requires_grad=True) for _ in range(3))
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        out = varlen_attention(q, k.bfloat16(), v, cu)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, varlen_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), cu))
    out.sum().backward()
    assert q.grad.dtype == torch.float32


def test_dropout_without_a_seed_is_drawn_anew_from_the_generator():
    q, cu = torch.randn(40, 2, 8), torch.tensor([0, 25, 40], dtype=torch.int32)
    draw = partial(varlen_attention, q, q, q, cu, dropout=0.5)
    torch.manual_seed(0)
    first, second = draw(), draw()
    torch.manual_seed(0)
    assert not torch.equal(first, second) and torch.equal(first, draw())
    state = torch.get_rng_state()
    varlen_attention(q, q, q, cu)
    assert torch.equal(state, torch.get_rng_state())  # without dropout nothing is drawn
