"""The step as a careful engineer writes it in PyTorch and transformers, without custom kernels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import Peer


class Strong(Peer):
    """Both views in one pass, the LM head at the masked positions only, fused AdamW. Its batches come grouped by length."""

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=5e-5, fused=True)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        ids, role = batch["input_ids"], batch["role"]
        views, mask = torch.cat([batch["view1"], batch["view2"]]), batch["attention_mask"].repeat(2, 1)
        hidden1, hidden2 = self.lm.base_model(views, attention_mask=mask).last_hidden_state.chunk(2)
        rows = torch.cat([hidden1[role == 1], hidden2[role == 2]])
        labels = torch.cat([ids[role == 1], ids[role == 2]])
        head = self.lm.cls if hasattr(self.lm, "cls") else self.lm.lm_head  # BERT's name, or RoBERTa's
        mlm = F.cross_entropy(head(rows).float(), labels)
        return self.config.mlm_weight * mlm + self.contrasts(hidden1, hidden2, batch)
