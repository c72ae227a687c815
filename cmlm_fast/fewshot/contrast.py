"""Trainer of a sequence classifier, with or without supervised contrast."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from ..ops import info_nce
from .methods import Contrast


class ContrastTrainer(Trainer):
    """`transformers.Trainer` for a sequence classifier that trains with the loss of a `Contrast`, if given.

    Args:
        contrast: None for cross entropy alone.
        args, options: as for `transformers.Trainer`.
    """

    def __init__(self, contrast: Contrast | None, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.contrast = contrast

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **options: Any) -> Any:
        """(1 − weight)·cross entropy + weight·supervised contrast, both over two passes of the batch; else the Trainer's."""
        if self.contrast is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, **options)
        twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
        output = model(**twice, output_hidden_states=True)
        first, second = output.hidden_states[-1][:, 0].chunk(2)
        contrast = info_nce(first, second, temperature=self.contrast.temperature, labels=inputs["labels"])
        loss = (1 - self.contrast.weight) * output.loss + self.contrast.weight * contrast
        return (loss, output) if return_outputs else loss
