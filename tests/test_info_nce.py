"""info_nce: what only it has. test_distributed tests it across processes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cmlm_fast import available, info_nce, mlm_cross_entropy, token_contrastive
from cmlm_fast._library import contracts
from cmlm_fast.backends import _SUFFIX, BACKENDS
from cmlm_fast.ops._scores import loss_dtype
from cmlm_fast.testing import assert_no_worse_than_eager

HERE = [backend for backend in BACKENDS if available("info_nce")[backend] is None]


def rows(n, d, dtype=torch.float32, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed + n + d), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("backend", HERE)
@settings(max_examples=40, deadline=None)
@given(b=st.integers(0, 90), d=st.integers(2, 40), seed=st.integers(0, 2**31),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
       kind=st.sampled_from(["cross", "one-sided", "nt_xent", "labels"]), classes=st.integers(1, 60),
       reduction=st.sampled_from(["mean", "sum", "none"]), tau=st.sampled_from([0.01, 0.05, 1.0]))  # fmt: skip
# A saturated softmax; so few rows that s_ij may not be s_ji; a loss far below eager's rounding; the mean of all positives.
@example(b=2, d=2, seed=39, dtype=torch.float64, kind="cross", classes=1, reduction="mean", tau=0.01)
@example(b=2, d=6, seed=0, dtype=torch.float32, kind="nt_xent", classes=1, reduction="mean", tau=0.01)
@example(b=2, d=6, seed=20, dtype=torch.float32, kind="nt_xent", classes=1, reduction="mean", tau=0.01)
@example(b=51, d=4, seed=0, dtype=torch.float32, kind="labels", classes=1, reduction="none", tau=1.0)
def test_any_shape_and_options(backend, b, d, seed, dtype, kind, classes, reduction, tau):
    if kind == "labels":  # with fewer, the softmax may saturate: only rounding is left, in eager PyTorch too
        b = max(b, 3)
    labels = torch.randint(0, classes, (b,), generator=torch.Generator().manual_seed(seed)) if kind == "labels" else None
    args = (rows(b, d, dtype, seed), rows(b, d, dtype, seed + 1), torch.tensor(tau, dtype=loss_dtype(dtype)), labels,
            "nt_xent" if kind == "nt_xent" else "cross", kind != "one-sided", True, reduction, True, True)  # fmt: skip
    # At τ = 0.01 scores are 100 times as large as what is rounded: 8 nudges found too low a floor for 1 input in 300.
    # If every pair is a positive, the gradient by τ cancels; eager errs there by 1.09e-6 with AVX2 and 0.87e-6 with AVX-512.
    times = 3.0 if backend == "triton" and kind == "labels" and classes == 1 else 2.0
    assert_no_worse_than_eager("info_nce", _SUFFIX[backend], args, nudges=32, times=times)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_that_all_lie_far_below_zero(backend, symmetric, dtype):
    z1, z2 = 5 + rows(40, 24, dtype) * 0.3, -5 + rows(40, 24, dtype, 1) * 0.3  # -600 and less: a maximum must not start above
    args = (z1, z2, torch.tensor(1.0, dtype=dtype), None, "cross", symmetric, False, "mean", True, True)
    assert_no_worse_than_eager("info_nce", _SUFFIX[backend], args)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("kind", ["cross", "one-sided", "nt_xent", "labels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_that_cross_chunks(backend, kind, dtype):
    b, d = (1700, 24) if kind in ("cross", "one-sided") else (900, 24)
    if backend == "triton":  # interpreted, its panels are small: this still crosses all of them both ways
        b //= 6
    labels = torch.arange(b) % 211 if kind == "labels" else None
    args = (rows(b, d, dtype), rows(b, d, dtype, 1), torch.tensor(0.05), labels,
            "nt_xent" if kind == "nt_xent" else "cross", kind != "one-sided", True, "mean", True, True)  # fmt: skip
    assert_no_worse_than_eager("info_nce", _SUFFIX[backend], args)


@pytest.mark.skipif("cpp" not in HERE, reason="no compiled kernels")
@pytest.mark.parametrize("labels", [None, torch.arange(888) // 2])
def test_one_row_that_all_others_are_near_to(labels):
    # Each row gives it a weight near 1. In a chunk of six rows next to chunks of 590, BLAS would round a score differently than
    # for the same two rows in another chunk.
    hub, others = (x / x.norm(dim=1, keepdim=True) for x in (rows(1, 384), rows(1776, 384, seed=1)))
    z1, z2 = (hub + others).split(888)
    z2[-1] = hub
    args = (z1, z2, torch.tensor(0.01), labels, "nt_xent", True, True, "mean", True, True)
    assert_no_worse_than_eager("info_nce", "", args, nudges=3)


@pytest.mark.skipif("cpp" not in HERE, reason="no compiled kernels")
@pytest.mark.parametrize("scheme", ["cross", "nt_xent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_are_made_twice(scheme, dtype):
    b = 4200 if scheme == "cross" else 2100  # with 4,096 rows, all would be kept
    args = (rows(b, 8, dtype), rows(b, 8, dtype, 1), torch.tensor(0.05), None, scheme, True, True, "mean", True, True)
    assert_no_worse_than_eager("info_nce", "", args, nudges=0)


@pytest.mark.skipif("triton" not in HERE, reason="triton is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label", [label for label, _ in contracts["info_nce"].samples(torch.float32, torch.device("cpu"))])
def test_triton_in_tiles_where_one_launch_would_do(dtype, label, monkeypatch):
    import cmlm_fast.kernels.info_nce as kernels

    monkeypatch.setattr(kernels, "SMALL", {})
    args = dict(contracts["info_nce"].samples(dtype, torch.device("cpu")))[label]
    assert_no_worse_than_eager("info_nce", "_triton", args)


@pytest.mark.skipif("triton" not in HERE, reason="triton is not installed")
@pytest.mark.parametrize(("chip", "version", "most"), [("sm_100", "3.7.1", 32), ("sm_103", "3.6.0", 32), ("sm_90", "3.6.0", 64),
                                                       ("sm_100", "3.8.0", 64), ("sm_100", "3.10.0", 64)])  # fmt: skip
def test_one_launch_only_where_triton_compiles_it(chip, version, most, monkeypatch):
    import cmlm_fast.kernels.info_nce as kernels

    monkeypatch.setattr(kernels, "chip", lambda: chip)
    monkeypatch.setattr(kernels.triton, "__version__", version)
    assert [kernels.most_rows(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)] == [most, 32, 0]


@pytest.mark.parametrize("backend", HERE)
def test_equals_the_plain_formulas(backend):
    z1, z2, index = rows(12, 8), rows(12, 8, seed=1), torch.arange(12)
    u1, u2 = F.normalize(z1, dim=-1), F.normalize(z2, dim=-1)
    s = u1 @ u2.T / 0.05
    row, column = F.cross_entropy(s, index), F.cross_entropy(s.T, index)
    torch.testing.assert_close(info_nce(z1, z2, backend=backend), (row + column) / 2)
    torch.testing.assert_close(info_nce(z1, z2, symmetric=False, backend=backend), row)
    z = torch.cat([u1, u2])
    s = (z @ z.T / 0.05).fill_diagonal_(float("-inf"))
    simclr = F.cross_entropy(s, torch.cat([index + 12, index]))
    torch.testing.assert_close(info_nce(z1, z2, scheme="nt_xent", backend=backend), simclr)


@pytest.mark.parametrize("backend", HERE)
def test_supcon_by_loops(backend):
    labels = torch.tensor([0, 0, 1, 2, 1, 3])
    z1, z2 = rows(6, 8), rows(6, 8, seed=1)
    z = F.normalize(torch.cat([z1, z2]), dim=-1).double()
    losses = []
    for i in range(12):
        others = [a for a in range(12) if a != i]
        positives = [p for p in others if labels[p % 6] == labels[i % 6]]
        normaliser = torch.logsumexp(torch.stack([z[i] @ z[a] / 0.05 for a in others]), 0)
        losses.append(sum(normaliser - z[i] @ z[p] / 0.05 for p in positives) / len(positives))
    got = info_nce(z1, z2, labels=labels, reduction="none", backend=backend)
    torch.testing.assert_close(got.double(), torch.stack(losses), rtol=1e-4, atol=1e-5)
    # With both views there is always one positive: the other view. So distinct labels give NT-Xent.
    distinct = info_nce(z1, z2, labels=torch.arange(6), backend=backend)
    torch.testing.assert_close(distinct, info_nce(z1, z2, scheme="nt_xent", backend=backend))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("scheme", ["cross", "nt_xent"])
def test_one_and_no_sequence(backend, scheme):
    for b in (0, 1):
        z1, z2 = rows(b, 8).requires_grad_(), rows(b, 8, seed=1).requires_grad_()
        loss = info_nce(z1, z2, scheme=scheme, backend=backend)
        loss.backward()
        assert loss == 0 and not z1.grad.any() and not z2.grad.any()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("kind", [{}, {"scheme": "nt_xent"}, {"labels": torch.arange(9) % 3}])
def test_frozen_view_and_learned_temperature(backend, kind):
    z1, z2, tau = rows(9, 8), rows(9, 8, seed=1).requires_grad_(), torch.tensor(0.07, requires_grad=True)
    info_nce(z1, z2, temperature=tau, backend=backend, **kind).backward()
    w1, w2, sigma = rows(9, 8).requires_grad_(), rows(9, 8, seed=1).requires_grad_(), torch.tensor(0.07)
    sigma.requires_grad_()
    info_nce(w1, w2, temperature=sigma, backend=backend, **kind).backward()
    assert torch.equal(z2.grad, w2.grad) and torch.equal(tau.grad, sigma.grad) and tau.grad != 0 and w1.grad.any()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(("scale", "size"), [(2.0**11, 4096), (2.0**16, 1)])  # long rows have small gradients
@pytest.mark.parametrize("kind", ["cross", "nt_xent"])
def test_float16_keeps_the_gradients_of_a_scaled_loss(backend, kind, scale, size):
    b = 24 if backend == "triton" else 256
    generator = torch.Generator().manual_seed(0)
    z1, z2 = ((size * torch.randn(b, 32, generator=generator)).half().requires_grad_() for _ in range(2))
    (scale * info_nce(z1, z2, scheme=kind, backend=backend)).backward()
    exact = [x.detach().double().requires_grad_() for x in (z1, z2)]
    (scale * info_nce(*exact, scheme=kind, backend="reference")).backward()
    for x, y in zip((z1, z2), exact, strict=True):
        assert (x.grad.double() - y.grad).norm() < 0.002 * y.grad.norm()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("tau", [0.025, 0.032])
def test_all_far_apart_and_a_scaled_loss(backend, tau):
    z1 = rows(1, 8).expand(2, 8).clone().requires_grad_()
    z2 = (-z1.detach()).requires_grad_()
    losses = info_nce(z1, z2, temperature=tau, reduction="none", backend=backend)
    (2.0**16 * losses).sum().backward()
    torch.testing.assert_close(losses, torch.full((2,), 2.0).log())  # nothing tells them apart
    assert z1.grad.isfinite().all() and z2.grad.isfinite().all()


def test_strided_labels_are_labels():
    z1, z2 = torch.randn(2, 6, 8)
    labels = torch.tensor([0, 9, 0, 9, 1, 9, 1, 9, 2, 9, 2, 9])[::2]
    assert torch.equal(info_nce(z1, z2, labels=labels), info_nce(z1, z2, labels=labels.clone()))


def test_autocast_multiplies_in_its_dtype_and_returns_float32():
    z1, z2 = rows(20, 32), rows(20, 32, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(z1, z2)
    assert loss.dtype == torch.float32 and torch.equal(loss, info_nce(z1.bfloat16(), z2.bfloat16()))


@pytest.mark.parametrize("factor", [1 / 3, 1.0035])
def test_the_upstream_gradient_is_not_rounded_to_the_rows_dtype(factor):
    """Otherwise the whole gradient would be off by one common factor."""
    def grads(scale):
        generator = torch.Generator().manual_seed(0)
        z1, z2 = (torch.randn(20, 16, generator=generator).bfloat16().requires_grad_() for _ in range(2))
        target = torch.arange(20)
        losses = info_nce(z1, z2), token_contrastive(z1, z2, target), mlm_cross_entropy(z1, z2, z2[:, 0], target)
        return [torch.autograd.grad(loss * scale, (z1, z2)) for loss in losses]

    *contrasts, head = zip(grads(1.0), grads(factor), strict=True)
    for once, more in contrasts:
        for one, other in zip(once, more, strict=True):
            assert torch.equal(other, (one.double() * factor).bfloat16())
    for one, other in zip(*head, strict=True):
        assert (other.double() * one.double()).sum() / one.double().square().sum() == pytest.approx(factor, rel=6e-4)


def test_labels_that_are_no_tensor_are_named():
    with pytest.raises(ValueError, match="expected labels to be a tensor, got list"):
        info_nce(torch.eye(2), torch.eye(2), labels=[0, 1])
