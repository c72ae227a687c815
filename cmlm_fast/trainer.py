"""CMLM post-training with `transformers.Trainer`: masks are made on the device, means cover the whole optimizer step."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedDataParallelKwargs, DynamoBackend
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.trainer_utils import HubStrategy, has_length, set_seed

from .arguments import CMLMTrainingArguments
from .data import CMLMDataCollator, mask_settings
from .gradient_cache import GradientCache
from .layers import use_low_precision_layer_norm
from .masking import Masker
from .measures import Sums
from .memory import keep_freed_memory
from .modeling import CMLMModel, CMLMOutput
from .scoring import ScoringTrainer, sequences_of

logger = logging.getLogger(__name__)


class CMLMTrainer(ScoringTrainer):
    """Post-train a `CMLMModel`; the Trainer handles the rest: accumulation, precision, checkpoints, callbacks, ranks.

    Args:
        model: a `CMLMModel`; None with `model_init`, which makes one before each training.
        args: `CMLMTrainingArguments`.
        train_dataset, eval_dataset: rows of `data.tokenize_texts`.
        processing_class: the tokenizer.
        data_collator: default `CMLMDataCollator(processing_class)`.
        model_init: a function of no argument, or of a trial of `hyperparameter_search`.
        options: everything else that `transformers.Trainer` takes, except options that need predictions and labels.

    The masks of a sequence depend on (mask_seed, optimizer step, sample id) alone. Logged in addition to the loss: its parts
    (mlm, token, sequence), temperatures, and for the logged step masked_accuracy, token_retrieval, positive_similarity,
    negative_similarity, sequence_retrieval, alignment and uniformity; `evaluate` returns all of them and the perplexity.
    Parts with weight 0 are neither computed nor logged.

    Raises:
        ValueError: no CMLMModel, no tokenizer, one that does not fit the model, or an option that would have no effect here; in
            `train`, rows or a stream of too few batches for a step, or a stream resumed beyond its first pass.

    Example:
        >>> trainer = CMLMTrainer(model, CMLMTrainingArguments("run"), train_dataset=data, processing_class=tokenizer)
        >>> trainer.train()
        >>> trainer.save_model("post-trained")
    """

    def __init__(self, model: CMLMModel | None = None, args: CMLMTrainingArguments | None = None, *,
                 processing_class: Any = None, data_collator: Any = None, model_init: Callable[..., CMLMModel] | None = None,
                 **options: Any) -> None:  # fmt: skip
        for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if options.get(name) is not None:
                rule = "None, since the model has its own objective and evaluate returns its parts, not predictions"
                raise ValueError(f"CMLMTrainer: expected {name} to be {rule}, got {options[name]}")
        tokenizer = processing_class if processing_class is not None else getattr(data_collator, "tokenizer", None)
        if tokenizer is None:
            raise ValueError("CMLMTrainer: expected processing_class to be a tokenizer, got None")
        theirs = getattr(data_collator, "tokenizer", None)
        if theirs not in (None, tokenizer) and mask_settings(theirs) != mask_settings(tokenizer):
            rule = "one whose tokenizer has the ids and special tokens of processing_class"  # it counts what is masked here
            raise ValueError(f"CMLMTrainer: expected data_collator to be {rule}, got that of {theirs.name_or_path}")
        args = args or CMLMTrainingArguments("out")
        if not isinstance(args, CMLMTrainingArguments):
            raise ValueError(f"CMLMTrainer: expected args to be CMLMTrainingArguments, got {type(args).__name__}")
        self.args, self._masker = args, Masker(tokenizer)
        if model_init is None:
            model = self._checked(model)
        elif model is None:
            if any(options.get("optimizers") or ()):
                raise ValueError("CMLMTrainer: expected optimizers to be None if model_init is given, got one")
            self.model_init: Any = model_init  # read by call_model_init
            set_seed(args.seed)
            model = self.call_model_init()
        else:
            raise ValueError("CMLMTrainer: expected model to be None if model_init is given, got both")
        self._sums = Sums()
        self._cache: GradientCache | None = None
        self._first = False  # no batch of this training was seen
        if data_collator is None:
            data_collator = CMLMDataCollator(tokenizer, packed=args.packed and model.takes_packed)
            if args.packed and not model.takes_packed:
                logger.warning("%s takes padded batches only: its attention cannot be replaced", type(model.lm).__name__)
        super().__init__(model, args, processing_class=tokenizer, data_collator=data_collator, **options)
        self.model_init = model_init
        if args.low_precision_layer_norm and self.accelerator.mixed_precision == "no":
            rule = "False without bf16 or fp16"
            raise ValueError(f"CMLMTrainer: expected low_precision_layer_norm to be {rule}, got True")
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and args.contrastive_batch_size is not None and model.cmlm.learn_temperature:
            rule = "None if FSDP shards a learned temperature, which the contrast needs outside the forward pass"
            raise ValueError(f"CMLMTrainer: expected contrastive_batch_size to be {rule}, got {args.contrastive_batch_size}")
        if args.contrastive_batch_size is not None and model.cmlm.sequence_weight == 0:
            rule = "None if sequence_weight is 0 (there is no sequence contrast)"
            raise ValueError(f"CMLMTrainer: expected contrastive_batch_size to be {rule}, got {args.contrastive_batch_size}")
        # compute_loss already divides by the counts of the whole optimizer step.
        self.loss_is_scaled_for_ga = True

    def _checked(self, model: Any) -> CMLMModel:
        """Check that this trainer can train the model; compile its layers if requested."""
        if not isinstance(model, CMLMModel):
            raise ValueError(f"CMLMTrainer: expected model to be a CMLMModel, got {type(model).__name__}")
        rows, ids = len(model.lm.get_input_embeddings().weight), self._masker.settings["vocab_size"]
        if ids > rows:
            rule = f"of at most {rows} ids, the rows of the model's embedding"
            raise ValueError(f"CMLMTrainer: expected processing_class to be {rule}, got {ids}")
        narrow = {str(p.dtype) for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)}
        if narrow:  # most AdamW updates would be rounded away
            rule = "of float32 weights (lm.float(), or CMLMModel.from_pretrained; bf16=True computes in bfloat16)"
            raise ValueError(f"CMLMTrainer: expected model to be {rule}, got {', '.join(sorted(narrow))}")
        low = self.args.low_precision_layer_norm
        if not use_low_precision_layer_norm(model.lm, low) and low:
            rule = f"False for {type(model.lm).__name__}, which has no nn.LayerNorm"
            raise ValueError(f"CMLMTrainer: expected low_precision_layer_norm to be {rule}, got True")
        if self.args.torch_compile:
            model.compile_layers(self.args.torch_compile_backend, self.args.torch_compile_mode)
        return model

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As the Trainer's."""
        self.args.check_schedule(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def call_model_init(self, trial: Any = None) -> CMLMModel:
        """As the Trainer's."""
        return self._checked(super().call_model_init(trial))

    def hyperparameter_search(self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **options: Any) -> Any:
        """As the Trainer's, but the objective is `eval_loss`; the Trainer would sum all other scores."""
        objective = compute_objective or itemgetter("eval_loss")
        return super().hyperparameter_search(hp_space, objective, *args, **options)

    def _build_accelerator_args(self, **options: Any) -> dict[str, Any]:
        built: dict[str, Any] = super()._build_accelerator_args(**options)
        config = self.model.cmlm
        unused = config.mlm_weight == 0 or (config.sequence_weight == 0 and config.projection > 0)
        unused |= not self.model.config.tie_word_embeddings  # some heads then hold a second, unused bias
        for handler in built["kwargs_handlers"]:
            if isinstance(handler, DistributedDataParallelKwargs):
                handler.gradient_as_bucket_view = True  # otherwise gradients are stored twice
                if self.args.ddp_find_unused_parameters is None:  # DDP would look for them in every step
                    handler.find_unused_parameters = unused
        return built

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's; called again for each trial of a search."""
        super().create_accelerator_and_postprocess()
        loading = self.accelerator.dataloader_config
        if self.accelerator.num_processes == 1 and loading.dispatch_batches is None:
            loading.dispatch_batches = False  # for a stream, it would copy each batch to the device and wait
        if self.args.torch_compile:  # accelerate would compile the whole model, and again for each batch
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        policy = getattr(plugin, "mixed_precision_policy", None)
        if policy is not None and plugin.fsdp_version == 2:  # it would round the losses to bfloat16
            plugin.mixed_precision_policy = replace(policy, output_dtype=None)

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """As the Trainer's, also after `evaluate`; uses `keep_freed_memory` on the CPU."""
        if resume_from_checkpoint and self.args.dataloader_persistent_workers:
            # Such a loader draws from PyTorch's generator once per training, not once per epoch.
            logger.warning("dataloader_persistent_workers: from the next epoch on dropout is not that of an uncut run")
        if self.args.device.type == "cpu":
            keep_freed_memory()
        if self.accelerator.num_processes > 1 and self.model_wrapped is self.model and not self.is_fsdp_enabled:
            # `evaluate` marks the model as prepared in accelerate, which then would not wrap it in DDP.
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model.__dict__.pop("_is_accelerate_prepared", None)
            self.accelerator.free_memory()
        result = super().train(resume_from_checkpoint, **options)
        return result._replace(training_loss=result.metrics["train_loss"])

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **options: Any) -> Any:
        # Earlier values belong to another training, or to one that auto_find_batch_size gave up.
        self._first, self._seen, self._sums = True, 0, Sums()
        self._encoder_size = self._plain_model.lm.base_model.num_parameters(exclude_embeddings=True)
        return super()._inner_training_loop(batch_size, *args, **options)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int,
                          device: torch.device) -> tuple[list[Any], None]:  # fmt: skip
        """The masked batches of one optimizer step, each with the counts of all of them, by which the parts are divided."""
        if self.state.global_step >= self.state.max_steps:  # resumed from the last step: the Trainer would take one more
            return [], None
        batches = [self.mask(batch, self.state.global_step) for batch in islice(epoch_iterator, num_batches)]
        first, self._first = self._first, False
        if len(batches) < num_batches and not has_length(self.train_dataset):
            if first and not (batches and self.state.global_step):
                # The Trainer treats a stream as one endless pass, and has skipped what earlier steps consumed.
                seen = self.state.global_step * self.args.gradient_accumulation_steps
                rule = f"a stream of at least {num_batches} batches, a step's"
                if seen:
                    rule += f", behind the {seen} that the checkpoint has seen (it is resumed within its first pass alone)"
                raise ValueError(f"CMLMTrainer: expected train_dataset to be {rule}, got {len(batches)}")
            return [], None  # the last batches of a stream, too few for a step: their gradient would enter the next step
        if not batches:
            return [], None
        loss, sequences = self._plain_model.loss, [sequences_of(batch) for batch in batches]
        self._seen += sum(sequences)
        counts = [loss.counts(batch["role"], n) for batch, n in zip(batches, sequences, strict=True)]
        divisor = self._reduce(sum(counts[1:], counts[0]))
        batches = [{**batch, "divisor": divisor} for batch in batches]
        if self.args.contrastive_batch_size is not None:
            size = self.args.contrastive_batch_size // self.args.per_device_train_batch_size
            self._cache = GradientCache(batches, size, loss, self._group(), self.accelerator.autocast)
            batches = [{**batch, "at": at} for at, batch in enumerate(batches)]
        return batches, None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As the Trainer's; a contrast over several batches first needs the vectors of all of them."""
        if self._cache is not None:
            model.train()
            inputs["cached"] = self._cache.replay(model, inputs.pop("at"))
        # compute_loss has divided by the step's counts; a Trainer without loss_is_scaled_for_ga would divide by this again.
        self.current_gradient_accumulation_steps = 1
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def _group(self) -> Any:
        return dist.group.WORLD if self.accelerator.num_processes > 1 else None

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:  # fmt: skip
        """This batch's share of the step's objective, times the number of ranks, as gradients are averaged over them."""
        self._plain_model.loss.clamp_temperatures()
        ranks = self.accelerator.num_processes
        output: CMLMOutput = model(**inputs, measured=self._step_is_logged(), group=self._group())
        self._sums.add(self._parts(output))
        self._sums.add(output.measures)
        loss = output.loss * ranks
        return (loss, output) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As the Trainer's, 6 per token and weight: the encoder alone, both views, without attention's own products."""
        return 6 * 2 * int(inputs["input_ids"].numel()) * self._encoder_size

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As the Trainer's, except the learned temperatures, which would decay to 1."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("logit_scale")]

    def resume_from(self, checkpoint: str) -> None:
        """Also restore projection and learned temperatures."""
        self._plain_model.load_contrast(checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:  # parameters gathered by an evaluation are not shards to load into
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        super()._load_best_model()
        if not self.is_fsdp_enabled:  # FSDP's own state holds them
            self.resume_from(str(self.state.best_model_checkpoint))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As the Trainer's, which copies the files that it knows to `output_dir` and uploads that; add the contrast's."""
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        pushes = self.args.should_save and self.args.hub_strategy != HubStrategy.END
        if self._staging is None and pushes and (self.args.hub_always_push or not running):
            self._plain_model.copy_contrast(Path(checkpoint_folder), Path(self.args.output_dir))
        super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a plain Hugging Face checkpoint with the tokenizer, also inside checkpoint-N."""
        folder = output_dir or self.args.output_dir
        state = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            self._plain_model.save_pretrained(folder, state)
            self.processing_class.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, "training_args.bin"))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
