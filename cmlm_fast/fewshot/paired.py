"""Sequence contrast of two different texts: batches of 2B sequences, B texts and their B partners."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention import Lengths
from ..data import CMLMDataCollator
from ..encoding import encode_row, known_types, positions, row_bounds
from ..losses import CMLMLoss, Views
from ..modeling import CMLMModel, CMLMOutput
from ..ops._roles import can_be_masked


class PairCollator:
    """Collate rows and their partners into one batch, padded or packed; `one` and `two`, int64 [B], locate the pairs in it.

    Args:
        collator: makes a batch of rows.
        partner: row -> the row of its second view.
    """

    def __init__(self, collator: CMLMDataCollator, partner: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.collator = collator
        self.tokenizer = collator.tokenizer
        self.partner = partner

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        both = [*rows, *(self.partner(row) for row in rows)]
        order = sorted(range(len(both)), key=lambda i: -len(both[i]["input_ids"]))
        place = torch.empty(len(both), dtype=torch.int64)
        place[order] = torch.arange(len(both))
        # The packing collator sorts in exactly this order; the padding one keeps the given order.
        batch = self.collator([both[i] for i in order])
        return {**batch, "one": place[: len(rows)], "two": place[len(rows) :]}


class PairedLoss(CMLMLoss):
    """CMLMLoss whose sequence loss is over pairs of sequences."""

    def counts(self, role: Tensor, sequences: int) -> Tensor:
        """As `CMLMLoss.counts`, for a batch of 2B sequences."""
        return super().counts(role, sequences // 2)


class PairedModel(CMLMModel):
    """CMLMModel for batches of `PairCollator`; its objective is the sequence contrast alone."""

    def __init__(self, lm: Any, config: Any = None) -> None:
        super().__init__(lm, config)
        if self.cmlm.mlm_weight or self.cmlm.token_weight:
            raise ValueError("PairedModel: expected mlm_weight and token_weight to be 0, since two texts share no positions, "
                             f"got {self.cmlm.mlm_weight} and {self.cmlm.token_weight}")  # fmt: skip
        self.loss = PairedLoss(self.cmlm)

    def forward(self, input_ids: Tensor, one: Tensor, two: Tensor, role: Tensor, special_ids: Tensor,  # type: ignore[override]
                attention_mask: Tensor | None = None, cu_seqlens: Tensor | None = None, lengths: Lengths | None = None,
                token_type_ids: Tensor | None = None, eligible: Tensor | None = None, divisor: Tensor | None = None,
                group: Any = None, view1: Any = None, view2: Any = None, jitter: Any = None, sizes: Any = None,
                sample_ids: Any = None, unit_ids: Any = None, eligible_counts: Any = None,
                measured: bool = False) -> CMLMOutput:  # fmt: skip
        """Contrast sequences `one` with sequences `two` of a batch of 2B; other arguments as for `CMLMModel.forward`.

        Views, and what comes with them, are ignored.
        """
        can = can_be_masked(input_ids, special_ids, eligible)
        if cu_seqlens is not None and lengths is not None:
            position = positions(cu_seqlens, input_ids.numel()) + self._first_position(int(max(lengths)))
            hidden = encode_row(self.lm.base_model, input_ids, cu_seqlens, lengths, token_type_ids, position)[: len(input_ids)]
            first = cu_seqlens[:-1].long()
        elif attention_mask is not None:
            can = can & attention_mask.bool()
            known = known_types(self.lm.base_model, token_type_ids)
            types = {} if known is None else {"token_type_ids": known}
            hidden = self.lm.base_model(input_ids, attention_mask=attention_mask, **types).last_hidden_state.flatten(0, 1)
            cu_seqlens, first = row_bounds(attention_mask)
        else:
            raise ValueError("PairedModel: expected attention_mask to be given with a padded batch, got None")
        z = self.projection(self._pool(hidden, can.flatten(), cu_seqlens, first))
        views = Views(hidden, hidden, z[one], z[two], input_ids.flatten(), role.flatten(), can.flatten(), cu_seqlens)
        sums = self.loss(views, self.mlm_sum, group)
        counts = self.loss.counts(role, 2 * len(one))
        return CMLMOutput(self.loss.total(sums, counts if divisor is None else divisor), sums.detach(), counts, {})
