"""Batches by tokens instead of by sequences: all batches of all ranks hold nearly the same number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler

from ._errors import fail


class TokenBudgetSampler(Sampler[list[int]]):
    """Batch sampler: rows are shuffled anew each epoch and cut into batches of at most `max_tokens` tokens.

    Each batch is an equal share of all tokens. A row goes to the share that holds its middle, so a batch exceeds its share by
    at most one row. Every epoch and every rank has the same number of batches, and an epoch holds each row once.

    Args:
        lengths: number of tokens in each row.
        max_tokens: maximum tokens per batch, counted once although the encoder sees both views; at least twice the longest row.
        seed: seed of the order; epoch e of seed s is the same on every machine.
        rank, ranks: this process gets batches rank, rank + ranks, ...

    Raises:
        ValueError: `max_tokens` is too small, or there are fewer rows than the ranks need.

    >>> sampler = TokenBudgetSampler([3, 5, 2, 4, 4, 2], max_tokens=15)
    >>> len(sampler), sorted(row for batch in sampler for row in batch)
    (2, [0, 1, 2, 3, 4, 5])
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, max_tokens: int, *, seed: int = 0, rank: int = 0,
                 ranks: int = 1) -> None:  # fmt: skip
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.seed, self.rank, self.ranks, self.epoch = seed, rank, ranks, 0
        total, longest = int(self.lengths.sum()), int(self.lengths.max(initial=0))
        if max_tokens < 2 * longest:
            raise fail("TokenBudgetSampler", "max_tokens", f">= {2 * longest}, twice the longest sequence", max_tokens)
        least = -(-total // (max_tokens - longest)) if total else min(len(self.lengths), 1)
        self.count = -(-least // ranks) * ranks
        if self.count > len(self.lengths):
            rule = f"at least {self.count}, a batch for each of {ranks} ranks"
            raise fail("TokenBudgetSampler", "the number of sequences", rule, len(self.lengths))

    def set_epoch(self, epoch: int) -> None:
        """Select the order of the next iteration; called by the Trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count // self.ranks

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.Generator(np.random.Philox(key=[self.seed, self.epoch])).permutation(len(self.lengths))
        lengths, cut = self.lengths[order], np.arange(self.count + 1)
        middle = 2 * np.cumsum(lengths) - lengths  # twice the position of each row's middle
        cuts = np.searchsorted(middle * self.count, cut * 2 * lengths.sum())
        cuts[-1] = len(order)  # an empty last row has its middle at the last cut, not before it
        # At least one row per batch: among many short rows and a few long ones, a share may hold no middle.
        cuts = np.minimum(np.maximum.accumulate(cuts - cut) + cut, len(order) - self.count + cut)
        for mine in range(self.rank, self.count, self.ranks):
            yield order[cuts[mine] : cuts[mine + 1]].tolist()


def sequence_lengths(dataset: Dataset) -> np.ndarray:
    """Number of tokens in each row of `tokenize_texts`, int64, read as Arrow."""
    import pyarrow.compute as pc

    if not isinstance(dataset, Dataset):
        raise fail("sequence_lengths", "dataset", "a datasets.Dataset, whose lengths are known", type(dataset).__name__)
    parts = [pc.list_value_length(table["input_ids"]).to_numpy() for table in dataset.with_format("arrow").iter(10_000)]
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)


def repeated_ids(dataset: Dataset) -> int:
    """Number of rows whose sample_id occurs in an earlier row."""
    if "sample_id" not in dataset.column_names:
        return 0
    ids = dataset.select_columns("sample_id").with_format("arrow")
    found = np.concatenate([np.zeros(0, np.int64), *(table["sample_id"].to_numpy() for table in ids.iter(100_000))])
    return len(found) - len(np.unique(found))
