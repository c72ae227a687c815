"""The Trainer's data loaders: each rank's share of a data set, in batches of sequences or of tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers.trainer_utils import has_length

from .arguments import CMLMTrainingArguments
from .data import TokenBudgetSampler, sequence_lengths
from .data.budget import repeated_ids
from .data.collate import as_table_rows
from .data.share import share_loader
from .resumable import ResumableTrainer

logger = logging.getLogger(__name__)


class LoadingTrainer(ResumableTrainer):
    """A Trainer whose ranks see each sample once: see `data.RankShare` and `data.TokenBudgetSampler`."""

    args: CMLMTrainingArguments

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As the Trainer's, or with batches by tokens; no rank sees a sample twice: see `data.RankShare`."""
        args, dataset = self.args, self.train_dataset
        least = self._train_batch_size * args.world_size if args.dataloader_drop_last else 1
        if has_length(dataset) and len(dataset) < least:  # the Trainer would finish without a step
            raise ValueError(f"CMLMTrainer: expected train_dataset to hold {least} rows at least, got {len(dataset)}")
        if args.process_index == 0 and isinstance(dataset, Dataset) and (again := repeated_ids(dataset)):
            logger.warning("%d of %d rows have the sample_id of another, and in a step with it its masks: number the rows of "
                           "concatenated data sets anew", again, len(dataset))  # fmt: skip
        if args.max_tokens is None:
            return share_loader(super().get_train_dataloader(), args, args.dataloader_drop_last)
        if not isinstance(dataset, Dataset):
            rule = "None for a train_dataset whose rows' lengths are not known, any but a datasets.Dataset"
            raise ValueError(f"CMLMTrainer: expected max_tokens to be {rule}, got {args.max_tokens}")
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler = TokenBudgetSampler(sequence_lengths(dataset), args.max_tokens, seed=seed,
                                     rank=args.process_index, ranks=args.world_size)  # fmt: skip
        loader = DataLoader(as_table_rows(dataset, self.data_collator), batch_sampler=sampler, collate_fn=self.data_collator,
                            num_workers=args.dataloader_num_workers, pin_memory=args.dataloader_pin_memory,
                            prefetch_factor=args.dataloader_prefetch_factor, in_order=args.dataloader_in_order,
                            multiprocessing_context=args.dataloader_multiprocessing_context,
                            persistent_workers=args.dataloader_persistent_workers)  # fmt: skip
        # The sampler knows its rank. accelerate is told of one process, or it would deal the batches out again.
        return prepare_data_loader(loader, num_processes=1, process_index=0)

    def _get_dataloader(self, dataset: Any, *args: Any, sampler_fn: Any = None, **options: Any) -> DataLoader:
        """As the Trainer's, but rows are read as tables if nobody else sees them; samplers see the data set itself."""
        sampler = None if sampler_fn is None else lambda _: sampler_fn(dataset)
        return super()._get_dataloader(as_table_rows(dataset, self.data_collator), *args, sampler_fn=sampler, **options)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As the Trainer's, but no rank sees a sample twice (see `data.RankShare`), and dataloader_drop_last drops none."""
        if eval_dataset is not None and not isinstance(eval_dataset, str) and eval_dataset is not self.eval_dataset:
            return self.get_test_dataloader(eval_dataset)  # persistent workers belong to one data set
        with self._to_the_last():
            return share_loader(super().get_eval_dataloader(eval_dataset), self.args)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As `get_eval_dataloader`."""
        with self._to_the_last():
            return share_loader(super().get_test_dataloader(test_dataset), self.args)

    @contextmanager
    def _to_the_last(self) -> Iterator[None]:
        kept, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = kept
