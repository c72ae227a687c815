"""Attention by PyTorch's kernels where the op has none, and over padded batches that need no mask."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cmlm_fast.attention import Packing, attention_forward

# Both views, as in an encoder's row: sequences of equal length are adjacent within each, and recur in the second.
LENGTHS = (7, 4, 4, 1) * 2
MODULE = nn.Module()


def packing(lengths, device="cpu"):
    return Packing(lengths, torch.tensor([0, *lengths], device=device).cumsum(0).int())


def written_out(query, key, value, scale, window):
    """Attention over one sequence [1, heads, T, D], as [1, T, heads, D]."""
    position = torch.arange(query.shape[2])
    far = (position[:, None] - position).abs() >= (window or len(position) + 1)
    scores = (query @ key.mT * scale).masked_fill(far, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 3, 4, 6, 7, 50])
def test_packed_sequences_are_each_by_itself(window):
    torch.manual_seed(0)
    rows = torch.randn(3, 1, 2, sum(LENGTHS), 4, dtype=torch.float64, requires_grad=True)
    ours, mask = attention_forward(MODULE, *rows, None, scaling=0.3, sliding_window=window, packing=packing(LENGTHS))
    exact = torch.cat([written_out(*part, 0.3, window) for part in rows.split(LENGTHS, 3)], 1)
    assert mask is None
    torch.testing.assert_close(ours, exact)
    weight = torch.randn_like(exact)
    torch.testing.assert_close(*(torch.autograd.grad(out, rows, weight)[0] for out in (ours, exact)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("width", [136, 264])  # flash attention takes up to 256
def test_wide_heads_on_a_gpu(width):
    rows = torch.randn(3, 1, 2, sum(LENGTHS), width, dtype=torch.bfloat16, device="cuda")
    ours, _ = attention_forward(MODULE, *rows, None, scaling=0.05, packing=packing(LENGTHS, "cuda"))
    exact = torch.cat([written_out(*part, 0.05, None) for part in rows.cpu().float().split(LENGTHS, 3)], 1)
    torch.testing.assert_close(ours.cpu().float(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("lengths", [(5, 0, 3, 0), (0, 5, 5, 0, 0, 5), (0,), ()])
def test_empty_sequences_take_no_others_place(lengths):
    rows = torch.randn(3, 1, 2, sum(lengths), 4)
    ours, _ = attention_forward(MODULE, *rows, None, scaling=0.3, packing=packing(lengths))
    full = tuple(filter(None, lengths))
    expected, _ = attention_forward(MODULE, *rows, None, scaling=0.3, packing=packing(full))
    assert ours.shape == (1, sum(lengths), 2, 4) and torch.equal(ours, expected)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_a_padded_batch_without_a_mask(window):
    torch.manual_seed(0)
    rows = torch.randn(3, 2, 2, 6, 4, dtype=torch.float64)
    ours, _ = attention_forward(MODULE, *rows, None, scaling=0.3, sliding_window=window)
    torch.testing.assert_close(ours, written_out(*rows, 0.3, window))


def test_dropout_of_packed_sequences():
    # Scores are equal and values are unit vectors, so the output is the weights.
    scores = torch.zeros(1, 2, 400, 40)
    value = torch.eye(40).repeat(10, 1).expand(1, 2, -1, -1)
    torch.manual_seed(0)
    one, two = (attention_forward(MODULE, scores, scores, value, None, dropout=0.3, packing=packing((40,) * 10))[0]
                for _ in range(2))  # fmt: skip
    assert (one != 0).double().mean().item() == pytest.approx(0.7, abs=0.02)
    assert ((one != 0) & (two != 0)).double().mean().item() == pytest.approx(0.49, abs=0.02)
    torch.testing.assert_close(one[one != 0].unique(), torch.tensor([1 / 40 / 0.7]))
