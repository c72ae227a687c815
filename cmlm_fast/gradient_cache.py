"""Contrast over more sequences than one encoder pass holds, with the gradient of the large batch.

    1  run each micro-batch without a graph for its vectors z1, z2; keep the random state before it
    2  compute the sequence loss of all these vectors, and its gradient with respect to each
    3  run each micro-batch again from its random state, with a graph; its sequence part is Σ z · gradient, whose gradient
       with respect to the weights is the large batch's

Masks are part of the batch and dropout follows the random state, so both passes see the same. The cost is one more forward
pass.
Source: Gao, Zhang, Han, Callan 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (GradCache).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .losses import CMLMLoss


@dataclass(frozen=True)
class CachedContrast:
    """What step 2 found for one micro-batch.

    by_z1, by_z2 [B, D] are gradients; share and by_scale are equal shares of the loss (a sum over sequences) and of its
    gradient with respect to the learned temperature's logit scale: the optimizer step adds them all up.
    """

    share: Tensor
    by_z1: Tensor
    by_z2: Tensor
    by_scale: Tensor | None

    def sequence_sum(self, z1: Tensor, z2: Tensor, logit_scale: Tensor | None) -> Tensor:
        """A scalar of value `share` with the large batch's gradient."""
        line = (z1.float() * self.by_z1).sum() + (z2.float() * self.by_z2).sum()
        if logit_scale is not None and self.by_scale is not None:
            line = line + (logit_scale * self.by_scale).sum()
        return self.share + (line - line.detach())


class GradientCache:
    """The micro-batches of one optimizer step, contrasted `size` at a time.

    Args:
        batches: masked batches, as `CMLMModel.forward` takes them.
        size: number of micro-batches whose sequences are each other's negatives.
        loss: the model's `CMLMLoss`.
        group: process group whose ranks share their negatives.
        autocast: returns the context in which the model computes its loss.
    """

    def __init__(self, batches: Sequence[Mapping[str, Any]], size: int, loss: CMLMLoss, group: Any,
                 autocast: Callable[[], AbstractContextManager[Any]]) -> None:  # fmt: skip
        self.batches, self.size, self.loss, self.group, self.autocast = batches, size, loss, group, autocast
        self.states: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.found: dict[int, CachedContrast] = {}

    def replay(self, model: nn.Module, at: int) -> CachedContrast:
        """Run steps 1 and 2 if micro-batch `at` begins a new contrast; then restore the random state of its first pass."""
        if at % self.size == 0:
            self._fill(model, range(at, min(at + self.size, len(self.batches))))
        _set_random_state(self.states.pop(at))
        return self.found.pop(at)

    def _fill(self, model: nn.Module, members: range) -> None:
        vectors = []
        with torch.no_grad():
            for at in members:
                self.states[at] = _random_state()
                vectors.append(model(**self.batches[at], vectors_only=True))
        rows = [len(z1) for z1, _ in vectors]
        z1, z2 = (torch.cat(z).requires_grad_() for z in zip(*vectors, strict=True))
        scale = self.loss.sequence.temperature.logit_scale
        with torch.enable_grad(), self.autocast():
            total = self.loss.sequence_sum(z1, z2, self.group)
        by_z1, by_z2, *by_scale = torch.autograd.grad(total, [z1, z2, *([] if scale is None else [scale])])
        share = total.detach() / len(rows)
        learned = by_scale[0] / len(rows) if by_scale else None
        for at, first, second in zip(members, by_z1.float().split(rows), by_z2.float().split(rows), strict=True):
            self.found[at] = CachedContrast(share, first, second, learned)


def _random_state() -> tuple[Tensor, Tensor | None]:
    """State of the CPU's generator and, if there is one, the current accelerator's."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.get_rng_state(), None if device is None else torch.get_device_module(device).get_rng_state()


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.get_device_module(torch.accelerator.current_accelerator()).set_rng_state(state[1])
