"""What each of several ranks sees of an epoch: together what one process would, nothing twice."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import Sampler


class RankShare(Sampler[list[int]]):
    """Deals the batches of one process to the ranks in turn: rank r gets batches r, r + ranks, r + 2·ranks, ...

    Where the last round has fewer batches than ranks, or a short one, the usual samplers repeat samples of the first batch to
    fill it up, which then count twice in every mean. Here a rank without a batch gets an empty list, for which
    `CMLMDataCollator` makes a stand-in that counts for nothing; so all ranks make the same number of steps, and a step on R
    ranks is the step of one process that accumulates R batches.

    Args:
        batches: sampler of lists of indices, the same on every rank.
        rank, ranks: this process and the number of all.
        drop_last: leave the last round out where it is not full.

    >>> list(RankShare([[4, 0], [3, 1], [2]], rank=1, ranks=2))
    [[3, 1], []]
    """

    def __init__(self, batches: Any, rank: int, ranks: int, drop_last: bool = False) -> None:
        self.batches = batches
        self.rank, self.ranks, self.drop_last = rank, ranks, drop_last

    @property
    def sampler(self) -> Any:
        """The sampler of indices, which accelerate tells the epoch."""
        return self.batches.sampler

    def __len__(self) -> int:
        return len(self.batches) // self.ranks if self.drop_last else -(-len(self.batches) // self.ranks)

    def __iter__(self) -> Iterator[list[int]]:
        rounds = iter(self.batches)
        while batches := list(islice(rounds, self.ranks)):
            if len(batches) == self.ranks or not self.drop_last:
                yield batches[self.rank] if self.rank < len(batches) else []
