"""Which tokens are masked in which view: shared by the reference, the kernels' launchers and the trainer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def can_be_masked(ids: Tensor, special: Tensor, eligible: Tensor | None) -> Tensor:
    """Bool, shape of ids: tokens that are eligible and not special."""
    free = ~torch.isin(ids, special)
    return free if eligible is None else eligible & free


def role_bounds(rate: float, complement: float) -> tuple[int, int]:
    """Bernoulli sampling: a unit's word below the first bound gives role 1, else below the second role 2."""
    first = int(rate * 2.0**32)
    return first, first + int((2.0**32 - first) * complement)


def corruption_bounds(mask_share: float, random_share: float) -> tuple[int, int]:
    """A masked token's word below the first bound gives the mask token, else below the second a random token."""
    first = int(mask_share * 2.0**32)
    return first, first + int(random_share * 2.0**32)


def exact_counts(eligible: Sequence[int], rate: float, complement_rate: float) -> tuple[int, int]:
    """Total tokens with role 1 and with role 2 under exact sampling without units; `eligible`: each sequence's count."""

    def count(share: float, of: np.ndarray) -> np.ndarray:
        return np.minimum(np.maximum(np.floor(share * of + 0.5).astype(np.int64), 1 if share > 0 else 0), of)

    n = np.asarray(eligible, dtype=np.int64)
    first = count(rate, n)
    return int(first.sum()), int(count(complement_rate, n - first).sum())


def exact_roles(assignment: Tensor, sequence: Tensor, unit: Tensor, can: Tensor, sequences: int, rate: float,
                complement: float) -> Tensor:  # fmt: skip
    """Exact sampling: in each sequence the k1 units with the smallest (w0, unit id) get role 1, the next k2 role 2."""
    keys, inverse = torch.unique(sequence[can] * 2**32 + unit[can], return_inverse=True)  # sorted by sequence, unit
    word = torch.zeros_like(keys).scatter_(0, inverse, assignment[can])
    by_word = torch.argsort(word, stable=True)
    order = by_word[torch.argsort(keys[by_word] >> 32, stable=True)]
    owner = keys[order] >> 32
    n = torch.bincount(owner, minlength=sequences)
    rank = torch.arange(keys.numel(), device=keys.device) - (n.cumsum(0) - n)[owner]

    def count(share: float, of: Tensor) -> Tensor:
        k = (share * of.double() + 0.5).floor().long()
        return torch.minimum(k.clamp_min(1) if share > 0 else k, of)

    k1 = count(rate, n)
    k2 = count(complement, n - k1)
    roles = (rank < k1[owner]).long() + 2 * ((rank >= k1[owner]) & (rank < (k1 + k2)[owner])).long()
    of_unit = torch.zeros_like(roles).scatter_(0, order, roles)
    return torch.zeros_like(unit).masked_scatter_(can, of_unit[inverse])
