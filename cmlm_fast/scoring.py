"""Logged and evaluated values: parts of the loss and measures, as means over everything seen."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, has_length

from .config import CMLMConfig
from .loading import LoadingTrainer
from .losses import PARTS
from .masking import EVALUATION_STEP, Masker
from .measures import Sums
from .modeling import CMLMModel, CMLMOutput


class ScoringTrainer(LoadingTrainer):
    """A Trainer that masks batches in the step; losses are sums and counts, added up over batches and ranks."""

    _masker: Masker
    _sums: Sums  # since the last log, or of this evaluation
    _seen = _scored = 0  # this rank's sequences in this training, and in this evaluation

    @property
    def cmlm(self) -> CMLMConfig:
        """The objective."""
        return self._plain_model.cmlm

    @property
    def _plain_model(self) -> CMLMModel:
        # accelerate's unwrapping walks through all modules each time.
        model: CMLMModel = self.model if isinstance(self.model, CMLMModel) else self.accelerator.unwrap_model(self.model)
        return model

    def mask(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        """Move the batch to the device and add both views and the role of each token."""
        if "sample_ids" not in batch:
            rule = "one that gives sample_ids, as CMLMDataCollator does"
            raise ValueError(f"CMLMTrainer: expected data_collator to be {rule}, got {', '.join(batch)}")
        batch = send_to_device(batch, self.args.device, non_blocking=True)
        seed = self.args.seed if self.args.mask_seed is None else self.args.mask_seed
        return self._masker(batch, self._plain_model, seed, step)

    def _weights(self) -> dict[str, float]:
        config = self.cmlm
        return dict(zip(PARTS, (config.mlm_weight, config.token_weight, config.sequence_weight), strict=True))

    def _parts(self, output: CMLMOutput) -> dict[str, Tensor]:
        """Sum and count of each computed part."""
        pairs = zip(self._weights().items(), torch.stack([output.sums.double(), output.counts.double()], 1), strict=True)
        return {part: pair for (part, weight), pair in pairs if weight > 0}

    def _step_is_logged(self) -> bool:
        step, every = self.state.global_step + 1, self.state.logging_steps
        if self.args.logging_strategy == "epoch":
            return step == self.state.max_steps or self.accelerator.gradient_state.end_of_dataloader
        if self.args.logging_strategy != "steps" or not every:
            return False
        return step % every == 0 or (step == 1 and self.args.logging_first_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts and measures since the last log to the training loss's entry.

        Rates and loss in the final entry cover what this training saw, even after a resume or with max_tokens.
        """
        if "loss" in logs:
            logs |= self._sums.read(self._reduce, self.args.device)
            logs |= self._temperatures()
        if "train_runtime" in logs:
            steps, seconds = self.state.global_step - self._begin, max(logs["train_runtime"], 1e-4)
            seen, loss, ranks = self._seen, self._total_loss_scalar, self.accelerator.num_processes
            if ranks > 1:  # since the last log, each rank has summed its own share of the loss, times the number of ranks
                sums = torch.tensor([seen, loss / ranks], dtype=torch.float64, device=self.args.device)
                seen, loss = self._reduce(sums).tolist()
            logs |= {"train_samples_per_second": round(seen / seconds, 3), "train_steps_per_second": round(steps / seconds, 3),
                     "train_loss": loss / max(steps, 1)}  # fmt: skip
        super().log(logs, start_time)

    def _reduce(self, tensor: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(tensor, "sum")
        return total

    def _temperatures(self) -> dict[str, float]:
        if not self.cmlm.learn_temperature:
            return {}
        loss = self._plain_model.loss
        scales = {"token": loss.token.temperature.logit_scale, "sequence": loss.sequence.temperature.logit_scale}
        # Under FSDP, outside the forward pass, a parameter is a shard.
        full = {name: getattr(scale, "full_tensor", lambda s=scale: s)() for name, scale in scales.items() if scale is not None}
        return {f"{name}_temperature": math.exp(-scale.item()) for name, scale in full.items()}

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, metric_key_prefix: str = "eval",
                        **options: Any) -> EvalLoopOutput:  # fmt: skip
        """As the Trainer's, with the loss and its parts as means over all held-out tokens and sequences."""
        training, self._sums, self._scored = self._sums, Sums(), 0
        try:
            with torch.random.fork_rng(devices=[]):  # a loader draws from the generator that CPU dropout uses
                output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **options)
            means = self._sums.read(self._reduce, self.args.device)
        finally:
            self._sums = training
        if not means:
            raise ValueError("CMLMTrainer: expected eval_dataset to hold a sequence, got none")
        means["loss"] = sum(weight * means.get(part, 0.0) for part, weight in self._weights().items())
        if "mlm" in means:
            means["perplexity"] = math.exp(min(means["mlm"], 700.0))
        if not has_length(dataloader.dataset):  # the Trainer counts rows of the first tensor: tokens in a packed batch
            output = output._replace(num_samples=self._scored)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool,
                        ignore_keys: list[str] | None = None) -> tuple[None, None, None]:  # fmt: skip
        """Compute the objective of one held-out batch and accumulate its parts and measures for the end of the loop."""
        batch = self.mask(inputs, EVALUATION_STEP)
        self._scored += sequences_of(batch)
        with torch.no_grad(), self.compute_loss_context_manager():
            output: CMLMOutput = model(**batch, measured=True)
        self._sums.add(self._parts(output))
        self._sums.add(output.measures)
        return None, None, None  # the Trainer would average outputs over batches, some of them short


def sequences_of(batch: dict[str, Any]) -> int:
    """Number of sequences in a batch that count."""
    return 0 if batch.get("stand_in") else len(batch["sample_ids"])
