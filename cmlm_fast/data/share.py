"""Divide an epoch among ranks: together they see what one process would, and nothing twice."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Sampler

if TYPE_CHECKING:
    from transformers import TrainingArguments


class RankShare(Sampler[list[int]]):
    """Deal one process's batches to the ranks in turn: rank r gets batches r, r + ranks, r + 2·ranks, ...

    If the last round has fewer batches than ranks, or a short batch, the usual samplers fill it up with samples of the first
    batch, which then count twice in every mean. Here a rank without a batch gets an empty list, for which `CMLMDataCollator`
    makes a stand-in that counts for nothing. So all ranks make the same number of steps, and a step on R ranks equals the
    step of one process that accumulates R batches.

    Args:
        batches: sampler of lists of indices, the same on every rank.
        rank, ranks: this process's rank, and the number of ranks.
        drop_last: drop the last round unless it is full.

    >>> list(RankShare([[4, 0], [3, 1], [2]], rank=1, ranks=2))
    [[3, 1], []]
    """

    def __init__(self, batches: Any, rank: int, ranks: int, drop_last: bool = False) -> None:
        self.batches = batches
        self.rank, self.ranks, self.drop_last = rank, ranks, drop_last

    @property
    def sampler(self) -> Any:
        """The sampler of indices, on which accelerate sets the epoch."""
        return self.batches.sampler

    def __len__(self) -> int:
        return len(self.batches) // self.ranks if self.drop_last else -(-len(self.batches) // self.ranks)

    def __iter__(self) -> Iterator[list[int]]:
        rounds = iter(self.batches)
        while batches := list(islice(rounds, self.ranks)):
            if len(batches) == self.ranks or not self.drop_last:
                yield batches[self.rank] if self.rank < len(batches) else []


def share_loader(loader: DataLoader[Any], args: TrainingArguments, drop_last: bool = False) -> DataLoader[Any]:
    """The Trainer's loader; with several ranks `RankShare` deals out its batches.

    Batches stay on the host: accelerate would copy them and wait for all pending work of the device; `CMLMTrainer.mask` does
    not wait.

    Raises:
        ValueError: several ranks with a stream, with batches dispatched by rank 0, or with split batches.
    """
    from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, prepare_data_loader

    if args.world_size == 1:
        if isinstance(loader, DataLoaderShard):
            loader.device = None
        return loader
    shard = loader.batch_sampler
    if args.accelerator_config.split_batches:
        raise ValueError("CMLMTrainer: expected accelerator_config to be one without split_batches, since "
                         "per_device_train_batch_size is of each rank; got split_batches True")  # fmt: skip
    if not isinstance(shard, BatchSamplerShard):
        rule = "one with a length, without dispatch_batches, where several ranks share it"
        raise ValueError(f"CMLMTrainer: expected dataset to be {rule}, got {type(loader.dataset).__name__}")
    batches = RankShare(shard.batch_sampler, args.process_index, args.world_size, drop_last=drop_last)
    names = ("collate_fn", "num_workers", "pin_memory", "worker_init_fn", "prefetch_factor", "persistent_workers", "in_order",
             "multiprocessing_context")  # fmt: skip
    options: dict[str, Any] = {name: getattr(loader, name) for name in names}
    # The sampler knows its rank. accelerate is told of one process, or it would deal the batches out again.
    return prepare_data_loader(DataLoader(loader.dataset, batch_sampler=batches, **options), num_processes=1, process_index=0)
