"""Both views of a batch: `complementary_mask` as a `CMLMConfig` specifies."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .data import mask_settings
from .modeling import CMLMModel
from .ops import ComplementaryMask, complementary_mask
from .ops._roles import exact_counts

#: The mask step for held-out text: every evaluation uses the same masks, and training never sees them.
EVALUATION_STEP = 2**32 - 1

#: XORed into the seed of view 2's masks if the views are masked independently.
INDEPENDENT = 0x9E3779B97F4A7C15


class Masker:
    """Masks the batches of one tokenizer's collator; a sequence's masks depend on (seed, step, sample id) alone."""

    def __init__(self, tokenizer: Any) -> None:
        self.settings = mask_settings(tokenizer)
        self.special_ids = torch.tensor(self.settings.pop("special_ids"))

    def __call__(self, batch: dict[str, Any], model: CMLMModel, seed: int, step: int) -> dict[str, Any]:
        """The batch, on its own device, with everything else that `CMLMModel.forward` takes.

        Args:
            batch: from `CMLMDataCollator`, or with its entries input_ids, sample_ids, attention_mask or cu_seqlens, and
                optionally eligible and unit_ids, which restrict what is masked.
            model: whose objective decides how tokens are masked.
            seed, step: with the sample ids they decide the masks; see `complementary_mask`.

        Returns:
            The batch with view1, view2, role, special_ids, jitter and sizes.
        """
        config = model.cmlm
        self.special_ids = self.special_ids.to(batch["input_ids"].device)
        draw = partial(
            complementary_mask, batch["input_ids"], batch.get("cu_seqlens"), attention_mask=batch.get("attention_mask"),
            eligible=batch.get("eligible"), unit_ids=batch.get("unit_ids"), sample_ids=batch["sample_ids"],
            sampling=config.sampling, mask_share=config.mask_share, random_share=config.random_share, step=step,
            special_ids=self.special_ids, **self.settings,
        )  # fmt: skip
        if config.complementary:
            masked = draw(rate=config.rate, complement_rate=config.complement_rate, seed=seed)
        else:  # view 1 of each of two draws; role 3 = 1 | 2 is masked in both
            view1, _, role1 = draw(rate=config.rate, complement_rate=0.0, seed=seed)
            second = (1.0 - config.rate) * config.complement_rate
            view2, _, role2 = draw(rate=second, complement_rate=0.0, seed=(seed ^ INDEPENDENT) & (2**64 - 1))
            masked = ComplementaryMask(view1, view2, role1 | (role2 << 1))
        jitter = model.jitter(batch["sample_ids"], seed, step)
        counts = batch.pop("eligible_counts", None)
        # Counted without restrictions that something behind the collator may have added.
        counted = not any(batch.get(name) is not None for name in ("eligible", "unit_ids"))
        known = counts if config.sampling == "exact" and config.complementary and counted else None
        sizes = None if known is None else (*exact_counts(known, config.rate, config.complement_rate), int(known.sum()))
        return {**batch, **masked._asdict(), "special_ids": self.special_ids, "jitter": jitter, "sizes": sizes}
