"""The arguments of `CMLMTrainer`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from numbers import Integral
from types import NoneType

from transformers import TrainingArguments

from .losses import PARTS

logger = logging.getLogger(__name__)

_SMALL_IS_BETTER = (*PARTS, "perplexity", "alignment", "uniformity", "negative_similarity")


@dataclass
class CMLMTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` plus the options of CMLM post-training.

    Attributes:
        mask_seed: 64-bit seed of the masks; None takes `seed`.
        packed: pack sequences end to end, without padding, if the encoder supports it; only with the default collator.
        max_tokens: fill training batches up to this many tokens of the texts, instead of `per_device_train_batch_size`
            sequences; see `data.TokenBudgetSampler`.
        contrastive_batch_size: sequences of one device that are each other's negatives, a multiple of
            `per_device_train_batch_size` reached through `gradient_accumulation_steps`; None: those of one batch. Uses gradient
            caching, which costs one more forward pass; the token loss stays within its batch. Not with `max_tokens`.
        low_precision_layer_norm: with bf16 or fp16, layer norms output 16 bits as well, so the states between layers and their
            gradients are 16 bits where autocast has float32: faster on a GPU with torch_compile and large batches, but rounded
            differently. Measured on BERT and RoBERTa; ModernBERT, whose residual stream is not normalised, rounds more.
        torch_compile: compile the encoder's layers, not the whole model, once for batches of any size; uses
            torch_compile_backend and torch_compile_mode. Dropout draws other numbers than without it, from the same generator:
            seeded and resumed runs stay reproducible. As in the Trainer, float32 products then run in TF32 on a GPU.

    Raises:
        ValueError: a value that breaks its rule, or a Trainer option that would have no effect here.

    >>> CMLMTrainingArguments("run", max_tokens=4096, contrastive_batch_size=64, report_to="none")
    Traceback (most recent call last):
    ValueError: CMLMTrainingArguments: expected contrastive_batch_size to be None with max_tokens, got 64
    """

    mask_seed: int | None = field(default=None, metadata={"help": "64-bit seed of the masks; default: seed"})
    packed: bool = field(default=True, metadata={"help": "pack sequences end to end if the encoder can"})
    max_tokens: int | None = field(default=None, metadata={"help": "tokens per batch, instead of sequences per batch"})
    contrastive_batch_size: int | None = field(default=None, metadata={"help": "sequences that are contrasted together"})
    low_precision_layer_norm: bool = field(default=False, metadata={"help": "layer norms in 16 bits under bf16 or fp16"})

    def __post_init__(self) -> None:
        for name in ("mask_seed", "max_tokens", "contrastive_batch_size"):
            self._refuse(not isinstance(getattr(self, name), (Integral, NoneType)), name, "a whole number or None")
        self._refuse(self.max_tokens is not None and self.max_tokens < 1, "max_tokens", ">= 1 or None")
        # These concern losses and embeddings that are not used here, or would leave the weights in 16 bits.
        for name in ("label_smoothing_factor", "neftune_noise_alpha", "bf16_full_eval", "fp16_full_eval", "use_liger_kernel"):
            self._refuse(bool(getattr(self, name)), name, "off")
        self._refuse(self.auto_find_batch_size and (self.max_tokens or self.contrastive_batch_size) is not None,
                     "auto_find_batch_size", "off with max_tokens or contrastive_batch_size, which do not change with it")
        # They draw from PyTorch's own generator, or deal out the batches themselves: ranks would disagree, and a resumed run
        # would differ from the interrupted one.
        self._refuse(self.train_sampling_strategy in ("group_by_length", "batch_rebalance"), "train_sampling_strategy",
                     "another, packed batches have no padding to save")  # fmt: skip
        budget = self.max_tokens is not None
        self._refuse(budget and self.train_sampling_strategy != "random", "train_sampling_strategy", "random with max_tokens")
        self._refuse(budget and self.dataloader_drop_last, "dataloader_drop_last", "False with max_tokens")
        small = (self.metric_for_best_model or "").endswith(_SMALL_IS_BETTER)  # after eval_, or eval_ and a data set's name
        if small and self.greater_is_better is None:  # the Trainer maximises all that do not end in "loss"
            self.greater_is_better: bool | None = False
        super().__post_init__()
        if self.contrastive_batch_size is not None:
            batches = self.contrastive_batch_size // self.per_device_train_batch_size
            whole = batches * self.per_device_train_batch_size == self.contrastive_batch_size and batches >= 1
            self._refuse(budget, "contrastive_batch_size", "None with max_tokens")
            rule = (f"a multiple of per_device_train_batch_size = {self.per_device_train_batch_size} that divides the "
                    f"{self.gradient_accumulation_steps} batches of gradient_accumulation_steps")
            self._refuse(not whole or self.gradient_accumulation_steps % batches > 0, "contrastive_batch_size", rule)
        # The collator selects its columns; and a NaN check in each step would wait for the device in each step.
        self.remove_unused_columns = False
        self.logging_nan_inf_filter = False
        if self.n_gpu > 1:  # the Trainer would split the batches' tensors for nn.DataParallel
            logger.warning("%d GPUs: one process uses the first, torchrun --nproc-per-node %d all", self.n_gpu, self.n_gpu)
            self._n_gpu = 1
        end = (self.lr_scheduler_kwargs or {}).get("lr_end", 1e-7)  # transformers' own rule, which it only checks in training
        broken = self.lr_scheduler_type == "polynomial" and self.learning_rate <= end
        self._refuse(broken, "learning_rate", f"> {end}, where the polynomial schedule ends")

    def check_schedule(self, steps: int) -> None:
        """Raise ValueError if the schedule divides by the steps after warm-up, and warm-up takes all of `steps`."""
        broken = self.lr_scheduler_type == "polynomial" and self.get_warmup_steps(steps) >= steps
        self._refuse(broken, "warmup_steps", f"0 or to leave one of {steps} steps, for the polynomial schedule")

    def _refuse(self, broken: bool, name: str, rule: str) -> None:
        if broken:
            raise ValueError(f"CMLMTrainingArguments: expected {name} to be {rule}, got {getattr(self, name)}")
