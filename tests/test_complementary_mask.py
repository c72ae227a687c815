"""complementary_mask alone: the bits of an independent implementation, independence of the batch, rates, counts, units."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmlm_fast import available, complementary_mask
from cmlm_fast.backends import BACKENDS
from cmlm_fast.ops._philox import position_shift
from cmlm_fast.ops._roles import exact_counts

HERE = [backend for backend in BACKENDS if available("complementary_mask")[backend] is None]
SPECIAL = (0, 1, 2, 3)
VOCABULARY = {"mask_token_id": 3, "vocab_size": 1000, "special_ids": SPECIAL}


def random_ids(*shape, seed=0):
    return torch.randint(4, 1000, shape, generator=torch.Generator().manual_seed(seed))


def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 in plain integers, from the paper's round function."""
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def by_hand(ids, units, sample, seed, step, rate, complement, exact, mask_share, random_share):
    """One sequence's (view1, view2, role), token by token."""
    key = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    draw = lambda c: philox(c, step, sample & 0xFFFFFFFF, (sample >> 32) & 0xFFFFFFFF, *key)  # noqa: E731
    eligible = sorted({u for i, u in zip(ids, units, strict=True) if i not in SPECIAL})
    if exact:
        n = len(eligible)
        k1 = min(max(math.floor(rate * n + 0.5), int(n >= 1 and rate > 0)), n)
        k2 = min(max(math.floor(complement * (n - k1) + 0.5), int(n - k1 >= 1 and complement > 0)), n - k1)
        order = sorted(eligible, key=lambda u: (draw(u)[0], u))
        role_of = {u: 1 if r < k1 else 2 if r < k1 + k2 else 0 for r, u in enumerate(order)}
    else:
        t1 = math.floor(rate * 2**32)
        t2 = t1 + math.floor((2**32 - t1) * complement)
        role_of = {u: 1 if draw(u)[0] < t1 else 2 if draw(u)[0] < t2 else 0 for u in eligible}
    m, r = math.floor(mask_share * 2**32), math.floor(random_share * 2**32)
    views, roles = (list(ids), list(ids)), []
    for t, (token, unit) in enumerate(zip(ids, units, strict=True)):
        role = role_of[unit] if token not in SPECIAL else 0
        roles.append(role)
        _, w1, w2, _ = draw(t)
        if role:
            views[role - 1][t] = 3 if w1 < m else (w2 * 1000) >> 32 if w1 < m + r else token
    return *views, roles


def test_philox_known_answers():
    # The known-answer vectors published with the generator (Random123).
    assert philox(0, 0, 0, 0, 0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = [0xFFFFFFFF] * 6
    assert philox(*ones) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    assert philox(*pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@pytest.mark.parametrize("backend", HERE)
@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(0, 40), min_size=0, max_size=5),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**32 - 1),
    rate=st.floats(0, 1),
    complement=st.floats(0, 1),
    exact=st.booleans(),
    shares=st.sampled_from([(0.8, 0.1), (1.0, 0.0), (0.0, 1.0), (0.3, 0.0), (0.0, 0.0)]),
    dtype=st.sampled_from([torch.int64, torch.int32]),
)
def test_bits_equal_an_independent_implementation(
    backend, data, lengths, seed, step, rate, complement, exact, shares, dtype
):
    total = sum(lengths)
    ids = data.draw(st.lists(st.integers(0, 30), min_size=total, max_size=total))
    units = data.draw(st.none() | st.lists(st.integers(0, 12), min_size=total, max_size=total))
    samples = data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=len(lengths), max_size=len(lengths)))
    cu = [0]
    for length in lengths:
        cu.append(cu[-1] + length)
    got = complementary_mask(
        torch.tensor(ids, dtype=dtype), torch.tensor(cu, dtype=torch.int32), rate=rate, complement_rate=complement,
        sampling="exact" if exact else "bernoulli", mask_share=shares[0], random_share=shares[1], seed=seed, step=step,
        sample_ids=torch.tensor(samples, dtype=torch.int64), backend=backend,
        unit_ids=None if units is None else torch.tensor(units, dtype=torch.int32), **VOCABULARY,
    )  # fmt: skip
    for b, (start, end) in enumerate(pairwise(cu)):
        own_units = list(range(end - start)) if units is None else units[start:end]
        expected = by_hand(ids[start:end], own_units, samples[b], seed, step, rate, complement, exact, *shares)
        for tensor, values in zip(got, expected, strict=True):
            assert tensor[start:end].tolist() == list(values)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("sampling", ["exact", "bernoulli"])
def test_a_sequence_masks_the_same_alone_padded_packed_and_in_any_order(backend, sampling):
    ids, lengths = random_ids(6, 50), [50, 3, 17, 1, 29, 44]
    samples = torch.tensor([11, 5, 2**40, 0, 7, 123456])
    options = {"sampling": sampling, "seed": 9, "step": 4, "backend": backend, **VOCABULARY}
    attention = (torch.arange(50) < torch.tensor(lengths)[:, None]).long()
    padded = complementary_mask(ids, attention_mask=attention, sample_ids=samples, **options)
    assert not padded.role[attention == 0].any()
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    packed = complementary_mask(ids[attention == 1], cu, sample_ids=samples, **options)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    shuffled = complementary_mask(ids[order], attention_mask=attention[order], sample_ids=samples[order], **options)
    for b, length in enumerate(lengths):
        alone = complementary_mask(ids[b : b + 1, :length].int(), sample_ids=samples[b : b + 1], **options)
        for one, many, flat, other in zip(alone, padded, packed, shuffled, strict=True):
            assert torch.equal(one[0].long(), many[b, :length].long())
            assert torch.equal(flat[cu[b] : cu[b + 1]], many[b, :length])
            assert torch.equal(other[order.tolist().index(b)], many[b])


def slower(backend):
    """The factor by which to divide a test's samples for interpreted kernels."""
    return 40 if backend == "triton" and not torch.cuda.is_available() else 1


@pytest.mark.parametrize("backend", HERE)
def test_never_masked_in_both_views_and_rates_within_four_sigma(backend):
    ids = random_ids(2000 // slower(backend), 500)
    masked = complementary_mask(ids, sampling="bernoulli", seed=1, backend=backend, **VOCABULARY)
    changed1, changed2 = masked.view1 != ids, masked.view2 != ids
    assert not (changed1 & changed2).any()
    assert not (changed1 & (masked.role != 1)).any() and not (changed2 & (masked.role != 2)).any()
    tokens = ids.numel()

    def near(count, total, share):
        assert abs(int(count) - total * share) <= 4 * math.sqrt(total * share * (1 - share))

    for role, view in ((1, masked.view1), (2, masked.view2)):
        at = masked.role == role
        near(at.sum(), tokens, 0.15)  # complement_rate 0.15/0.85 of the 0.85 left
        near((view[at] == 3).sum(), int(at.sum()), 0.8)
        kept = 0.1 + 0.1 / 1000  # a random id can be the token itself
        near((view[at] == ids[at]).sum(), int(at.sum()), kept)
        random = view[at & (view != 3) & (view != ids)]
        near((random < 500).sum(), random.numel(), 0.5)


@pytest.mark.parametrize("backend", HERE)
def test_steps_samples_and_seeds_are_independent(backend):
    samples = 250 // slower(backend)
    ids = random_ids(1, 400).expand(samples, 400)
    base = {"sampling": "bernoulli", "rate": 0.5, "complement_rate": 0.0, "backend": backend, **VOCABULARY}
    first = complementary_mask(ids, **base).role.bool()
    others = [
        complementary_mask(ids, step=1, **base).role.bool(),
        complementary_mask(ids, seed=1, **base).role.bool(),
        complementary_mask(ids, seed=2**32, **base).role.bool(),
        complementary_mask(ids, sample_ids=torch.arange(samples) + 2**32, **base).role.bool(),
        first.roll(1, 0),  # the next sample
        first.roll(1, 1),  # the next position
    ]
    sigma = math.sqrt(first.numel() / 4)
    for other in others:
        assert abs(int((first == other).sum()) - first.numel() / 2) <= 4.5 * sigma


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(("rate", "complement"), [(0.15, 0.15 / 0.85), (0.15, 0.7), (0.0, 0.5), (1.0, 0.3), (0.4, 0.0)])
def test_exact_counts_follow_from_lengths(backend, rate, complement):
    for length in (1, 2, 3, 4, 9, 64, 127, 1000):
        role = complementary_mask(
            random_ids(3, length), rate=rate, complement_rate=complement, backend=backend, **VOCABULARY
        ).role
        k1 = min(max(math.floor(rate * length + 0.5), int(rate > 0)), length)
        left = length - k1
        k2 = min(max(math.floor(complement * left + 0.5), int(left > 0 and complement > 0)), left)
        assert (role == 1).sum(1).tolist() == [k1] * 3 and (role == 2).sum(1).tolist() == [k2] * 3


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("sampling", ["exact", "bernoulli"])
def test_words_are_masked_whole_and_specials_never(backend, sampling):
    ids = random_ids(8, 96)
    ids[:, 0], ids[:, -1], ids[:, 40] = 1, 2, 0
    words = (torch.arange(96) // 3).int().expand(8, 96).contiguous()
    options = {"sampling": sampling, "rate": 0.3, "backend": backend, **VOCABULARY}
    role = complementary_mask(ids, unit_ids=words, **options).role
    assert not role[torch.isin(ids, torch.tensor(SPECIAL))].any()
    for start in range(0, 96, 3):
        of_word = role[:, start : start + 3]
        allowed = ~torch.isin(ids[:, start : start + 3], torch.tensor(SPECIAL))
        for row, ok in zip(of_word, allowed, strict=True):
            assert row[ok].unique().numel() == 1
    assert role.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("backend", HERE)
def test_bad_values_say_so(backend):
    ids = random_ids(10)
    for cu in ([0, 5], [1, 10], [0, 7, 6, 10], [0, 11]):
        with pytest.raises(RuntimeError, match="expected cu_seqlens to be non-decreasing from 0 to 10, got"):
            complementary_mask(ids, torch.tensor(cu, dtype=torch.int32), backend=backend, **VOCABULARY)
    for bad in (1000, -1):
        ids[4] = bad
        with pytest.raises(RuntimeError, match=rf"expected input_ids to be in \[0, vocab_size = 1000\), got {bad}"):
            complementary_mask(ids[None], backend=backend, **VOCABULARY)
    units = torch.arange(10, dtype=torch.int32)
    units[7] = -2
    where = torch.ones(10, dtype=torch.bool)
    where[4] = False  # an id that cannot be masked is not checked: padding may be -1
    padded = torch.tensor([[-1, *range(10, 18), 1000]])
    for sampling in ("exact", "bernoulli"):
        with pytest.raises(RuntimeError, match="expected unit_ids to be >= 0, got -2"):
            complementary_mask(random_ids(1, 10), unit_ids=units[None], sampling=sampling, backend=backend, **VOCABULARY)
        with pytest.raises(RuntimeError, match=r"expected input_ids to be in \[0, vocab_size = 1000\), got 1000"):
            complementary_mask(padded, sampling=sampling, backend=backend, **{**VOCABULARY, "special_ids": (-1, 3)})
        masked = complementary_mask(ids[None], eligible=where[None], sampling=sampling, backend=backend, **VOCABULARY)
        assert masked.role[0, 4] == 0 and masked.view1[0, 4] == masked.view2[0, 4] == -1
        assert torch.equal(masked.view1[masked.role != 1], ids[None][masked.role != 1])


@pytest.mark.parametrize(
    ("argument", "value"),
    [("rate", 1.5), ("rate", -0.1), ("rate", float("nan")), ("complement_rate", 2.0), ("mask_share", 1.1),
     ("random_share", 0.3), ("sampling", "gumbel"), ("step", -1), ("step", 2**32), ("vocab_size", 0),
     ("mask_token_id", 1000), ("special_ids", tuple(range(17))), ("unit_ids", torch.zeros(3, 4)),
     ("attention_mask", torch.ones(3, 4)), ("sample_ids", torch.zeros(3, dtype=torch.int32)), ("backend", "numpy")],
)  # fmt: skip
def test_bad_arguments_say_so(argument, value):
    with pytest.raises(ValueError, match=rf"cmlm_fast::complementary_mask: expected .*{argument}.* to be .+, got"):
        complementary_mask(random_ids(2, 8), **{**VOCABULARY, argument: value})


def test_views_of_larger_tensors_are_taken_as_they_are():
    ids = torch.arange(5, 85).view(4, 20)
    plain = {"mask_token_id": 3, "vocab_size": 100, "special_ids": (0, 1, 2, 3)}
    table = torch.tensor([[7, 0], [9, 0], [1, 0], [4, 0]])
    cu = torch.tensor([0, 1, 10, 2, 40], dtype=torch.int32)[::2]
    strided = complementary_mask(ids.flatten()[::2], cu, sample_ids=table[:2, 0], **plain)
    dense = complementary_mask(ids.flatten()[::2].clone(), torch.tensor([0, 10, 40], dtype=torch.int32),
                               sample_ids=torch.tensor([7, 9]), **plain)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


@pytest.mark.parametrize("ids", [torch.arange(5, 25).view(2, 10), torch.arange(5, 26).view(3, 7)])
def test_fake_tensors_are_not_kept_for_later_calls(ids):
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    def mask(ids):  # with special ids that no other call uses
        return complementary_mask(ids, mask_token_id=3, vocab_size=30, special_ids=(3, 29, len(ids), -7)).view1

    with FakeTensorMode(allow_non_fake_inputs=True):
        mask(ids)
    make_fx(mask)(ids)
    assert type(mask(ids)) is torch.Tensor and mask(ids).sum() > 0


def test_a_seed_of_numpy():
    import numpy as np

    ids = random_ids(2, 20)
    for seed in (5, -5):
        views = (complementary_mask(ids, seed=kind(seed), **VOCABULARY).view1 for kind in (int, np.int64))
        assert torch.equal(*views)


def test_position_shift_is_uniform_and_bounded():
    shift = position_shift(torch.arange(40_000), jitter=3, seed=5, step=1)
    assert shift.min() >= 0 and shift.max() <= 3
    counts = shift.bincount(minlength=4)
    assert ((counts - 10_000).abs() < 4 * math.sqrt(40_000 * 0.25 * 0.75)).all()
    assert not position_shift(torch.arange(100), jitter=0, seed=5, step=1).any()


@pytest.mark.parametrize("backend", HERE)
def test_units_of_one_random_word_are_in_the_order_of_their_ids(backend):
    tied = 370055, 381083  # units whose first Philox words are equal for seed 0, step 0, sample 0
    assert len({philox(unit, 0, 0, 0, 0, 0)[0] for unit in tied}) == 1
    for order, roles in ((tied, [1, 0]), (tied[::-1], [0, 1])):
        masked = complementary_mask(torch.tensor([[5, 6]]), unit_ids=torch.tensor([order], dtype=torch.int32), rate=0.5,
                                    complement_rate=0.0, backend=backend, **VOCABULARY)  # fmt: skip
        assert masked.role[0].tolist() == roles


@pytest.mark.parametrize("backend", HERE)
def test_sequences_are_numbered_from_0_where_nothing_else_is_said(backend):
    ids, bounds = random_ids(4, 20), torch.tensor([0, 20, 40, 60, 80], dtype=torch.int32)
    for args in ((ids,), (ids.flatten(), bounds)):
        own, given = (complementary_mask(*args, backend=backend, **more, **VOCABULARY)
                      for more in ({}, {"sample_ids": torch.arange(4)}))  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(own, given, strict=True)) and own.role.any()


def test_the_host_counts_what_the_op_masks():
    for rate, complement in ((0.15, 0.15 / 0.85), (0.5, 0.5), (0.0, 0.3), (1.0, 0.5), (0.3, 0.0)):
        for length in range(1, 40):
            role = complementary_mask(torch.full((1, length), 7), rate=rate, complement_rate=complement, **VOCABULARY).role
            assert exact_counts([length], rate, complement) == ((role == 1).sum(), (role == 2).sum()), (rate, length)


def test_pads_are_never_masked_where_other_tokens_are_ineligible_too():
    ids, attention = torch.full((2, 10), 7), torch.tensor([[1] * 10, [1] * 4 + [0] * 6])
    role = complementary_mask(ids, attention_mask=attention, eligible=torch.ones_like(ids, dtype=torch.bool), rate=0.5,
                              complement_rate=1.0, **VOCABULARY).role  # fmt: skip
    assert not role[attention == 0].any() and (role[attention == 1] > 0).all()
