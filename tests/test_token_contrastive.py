"""token_contrastive and token_similarity: what only they have."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cmlm_fast import available, token_contrastive, token_similarity
from cmlm_fast.backends import _SUFFIX, BACKENDS
from cmlm_fast.ops._scores import loss_dtype
from cmlm_fast.testing import assert_no_worse_than_eager

HERE = [backend for backend in BACKENDS if available("token_contrastive")[backend] is None]


def rows(n, d, dtype=torch.float32, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed + 31 * n + d), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("backend", HERE)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), n=st.integers(0, 70), m=st.integers(1, 90), d=st.integers(2, 40),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
       given=st.sets(st.sampled_from(["start", "end", "query_token", "key_token"])),
       token=st.sampled_from([torch.int32, torch.int64]), normalize=st.booleans(),
       reduction=st.sampled_from(["mean", "sum", "none"]), tau=st.sampled_from([0.01, 0.05, 1.0]))  # fmt: skip
def test_any_shape_and_options(backend, data, n, m, d, dtype, given, token, normalize, reduction, tau):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))

    def integers(low, high, size, kind):
        return torch.randint(low, high, (size,), generator=generator).to(kind)

    target = torch.where(integers(0, 4, n, torch.int64) == 0, -100, integers(0, m, n, torch.int64))
    start = integers(0, m, n, torch.int32) if "start" in given else None
    end = integers(0, m + 1, n, torch.int32) if "end" in given else None
    query_token = integers(0, 5, n, token) if "query_token" in given else None
    key_token = integers(-1, 5, m, token) if given & {"query_token", "key_token"} else None
    scale = 1.0 if normalize else d**-0.5 * tau
    temperature = torch.tensor(tau, dtype=loss_dtype(dtype))
    args = (rows(n, d, dtype) * scale, rows(m, d, dtype, 7), target, temperature, start, end, query_token, key_token,
            normalize, reduction, True, True)  # fmt: skip
    assert_no_worse_than_eager("token_contrastive", _SUFFIX[backend], args)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("alone", ["key_start", "key_end", "key_token"])
def test_each_option_may_come_alone(backend, alone):
    values = {"key_start": torch.tensor([3, 0, 5], dtype=torch.int32), "key_end": torch.tensor([2, 7, 1], dtype=torch.int32),
              "key_token": torch.tensor([-1, 4, -1, 4, 4, 4, -1], dtype=torch.int32)}  # fmt: skip
    query, key, target, column = rows(3, 8), rows(7, 8), torch.tensor([0, 2, 6]), torch.arange(7)
    can = {"key_start": column >= values["key_start"][:, None], "key_end": column < values["key_end"][:, None],
           "key_token": (values["key_token"] >= 0).expand(3, 7)}[alone] | (column == target[:, None])  # fmt: skip
    scores = (F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T / 0.05).masked_fill(~can, float("-inf"))
    got = token_contrastive(query, key, target, backend=backend, **{alone: values[alone]})
    torch.testing.assert_close(got, F.cross_entropy(scores, target))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_that_all_lie_far_below_zero(backend, dtype):
    # The largest is about -20,000: the value that hides a candidate must be lower still, and a maximum must not start above.
    query, key = 50 + rows(20, 24, dtype) * 0.01, -20 + rows(70, 24, dtype, 7) * 0.01
    temperature = torch.tensor(1.0, dtype=dtype)
    args = (query, key, torch.arange(20), temperature, None, None, None, None, False, "mean", True, True)
    assert_no_worse_than_eager("token_contrastive", _SUFFIX[backend], args)


@pytest.mark.parametrize("backend", HERE)
def test_equals_the_plain_formula(backend):
    query, key = rows(30, 16).requires_grad_(), rows(50, 16).requires_grad_()
    target = torch.arange(30)
    got = token_contrastive(query, key, target, temperature=0.1, backend=backend)
    plain = F.cross_entropy(F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T / 0.1, target)
    torch.testing.assert_close(got, plain)
    for a, b in zip(torch.autograd.grad(got, (query, key)), torch.autograd.grad(plain, (query, key)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", HERE)
def test_same_token_elsewhere_is_no_negative_but_the_positive_stays(backend):
    query, key = rows(4, 8), rows(6, 8)
    target, word = torch.tensor([0, 1, 2, 3]), torch.tensor([7, 7, 8, 9])
    key_word = torch.tensor([7, 7, 8, 9, 7, -1])
    scores = token_similarity(query, key, target, query_token=word, key_token=key_word, backend=backend)
    assert scores.isfinite().tolist() == [
        [True, False, True, True, False, False],
        [False, True, True, True, False, False],
        [True, True, True, True, True, False],
        [True, True, True, True, True, False],
    ]
    losses = token_contrastive(
        query, key, target, query_token=word, key_token=key_word, reduction="none", backend=backend
    )
    torch.testing.assert_close(losses, F.cross_entropy(scores, target, reduction="none"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [backend for backend in HERE if backend != "triton"])  # Triton's products take all rows
def test_what_an_ignored_row_holds_reaches_nothing(backend):
    query, key, target = rows(5, 8), rows(7, 8).requires_grad_(), torch.tensor([0, 1, -100, 3, 4])
    found = []
    for rest in (0.0, float("nan")):
        given = query.clone()
        given[2] = rest
        loss = token_contrastive(given.requires_grad_(), key, target, backend=backend)
        found.append((loss, *torch.autograd.grad(loss, (given, key))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", HERE)
def test_target_outside_its_range_is_a_candidate(backend):
    query, key = rows(2, 8), rows(5, 8)
    options = {"key_start": torch.tensor([0, 3], dtype=torch.int32), "key_end": torch.tensor([2, 3], dtype=torch.int32)}
    target = torch.tensor([4, 0])
    scores = token_similarity(query, key, target, backend=backend, **options)
    assert scores.isfinite().tolist() == [[True, True, False, False, True], [True, False, False, False, False]]
    losses = token_contrastive(query, key, target, reduction="none", backend=backend, **options)
    assert losses[1] == 0 and losses[0] > 0


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("size", [1e3, 3e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_scores_have_finite_losses_and_gradients(backend, size, dtype):
    """A score of 1e15 is rounded to 1e8: the maximum must be subtracted with the same rounding that it was found with."""
    query = (rows(40, 16) * size).to(dtype).requires_grad_()
    target, key = torch.arange(40), query.detach().flip(0)
    losses = token_contrastive(query, key, target, temperature=0.07, normalize=False, reduction="none", backend=backend)
    losses.sum().backward()
    exact = query.detach().double().requires_grad_()
    F.cross_entropy(exact @ key.double().T / 0.07, target, reduction="sum").backward()
    near = 1e-5 if dtype == torch.float32 else 1e-2
    true = F.cross_entropy(exact @ key.double().T / 0.07, target, reduction="none").float()
    torch.testing.assert_close(losses, true, rtol=near, atol=near * true.max().item())
    torch.testing.assert_close(query.grad.double(), exact.grad, rtol=near, atol=near * exact.grad.abs().max().item())


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("frozen", ["query", "key"])
def test_a_frozen_side_still_trains_its_partner(backend, frozen):
    query, key = rows(9, 8).requires_grad_(frozen != "query"), rows(12, 8).requires_grad_(frozen != "key")
    both = rows(9, 8).requires_grad_(), rows(12, 8).requires_grad_()
    token_contrastive(query, key, torch.arange(9), backend=backend).backward()
    token_contrastive(*both, torch.arange(9), backend=backend).backward()
    assert (query.grad is None) == (frozen == "query") and (key.grad is None) == (frozen == "key")
    trained, reference = (key, both[1]) if frozen == "query" else (query, both[0])
    assert torch.equal(trained.grad, reference.grad)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored_gives_zero_not_nan(backend, reduction):
    query, key = rows(5, 8).requires_grad_(), rows(6, 8).requires_grad_()
    tau = torch.tensor(0.05, requires_grad=True)
    loss = token_contrastive(query, key, torch.full((5,), -100), temperature=tau, reduction=reduction, backend=backend)
    loss.sum().backward()
    assert not loss.any() and not query.grad.any() and not key.grad.any() and tau.grad == 0


@pytest.mark.parametrize("backend", HERE)
def test_what_comes_from_above_to_an_ignored_row_goes_nowhere(backend):
    leaves = rows(9, 8).requires_grad_(), rows(12, 8).requires_grad_(), torch.tensor(0.05, requires_grad=True)
    target = torch.arange(9).where(torch.arange(9) != 2, -100)

    def gradients(from_above):
        losses = token_contrastive(*leaves[:2], target, temperature=leaves[2], reduction="none", backend=backend)
        return torch.autograd.grad(losses, leaves, torch.ones(9).where(target >= 0, from_above))

    assert all(map(torch.equal, gradients(float("nan")), gradients(0.0)))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("length", [1.0, 1e-11])
def test_every_key_far_away_and_a_scaled_loss(backend, length):
    away = rows(1, 16)
    query, key = (length * away.expand(3, 16)).requires_grad_(), (0.01 * rows(4, 16) - away).requires_grad_()
    exact = query.detach().double().requires_grad_(), key.detach().double().requires_grad_()
    target = torch.arange(3)
    (2.0**16 * token_contrastive(query, key, target, temperature=1 / 32, backend=backend)).backward()
    (2.0**16 * token_contrastive(*exact, target, temperature=1 / 32, backend="reference")).backward()
    torch.testing.assert_close(key.grad.double(), exact[1].grad, rtol=1e-3, atol=1e-3 * exact[1].grad.abs().max().item())
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("backend", HERE)
def test_learned_temperature_alone(backend):
    query, key, tau = rows(9, 8), rows(12, 8), torch.tensor(0.07, requires_grad=True)
    loss = token_contrastive(query, key, torch.arange(9), temperature=tau, backend=backend)
    (grad,) = torch.autograd.grad(loss, tau)
    step = 1e-3
    with torch.no_grad():
        up, down = (
            token_contrastive(query, key, torch.arange(9), temperature=0.07 + sign * step, backend=backend)
            for sign in (1, -1)
        )
    assert grad.item() == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-2)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_inputs_stay_finite(backend, dtype):
    big = torch.finfo(dtype).max ** 0.5 / 32 if dtype == torch.float16 else 1e4
    query, key = (rows(20, 64, dtype) * big).requires_grad_(), (rows(30, 64, dtype, 3) * big).requires_grad_()
    with torch.no_grad():
        key[:20] = query  # positives at cosine 1, temperature 0.01: exp(100) and more without care
        query[3] = 0
    loss = token_contrastive(query, key, torch.arange(20), temperature=0.01, backend=backend)
    loss.backward()
    assert loss.isfinite() and query.grad[[0, 1, 2, *range(4, 20)]].isfinite().all() and key.grad.isfinite().all()


@pytest.mark.parametrize("backend", HERE)
def test_gradient_can_be_taken_twice_with_other_upstream_gradients(backend):
    query, key = rows(9, 8).requires_grad_(), rows(12, 8).requires_grad_()
    loss = token_contrastive(query, key, torch.arange(9), backend=backend)
    once = torch.autograd.grad(loss, query, torch.tensor(1.0), retain_graph=True)[0]
    thrice = torch.autograd.grad(loss, query, torch.tensor(3.0), retain_graph=True)[0]
    torch.testing.assert_close(3 * once, thrice)
    assert torch.equal(torch.autograd.grad(loss, query, torch.tensor(1.0))[0], once)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(("scale", "size"), [(1.0, 1), (2.0**11, 4096), (2.0**16, 1)])  # long rows have small gradients
def test_float16_keeps_the_gradients_of_a_scaled_loss(backend, scale, size):
    n = 40 if backend == "triton" else 512
    generator = torch.Generator().manual_seed(0)
    query, key = ((size * torch.randn(n, 32, generator=generator)).half().requires_grad_() for _ in range(2))
    (scale * token_contrastive(query, key, torch.arange(n), backend=backend)).backward()
    exact = [x.detach().double().requires_grad_() for x in (query, key)]
    token_contrastive(*exact, torch.arange(n), backend="reference").backward()
    for x, y in zip((query, key), exact, strict=True):
        expected = scale * y.grad
        error = (x.grad.double() - expected).norm() / expected.norm()
        assert error < (0.02 if scale == 1 else 0.002), float(error)  # unscaled, the smallest values are float16's smallest


@pytest.mark.parametrize("backend", HERE)
def test_there_is_no_second_derivative_and_it_says_so(backend):
    query, key = (torch.randn(5, 8, requires_grad=True) for _ in range(2))
    loss = token_contrastive(query, key, torch.arange(5), backend=backend)
    with pytest.raises(RuntimeError, match="cmlm_fast::token_contrastive: expected create_graph to be False"):
        torch.autograd.grad(loss, query, create_graph=True)


def test_autocast_multiplies_in_its_dtype_and_returns_float32():
    query, key = rows(20, 32).requires_grad_(), rows(30, 32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = token_contrastive(query, key, torch.arange(20))
    expected = token_contrastive(query.bfloat16(), key.bfloat16(), torch.arange(20))
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    loss.backward()
    assert query.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("chunked", [(700, 900, 24), (33, 40_000, 16), (5000, 65, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_that_cross_chunks(backend, chunked, dtype):
    n, m, d = chunked
    if backend == "triton":  # interpreted, its panels are small: this still crosses all of them both ways
        n, m = min(n, 200), min(m, 600)
    target = torch.arange(n) % m
    target[::5] = -100
    words = torch.arange(m) % 97
    args = (rows(n, d, dtype), rows(m, d, dtype, 1), target, torch.tensor(0.05), None, None,
            words[target.clamp_min(0)], words, True, "mean", True, True)  # fmt: skip
    assert_no_worse_than_eager("token_contrastive", _SUFFIX[backend], args)


@pytest.mark.parametrize("backend", HERE)
def test_sequence_scope_equals_sequence_by_sequence(backend):
    lengths = [64, 1, 200, 0, 129, 17]
    ends = torch.tensor(lengths).cumsum(0)
    starts = ends - torch.tensor(lengths)
    key = rows(int(ends[-1]), 48)
    owner = torch.repeat_interleave(torch.arange(6), torch.tensor(lengths))
    target = torch.arange(0, int(ends[-1]), 3)
    query = rows(target.numel(), 48)
    got = token_contrastive(query, key, target, key_start=starts[owner[target]].int(), key_end=ends[owner[target]].int(),
                            reduction="none", backend=backend)  # fmt: skip
    for b in range(6):
        own = owner[target] == b
        if own.any():
            part = key[starts[b] : ends[b]]
            alone = token_contrastive(query[own], part, target[own] - starts[b], reduction="none", backend="reference")
            torch.testing.assert_close(got[own], alone, rtol=1e-4, atol=1e-5)
