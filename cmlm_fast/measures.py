"""Measures beyond the losses: can the encoder tell a masked token, and a sequence, from the others?

Every measure is a sum and a count, so that batches and ranks add up. Measures cost matrix products of their own and are taken
only on logged steps and on held-out text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor

from .ops import token_similarity

if TYPE_CHECKING:
    from .losses import Views

_ROWS = 1024  # rows of a score matrix at a time


class Sums:
    """Sums and counts by name, accumulated on the device and read once."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, found: Mapping[str, Tensor]) -> None:
        """Add further sums and counts, [2] each."""
        for name, pair in found.items():
            self.values[name] = self.values[name] + pair if name in self.values else pair

    def read(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Return means over all ranks (`reduce` sums a tensor over them) and reset the sums."""
        names = sorted(set(gather_object(list(self.values))))  # a rank may have nothing to measure
        if not names:
            return {}
        nothing = torch.zeros(2, dtype=torch.float64)
        totals = reduce(torch.stack([self.values.get(name, nothing).to(device).double() for name in names])).tolist()
        self.values = {}
        means = {name: total / count for name, (total, count) in zip(names, totals, strict=True) if count}
        if kernel := means.pop("uniformity_kernel", None):
            means["uniformity"] = math.log(kernel)
        return means


@torch.no_grad()
def measure(model: Any, views: Views) -> dict[str, Tensor]:
    """Sums and counts, [2] each, by name.

    masked_accuracy       share of masked tokens that the LM head ranks first
    token_retrieval       share of masked tokens whose nearest candidate is their own position in the other view
    positive_similarity   cosine of a masked token and the same token unmasked
    negative_similarity   cosine of a masked token and its other candidates, mean
    sequence_retrieval    share of sequences whose nearest second view is their own
    alignment             ‖z1 − z2‖² of the unit vectors, mean (Wang and Isola 2020)
    uniformity_kernel     exp(−2‖z_i − z_j‖²) of different sequences, mean; its logarithm is the uniformity
    """
    found: dict[str, Tensor] = {}
    if model.cmlm.mlm_weight > 0:
        hidden, target = model.loss.masked_tokens(views)
        parts = zip(hidden.split(_ROWS), target.split(_ROWS), strict=True)
        hits = sum((model.logits(h).argmax(-1) == t).sum() for h, t in parts)
        found["masked_accuracy"] = _pair(hits, target.numel(), hidden)
    if (views.role > 0).any():
        found |= _tokens(model, views)
    z1, z2 = F.normalize(views.z1.float(), dim=-1), F.normalize(views.z2.float(), dim=-1)
    own = torch.arange(z1.shape[0], device=z1.device)
    between = z1 @ z2.T
    found["sequence_retrieval"] = _pair((between.argmax(1) == own).sum(), own.numel(), z1)
    found["alignment"] = _pair((2 - 2 * between.diagonal()).sum(), own.numel(), z1)
    kernel = torch.exp(-2 * (2 - 2 * (z1 @ z1.T))).fill_diagonal_(0.0)
    found["uniformity_kernel"] = _pair(kernel.sum(), own.numel() * (own.numel() - 1), z1)
    return found


def _tokens(model: Any, views: Views) -> dict[str, Tensor]:
    hits = positive = negative = torch.zeros((), device=views.role.device)
    rows = others = 0
    for anchors in model.loss.anchors(views):
        for begin in range(0, anchors.query.shape[0], _ROWS):
            part = slice(begin, begin + _ROWS)
            options = {name: value if name == "key_token" else value[part] for name, value in anchors.options.items()}
            target = anchors.target[part]
            cosine = token_similarity(anchors.query[part], anchors.key, target, temperature=1.0, **options).float()
            own = cosine.gather(1, target[:, None])[:, 0]
            candidate = cosine.isfinite()
            hits = hits + (cosine.argmax(1) == target).sum()
            positive = positive + own.sum()
            negative = negative + torch.where(candidate, cosine, 0.0).sum() - own.sum()
            rows, others = rows + target.numel(), others + candidate.sum() - target.numel()
    return {"token_retrieval": _pair(hits, rows, positive), "positive_similarity": _pair(positive, rows, positive),
            "negative_similarity": _pair(negative, others, positive)}  # fmt: skip


def _pair(total: Any, count: Any, like: Tensor) -> Tensor:
    return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=like.device) for value in (total, count)])
