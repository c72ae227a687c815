"""The losses as modules, and the CMLM objective over two views of a batch (arXiv 2106.02327).

    L = mlm_weight · L_mlm + token_weight · L_token + sequence_weight · L_sequence

    L_mlm       mean cross entropy over the masked tokens; the LM head runs only there
    L_token     mean over the masked tokens of both views: each against the same token seen in the other view
    L_sequence  mean over the sequences: the vectors of one sequence's views against those of the other sequences

Each part is returned as a sum with its count, so that a mean can span more than one batch: with gradient accumulation and
on several ranks, everything that the optimizer step saw.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._library import is_traced
from .config import CMLMConfig
from .ops import info_nce, token_contrastive
from .ops._rows import take_rows

if TYPE_CHECKING:
    from .gradient_cache import CachedContrast

#: The parts of the objective, in the order of every tensor with one entry per part.
PARTS = ("mlm", "token", "sequence")

_MOST_LOGIT_SCALE = math.log(100.0)


class _Temperature(nn.Module):
    """τ: a number, or learned as a logit scale log(1/τ), clamped to at most log 100."""

    def __init__(self, owner: str, temperature: float, learn: bool) -> None:
        super().__init__()
        least = 0.01 if learn else 0.0
        number = isinstance(temperature, Real) and not isinstance(temperature, bool)
        rule = "a number, finite and > 0" + (", at least 0.01 if learned" if learn else "")
        if not (number and least <= temperature < math.inf and temperature > 0):
            raise ValueError(f"{owner}: expected temperature to be {rule}, got {temperature}")
        self.start = temperature
        # One element, since FSDP does not shard scalars.
        self.logit_scale = nn.Parameter(torch.tensor([-math.log(temperature)])) if learn else None

    def reset(self) -> None:
        """Reset the learned temperature to its initial value."""
        if self.logit_scale is not None:
            with torch.no_grad():
                self.logit_scale.fill_(-math.log(self.start))

    def extra_repr(self) -> str:
        return f"initial={self.start}, learn={self.logit_scale is not None}"

    def clamp(self) -> None:
        if self.logit_scale is not None:
            with torch.no_grad():
                self.logit_scale.clamp_(max=_MOST_LOGIT_SCALE)

    def forward(self) -> float | Tensor:
        if self.logit_scale is None:
            return self.start
        self.clamp()
        return torch.exp(-self.logit_scale).squeeze(0)


def _check_options(owner: str, op: Any, given_later: tuple[str, ...], options: dict[str, Any]) -> None:
    """Raise TypeError for an option that `op` lacks, or that `forward` supplies."""
    try:
        signature(op).bind_partial(*given_later, temperature=None, **options)
    except TypeError as error:
        raise TypeError(f"{owner}: {error}") from None


class TokenContrastiveLoss(nn.Module):
    """`token_contrastive` with a fixed or learned temperature.

    Args:
        temperature: τ > 0; if learned, its initial value.
        learn_temperature: learn log(1/τ), at most log 100; then τ >= 0.01.
        options: further keyword arguments of `token_contrastive` (normalize, reduction, backend).

    Raises:
        ValueError: an invalid temperature.
        TypeError: an option that `token_contrastive` does not have.

    `temperature()` returns the current τ.

    >>> loss = TokenContrastiveLoss(temperature=0.1, learn_temperature=True)
    >>> loss(torch.eye(3), torch.eye(3), torch.arange(3)).backward()
    >>> loss.temperature.logit_scale.grad is not None
    True
    """

    def __init__(self, temperature: float = 0.05, learn_temperature: bool = False, **options: Any) -> None:
        super().__init__()
        self.temperature = _Temperature(type(self).__name__, temperature, learn_temperature)
        _check_options(type(self).__name__, token_contrastive, ("query", "key", "target"), options)
        self.options = options

    def forward(self, query: Tensor, key: Tensor, target: Tensor, **options: Any) -> Tensor:
        """query [N, D], key [M, D], target int64 [N]; `options` as for `token_contrastive`."""
        return token_contrastive(query, key, target, temperature=self.temperature(), **{**self.options, **options})


class InfoNCELoss(nn.Module):
    """`info_nce` with a fixed or learned temperature.

    Args:
        temperature, learn_temperature: as for `TokenContrastiveLoss`.
        options: further keyword arguments of `info_nce` (scheme, symmetric, normalize, reduction, group, backend).

    Raises:
        ValueError: an invalid temperature.
        TypeError: an option that `info_nce` does not have.

    >>> round(InfoNCELoss(temperature=0.5)(torch.eye(4), torch.eye(4)).item(), 4)
    0.3408
    """

    def __init__(self, temperature: float = 0.05, learn_temperature: bool = False, **options: Any) -> None:
        super().__init__()
        self.temperature = _Temperature(type(self).__name__, temperature, learn_temperature)
        _check_options(type(self).__name__, info_nce, ("z1", "z2"), options)
        self.options = options

    def forward(self, z1: Tensor, z2: Tensor, **options: Any) -> Tensor:
        """z1, z2 [B, D]; `options` as for `info_nce`."""
        return info_nce(z1, z2, temperature=self.temperature(), **{**self.options, **options})


class Views(NamedTuple):
    """Two views of B sequences with T tokens in all, packed end to end or flattened from a padded batch.

    Attributes:
        hidden1, hidden2: [T, D], last hidden states.
        z1, z2: [B, E], one vector per sequence.
        input_ids: int64 [T].
        role: uint8 [T], as from `complementary_mask`, and 3 = 1 | 2 for a token that independent masks hide in both views.
        eligible: bool [T], the tokens that may be masked.
        cu_seqlens: int32 [B + 1].
        sizes: numbers of tokens with role 1, with role 2, and eligible, if the host knows them: finding the tokens then needs
            no wait for the device.
    """

    hidden1: Tensor
    hidden2: Tensor
    z1: Tensor
    z2: Tensor
    input_ids: Tensor
    role: Tensor
    eligible: Tensor
    cu_seqlens: Tensor
    sizes: tuple[int, int, int] | None = None


class Anchors(NamedTuple):
    """The masked tokens of one view against the eligible tokens of the other: the arguments of `token_contrastive`."""

    query: Tensor
    key: Tensor
    target: Tensor
    options: dict[str, Tensor]


def _places(mask: Tensor, size: int | None) -> Tensor:
    """Positions where `mask` [T] is true, int64, in order; given their number `size`, nothing waits for the device."""
    if size is None:
        return mask.nonzero()[:, 0]
    if mask.device.type == "cpu" and not is_traced():
        count = np.count_nonzero(mask.numpy())
        if count != size:  # nonzero_static would silently drop tokens, or repeat the last one
            raise ValueError(f"CMLMModel: expected sizes to count tokens by role, here {count}, got {size}")
    return torch.nonzero_static(mask, size=size)[:, 0]


class CMLMLoss(nn.Module):
    """The parts of the objective, each as the sum behind its mean (see the formula at the top of this module).

    Args:
        config: weights, temperatures, scope, scheme.

    >>> config, rows = CMLMConfig.from_preset("seq", sequence_temperature=0.5), torch.zeros(4, 3)
    >>> role, bounds = torch.zeros(4, dtype=torch.uint8), torch.tensor([0, 2, 4], dtype=torch.int32)  # two sequences
    >>> views = Views(rows, rows, torch.eye(2), torch.eye(2), torch.arange(4), role, role == 0, bounds)
    >>> loss = CMLMLoss(config)
    >>> sums, counts = loss(views, mlm_sum=lambda hidden, target: hidden.sum()), loss.counts(role, sequences=2)
    >>> round(loss.total(sums, counts).item(), 4)  # log(1 + exp(-1 / 0.5))
    0.1269
    """

    def __init__(self, config: CMLMConfig) -> None:
        super().__init__()
        self.config = config
        learn = config.learn_temperature
        self.token = TokenContrastiveLoss(config.token_temperature, learn and config.token_weight > 0, reduction="sum")
        self.sequence = InfoNCELoss(config.sequence_temperature, learn and config.sequence_weight > 0,
                                    scheme=config.scheme, reduction="sum")  # fmt: skip

    def forward(self, views: Views, mlm_sum: Callable[[Tensor, Tensor], Tensor], group: Any = None,
                cached: CachedContrast | None = None) -> Tensor:  # fmt: skip
        """Sums of the parts, [3] in the order of `PARTS`; a part of weight 0 is 0.

        Args:
            views: the encoder's output for both views.
            mlm_sum: (hidden [n, D], target int64 [n]) -> summed cross entropy of the LM head.
            group: process group whose ranks supply negatives to the sequence part. That part's value is then this rank's share
                of the sum over all ranks, and z1, z2 get the gradient of the whole.
            cached: this batch's part of a larger batch's contrast; replaces the contrast within this batch.
        """
        zero = views.hidden1.new_zeros((), dtype=torch.float32)
        mlm = token = sequence = zero
        if self.config.mlm_weight > 0:
            mlm = mlm_sum(*self.masked_tokens(views))
        if self.config.token_weight > 0:
            for anchors in self.anchors(views):
                token = token + self.token(anchors.query, anchors.key, anchors.target, **anchors.options)
        if cached is not None:
            sequence = cached.sequence_sum(views.z1, views.z2, self.sequence.temperature.logit_scale)
        elif self.config.sequence_weight > 0:
            sequence = self.sequence_sum(views.z1, views.z2, group)
        return torch.stack([mlm, token, sequence])

    def clamp_temperatures(self) -> None:
        """Clamp learned temperatures to their range. FSDP shards must be clamped outside the forward pass, which has copies."""
        self.token.temperature.clamp()
        self.sequence.temperature.clamp()

    def sequence_sum(self, z1: Tensor, z2: Tensor, group: Any = None) -> Tensor:
        """The sequence part of vectors [B, E]; with `group` as in `forward`."""
        sequence: Tensor = self.sequence(z1, z2, group=group)
        if group is None:
            return sequence
        return sequence.detach() / dist.get_world_size(group) + (sequence - sequence.detach())

    def counts(self, role: Tensor, sequences: int) -> Tensor:
        """The counts that the parts are means over, int64 [3]: masked tokens, anchors, rows of the sequence contrast."""
        first, second = (role & 1).sum(), (role >> 1).sum()
        masked = first + second if self.config.mlm_views == "both" else first
        anchors = ((role == 1) | (role == 2)).sum()
        rows = sequences * (2 if self.config.scheme == "nt_xent" else 1)
        return torch.stack([masked, anchors, torch.full_like(first, rows)])

    def total(self, sums: Tensor, counts: Tensor) -> Tensor:
        """The objective, a scalar, from the parts' sums and counts."""
        means = (sums / counts.clamp_min(1)).unbind()
        weights = (self.config.mlm_weight, self.config.token_weight, self.config.sequence_weight)
        # Numbers, not a tensor of them: the host would wait for its copy to the device.
        return sum((weight * mean for weight, mean in zip(weights, means, strict=True)), sums.new_zeros(()))

    def masked_tokens(self, views: Views) -> tuple[Tensor, Tensor]:
        """Hidden states [n, D] and tokens [n] of the positions that MLM predicts: view 1's, then view 2's."""
        sizes = views.sizes or (None, None, None)
        masked = [(views.hidden1, _places((views.role & 1).bool(), sizes[0]))]
        if self.config.mlm_views == "both":
            masked.append((views.hidden2, _places((views.role & 2).bool(), sizes[1])))
        hidden = torch.cat([take_rows(states, where) for states, where in masked])
        return hidden, torch.cat([views.input_ids[where] for _, where in masked])

    def anchors(self, views: Views) -> tuple[Anchors, Anchors]:
        """The two directions of the token contrast: view 1's masked tokens in view 2, and the reverse."""
        sizes = views.sizes or (None, None, None)
        keys = _places(views.eligible, sizes[2])
        seen = torch.nn.functional.pad(views.eligible.cumsum(0), (1, 0))  # eligible tokens before each position
        tokens = views.input_ids[keys]

        def direction(role: int, masked: Tensor, other: Tensor) -> Anchors:
            where = _places(views.role == role, sizes[role - 1])
            options: dict[str, Tensor] = {}
            if self.config.exclude_same_token:
                options |= {"query_token": views.input_ids[where], "key_token": tokens}
            if self.config.scope == "sequence":
                owner = torch.bucketize(where, views.cu_seqlens.long(), right=True) - 1
                bounds = seen[views.cu_seqlens.long()].int()
                options |= {"key_start": bounds[owner], "key_end": bounds[owner + 1]}
            return Anchors(take_rows(masked, where), take_rows(other, keys), seen[where], options)

        return direction(1, views.hidden1, views.hidden2), direction(2, views.hidden2, views.hidden1)
