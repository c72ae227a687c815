"""The step as one writes it first."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import Peer


class Naive(Peer):
    """One pass per view, padded to the longest sequence of the batch; logits of the whole vocabulary at every position."""

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=5e-5)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        hidden, mlm = [], []
        for view, role in ((batch["view1"], 1), (batch["view2"], 2)):
            out = self.lm(view, attention_mask=batch["attention_mask"], output_hidden_states=True)
            labels = batch["input_ids"].masked_fill(batch["role"] != role, -100)
            mlm.append(F.cross_entropy(out.logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"))
            hidden.append(out.hidden_states[-1])
        count = (batch["role"] > 0).sum()
        return self.config.mlm_weight * (mlm[0] + mlm[1]) / count + self.contrasts(*hidden, batch)
