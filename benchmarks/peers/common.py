"""What both baselines share: masks by transformers' collator, the two contrasts in eager PyTorch, one optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DataCollatorForLanguageModeling

from cmlm_fast import CMLMConfig


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Move a batch to the device; to a GPU through pinned memory, as a DataLoader does."""
    if device.type != "cuda":
        return dict(batch)
    return {name: value.pin_memory().to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()}  # fmt: skip


class Peer:
    """A masked LM, its optimizer and what its masks need; a subclass defines `loss` and `make_optimizer`.

    Args:
        lm: a masked LM, `AutoModelForMaskedLM`, on the device of the run.
        tokenizer: its tokenizer.
        config: the objective, with scheme "cross", pooling "mean", scope "batch", MLM in both views.
        dtype: float32, or bfloat16 by autocast.
    """

    def __init__(self, lm: Any, tokenizer: Any, config: CMLMConfig, dtype: torch.dtype) -> None:
        self.lm, self.tokenizer, self.config, self.dtype = lm.train(), tokenizer, config, dtype
        self.maskers = [DataCollatorForLanguageModeling(tokenizer, mlm_probability=p)
                        for p in (config.rate, config.complement_rate)]  # fmt: skip
        self.device = next(lm.parameters()).device
        self.special = torch.tensor(tokenizer.all_special_ids)  # for the masks, which the collator makes on the CPU
        self.special_ids = self.special.to(self.device)
        self.optimizer = self.make_optimizer(list(lm.parameters()))

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        raise NotImplementedError

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The objective of a padded, masked batch: input_ids, attention_mask, view1, view2, role [B, L]."""
        raise NotImplementedError

    def pad(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Token rows to tensors [B, L]."""
        inputs = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows]
        return dict(self.tokenizer.pad(inputs, return_tensors="pt"))

    def mask(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make both views; the second masks nothing that the first masks."""
        ids = batch["input_ids"]
        special = torch.isin(ids, self.special)
        view1, labels1 = self.maskers[0].torch_mask_tokens(ids.clone(), special)
        view2, labels2 = self.maskers[1].torch_mask_tokens(ids.clone(), special | (labels1 != -100))
        role = (labels1 != -100) + 2 * (labels2 != -100)
        return {**batch, "view1": view1, "view2": view2, "role": role}

    def step(self, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """One optimizer step from token rows."""
        batch = to_device(self.mask(self.pad(rows)), self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.lm.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def contrasts(self, hidden1: Tensor, hidden2: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The weighted token and sequence parts of the loss, from hidden states [B, L, D]."""
        ids, role, config = batch["input_ids"], batch["role"], self.config
        seen = batch["attention_mask"].bool() & ~torch.isin(ids, self.special_ids)
        number = seen.flatten().cumsum(0).view_as(ids) - 1
        sums, count = [], (role > 0).sum()
        for masked, other, where in ((hidden1, hidden2, role == 1), (hidden2, hidden1, role == 2)):
            query, key = F.normalize(masked[where], dim=-1), F.normalize(other[seen], dim=-1)
            target = number[where]
            same = ids[where][:, None] == ids[seen]
            same[torch.arange(len(target), device=self.device), target] = False
            scores = (query @ key.T / config.token_temperature).masked_fill(same, float("-inf"))
            sums.append(F.cross_entropy(scores, target, reduction="sum"))
        z1, z2 = (F.normalize((h * seen[..., None]).sum(1) / seen.sum(1, keepdim=True), dim=-1) for h in (hidden1, hidden2))
        scores, own = z1 @ z2.T / config.sequence_temperature, torch.arange(len(ids), device=self.device)
        sequence = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
        return config.token_weight * (sums[0] + sums[1]) / count + config.sequence_weight * sequence
