"""Every op on every backend, dtype and sample: equal to the truth as far as its contract says, and deterministic."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from sweep import EVERY, FEW, GRADIENTS, cases, sample

from cmlm_fast._library import contracts, op
from cmlm_fast.testing import assert_no_worse_than_eager, poisoned_memory, value_and_gradients


@pytest.mark.parametrize(EVERY, cases())
def test_equals_the_truth(name, suffix, device, dtype, label):
    args = sample(name, dtype, device, label)
    with poisoned_memory():
        if contracts[name].exact:
            expected, got = op(name, "_reference")(*args), op(name, suffix)(*args)
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
        else:
            assert_no_worse_than_eager(name, suffix, args)


@pytest.mark.parametrize(EVERY, cases((torch.float32, torch.bfloat16, torch.int64), FEW))
def test_same_bits_every_time(name, suffix, device, dtype, label):
    args = sample(name, dtype, device, label)
    first, again = op(name, suffix)(*args), op(name, suffix)(*args)
    pairs = zip(first, again, strict=True) if isinstance(first, tuple) else [(first, again)]
    assert all(torch.equal(a, b) for a, b in pairs)


def flags(args: tuple, first: bool, second: bool) -> tuple:
    return (*args[:-2], first, second)


CONTRASTS = [case for case in cases((torch.float32,), GRADIENTS) if case.values[0] in ("token_contrastive", "info_nce")]


@pytest.mark.parametrize(EVERY, CONTRASTS)
def test_only_wanted_gradients_are_made(name, suffix, device, dtype, label):
    args = sample(name, dtype, device, label)
    both = op(name, suffix)(*args)
    for wanted in ((True, False), (False, True), (False, False)):
        some = op(name, suffix)(*flags(args, *wanted))
        assert torch.equal(both[0], some[0])
        for flag, whole, part in zip(wanted, both[1:3], some[1:3], strict=True):
            assert torch.equal(part, whole) if flag else part.shape == (0,)


SCORES = [case for case in cases((torch.float32, torch.bfloat16, torch.float16), GRADIENTS)
          if case.values[0] in ("token_similarity", "info_nce")]  # fmt: skip


@cache
def reaches_the_row_before(dtype):
    """Whether NaN in one row makes another row of torch's own product NaN, as oneDNN with AMX does if the depth is odd."""
    rows = torch.ones(130, 33, dtype=dtype)
    rows[65, 0] = float("nan")
    return (rows @ torch.ones(257, 33, dtype=dtype).T)[:65].isnan().any().item()


@pytest.mark.parametrize(EVERY, SCORES)
def test_what_is_no_number_stays_none(name, suffix, device, dtype, label):
    args = sample(name, dtype, device, label)
    rows = args[0].clone()
    rows[len(rows) // 2 :][:1, 0] = float("nan")
    got, expected = (value_and_gradients(op(name, kind), name, (rows, *args[1:])) for kind in (suffix, "_reference"))
    for ours, none in zip((x.isnan() for x in got[:3]), (x.isnan() for x in expected[:3]), strict=True):
        assert torch.equal(ours | none, ours) if reaches_the_row_before(dtype) else torch.equal(ours, none)
