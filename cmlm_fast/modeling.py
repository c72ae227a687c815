"""A Hugging Face masked LM with the CMLM objective: both views in one encoder pass, the LM head only where MLM predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .attention import Lengths, use_packed_attention
from .compiling import compile_checkpointed_layers, compile_layers
from .config import CMLMConfig
from .encoding import ROUND, encode_packed, encode_padded, row_bounds
from .gradient_cache import CachedContrast
from .heads import lm_transform
from .layers import tied_head, use_fast_layers
from .losses import CMLMLoss, Views
from .measures import measure
from .ops._philox import position_shift
from .ops._roles import can_be_masked
from .ops._rows import mean_rows
from .ops.mlm_cross_entropy import head_losses
from .pretrained import PretrainedModel


@dataclass
class CMLMOutput(ModelOutput):
    """What `CMLMModel.forward` returns.

    Attributes:
        loss: scalar, the objective.
        sums, counts: [3], this batch's MLM, token and sequence part, and the number of terms in each.
        measures: name -> [2], a sum and its count, if requested.
    """

    loss: Tensor
    sums: Tensor = None  # type: ignore[assignment]  # ModelOutput wants a default of None behind the first field
    counts: Tensor = None  # type: ignore[assignment]
    measures: dict[str, Tensor] = None  # type: ignore[assignment]


class CMLMModel(PretrainedModel):
    """Any Hugging Face masked LM of the BERT, RoBERTa, XLM-R, DistilBERT, ELECTRA, MPNet, ALBERT or ModernBERT family.

    Wrapping changes the masked LM in place: its attention becomes `cmlm_varlen`, which returns no attention maps, and on the
    CPU its linear, dropout and embedding layers become faster ones, some without a second derivative. Parameters and their
    names stay. For other uses load another copy, or the saved checkpoint.

    Args:
        lm: the masked LM, `AutoModelForMaskedLM`.
        config: the objective.

    Raises:
        ValueError: the masked LM has an unknown kind of head, is wrapped by PEFT, or is a decoder; or a position_jitter is set
            for one with relative positions.

    Example:
        >>> from cmlm_fast import CMLMDataCollator, Masker
        >>> model = CMLMModel.from_pretrained("bert-base-uncased", CMLMConfig.from_preset("balanced")).train()
        >>> masker, collate = Masker(tokenizer), CMLMDataCollator(tokenizer, packed=model.takes_packed)
        >>> batch = masker(collate(rows), model, seed=0, step=step)  # rates, sampling, jitter, ...: as model.cmlm says
        >>> model(**batch).loss.backward()
        >>> model.save_pretrained("post-trained")  # without the tokenizer

    `rows` come from `tokenize_texts`. `Masker` makes masks as the objective specifies; `forward` takes any views. Like any
    model of transformers, one from `from_pretrained` is in evaluation mode: without `train()` there is no dropout.

    Attributes:
        takes_packed: whether the encoder's attention takes packed batches.
    """

    _compiled: Mapping[str, Any] | None = None  # options of torch.compile, if compiled

    def __init__(self, lm: Any, config: CMLMConfig | None = None) -> None:
        super().__init__()
        if getattr(lm, "peft_config", None) or getattr(lm, "_hf_peft_config_loaded", False):  # their checkpoints lack the model
            rule = "a plain masked LM (adapters merged into it by merge_and_unload)"
            raise ValueError(f"CMLMModel: expected lm to be {rule}, got {type(lm).__name__} with a peft_config")
        if not isinstance(lm, PreTrainedModel):
            raise ValueError(f"CMLMModel: expected lm to be a masked LM of transformers, got {type(lm).__name__}")
        if getattr(lm.config, "is_decoder", False):  # each token attends to its whole sequence, whichever layout
            raise ValueError("CMLMModel: expected lm to be an encoder, whose tokens see both sides, got one with is_decoder")
        if not isinstance(config, (CMLMConfig, NoneType)):
            raise ValueError(f"CMLMModel: expected config to be a CMLMConfig or None, got {type(config).__name__}")
        self.lm = lm
        self.cmlm = config or CMLMConfig()
        self.check_jitter(self.cmlm.position_jitter)
        self.loss = CMLMLoss(self.cmlm)
        lm_transform(lm)  # raises for an unknown kind now, not in the first step
        self.takes_packed = use_packed_attention(lm)
        use_fast_layers(lm, lm.get_output_embeddings().weight if self.cmlm.mlm_weight > 0 else None)
        width = lm.config.hidden_size
        if self.cmlm.projection:
            head = (nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.cmlm.projection))
            self.projection: nn.Module = nn.Sequential(*head)
        else:
            self.projection = nn.Identity()
        if not lm.training:  # as `from_pretrained` of transformers leaves it
            self.eval()

    def tie_weights(self) -> None:
        """Tie the masked LM's weights; called after the model was moved in a way that splits a shared weight in two."""
        self.lm.tie_weights()

    @property
    def config(self) -> Any:
        """The masked LM's Hugging Face configuration; the objective is `cmlm`."""
        return self.lm.config

    @property
    def device(self) -> torch.device:
        """The masked LM's device."""
        return self.lm.device

    @property
    def dtype(self) -> torch.dtype:
        """The masked LM's dtype."""
        return self.lm.dtype

    def forward(self, input_ids: Tensor, view1: Tensor, view2: Tensor, role: Tensor, special_ids: Tensor,
                attention_mask: Tensor | None = None, cu_seqlens: Tensor | None = None, lengths: Lengths | None = None,
                token_type_ids: Tensor | None = None, eligible: Tensor | None = None, jitter: Tensor | None = None,
                divisor: Tensor | None = None, sizes: tuple[int, int, int] | None = None, measured: bool = False,
                group: Any = None, stand_in: bool = False, cached: CachedContrast | None = None, vectors_only: bool = False,
                sample_ids: Any = None, unit_ids: Any = None, eligible_counts: Any = None) -> Any:  # fmt: skip
        """The objective of one batch of B sequences, padded to [B, L] or packed end to end to [T].

        Args:
            input_ids, view1, view2, role: [B, L] or [T], as `complementary_mask` takes and gives them.
            special_ids: int64 [S], tokens excluded from contrast and pooling.
            attention_mask: [B, L]; 0 at padding. Only with a padded batch, which requires it.
            cu_seqlens, lengths: int32 [B + 1] and B ints, the sequences of a packed batch.
            token_type_ids: shape of input_ids, for encoders that have them.
            eligible: bool, shape of input_ids; False excludes a token from contrasts and pooling, like special_ids.
            jitter: int64 [B], shifts of view 2's positions.
            divisor: [3], the counts that the parts are means over; None: those of this batch.
            sizes: numbers of tokens with role 1, with role 2, and eligible, if the host knows them; see `Views`.
            measured: also fill `measures`.
            group: process group whose ranks share their negatives in the sequence part.
            stand_in: this batch is a placeholder, whose sequences do not count.
            cached: this batch's part of a larger batch's sequence contrast; see `gradient_cache`.
            vectors_only: return the sequence vectors (z1, z2), [B, E] each, and compute no loss.
            sample_ids, unit_ids, eligible_counts: entries of a collator's batch that only the masks depend on; ignored.

        Returns:
            `CMLMOutput`.
        """
        can = can_be_masked(input_ids, special_ids, eligible)
        with tied_head(self.lm.get_input_embeddings(), self.lm.get_output_embeddings()) as head_weight:
            if cu_seqlens is None:
                if attention_mask is None:
                    raise ValueError("CMLMModel: expected attention_mask to be given with a padded batch, got None")
                can = can & attention_mask.bool()
                hidden1, hidden2 = self._encode_padded(view1, view2, attention_mask, token_type_ids, jitter)
                batch = len(input_ids)
                cu_seqlens, first_token = row_bounds(attention_mask)
            elif not self.takes_packed:
                rule = f"a padded batch, all that {type(self.lm).__name__} takes"
                raise ValueError(f"CMLMModel: expected input_ids to be {rule}, got one with cu_seqlens")
            else:
                lengths = _checked_lengths(lengths, len(cu_seqlens) - 1, input_ids.numel())
                hidden1, hidden2 = self._encode_packed(view1, view2, cu_seqlens, lengths, token_type_ids, jitter)
                batch, first_token = len(lengths), cu_seqlens[:-1].long()
        can = can.flatten()
        z1, z2 = (self.projection(self._pool(hidden, can, cu_seqlens, first_token)) for hidden in (hidden1, hidden2))
        if stand_in:
            z1, z2, batch = z1[:0], z2[:0], 0
        if vectors_only:
            return z1, z2
        views = Views(hidden1, hidden2, z1, z2, input_ids.flatten(), role.flatten(), can, cu_seqlens, sizes)
        sums = self.loss(views, partial(self.mlm_sum, weight=head_weight), group, cached)
        counts = self.loss.counts(role, batch)
        total = self.loss.total(sums, counts if divisor is None else divisor)
        return CMLMOutput(total, sums.detach(), counts, measure(self, views) if measured and not stand_in else {})

    def _encode_padded(self, view1: Tensor, view2: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None,
                       jitter: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
        # RoBERTa would count positions over tokens other than padding, and a random token may be the padding token.
        first = self._first_position(attention_mask.shape[1]) if self._position_table() is not None else 0
        given = first if jitter is not None or self.pad_of_positions() is not None else None
        return encode_padded(self.lm.base_model, view1, view2, attention_mask, token_type_ids, jitter, given)

    def _encode_packed(self, view1: Tensor, view2: Tensor, cu_seqlens: Tensor, lengths: Lengths,
                       token_type_ids: Tensor | None, jitter: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
        first = self._first_position(int(max(lengths, default=0)))
        return encode_packed(self.lm.base_model, view1, view2, cu_seqlens, lengths, token_type_ids, jitter, first)

    def _position_table(self) -> Any:
        return getattr(getattr(self.lm.base_model, "embeddings", None), "position_embeddings", None)

    def check_jitter(self, jitter: int) -> None:
        """Raise ValueError if `jitter` is not 0 and the encoder has no position table to shift in."""
        table = self._position_table()
        # With more rows (MRA), it is unknown where positions begin.
        known = table is not None and table.weight.shape[0] == self.config.max_position_embeddings
        if jitter and not known:
            rule = "0 for an encoder without a position table of max_position_embeddings rows"
            raise ValueError(f"CMLMModel: expected position_jitter to be {rule}, got {jitter}")

    def _first_position(self, length: int) -> int:
        """The id of the first position; raises if `length` positions and the jitter do not fit the model's table."""
        pad = self.pad_of_positions()
        first = 0 if pad is None else pad + 1
        most = self.config.max_position_embeddings - first - length
        if most < 0:
            rule = f"of at most {most + length} tokens, the positions that the model has"
            raise ValueError(f"CMLMModel: expected sequences to be {rule}, got one of {length}")
        if self.cmlm.position_jitter > most:
            rule = f"<= {most}, what the model's position table leaves beside {length} tokens"
            raise ValueError(f"CMLMModel: expected position_jitter to be {rule}, got {self.cmlm.position_jitter}")
        return first

    def jitter(self, sample_ids: Tensor, seed: int, step: int) -> Tensor | None:
        """Shift of view 2's positions for each sample, int64 [B] in [0, position_jitter]; None if that is 0."""
        most = self.cmlm.position_jitter
        return position_shift(sample_ids, most, seed, step) if most else None

    def _pool(self, hidden: Tensor, eligible: Tensor, cu_seqlens: Tensor, first_token: Tensor) -> Tensor:
        """One vector per sequence, [B, D]: the mean of its eligible tokens, or its first token."""
        if self.cmlm.pooling == "cls":
            return hidden[first_token]
        return mean_rows(hidden, eligible, cu_seqlens)

    def freeze_encoder(self) -> None:
        """Freeze the encoder, so that only the LM head is trained; a decoder tied to the embeddings is frozen as well."""
        for parameter in self.lm.base_model.parameters():
            parameter.requires_grad_(False)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of the LM head at rows [n, D]."""
        logits: Tensor = self.lm.get_output_embeddings()(lm_transform(self.lm, hidden))
        return logits

    def mlm_sum(self, hidden: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Summed cross entropy of the LM head at rows [n, D] with target tokens [n]; `weight` [V, D] replaces its decoder's."""
        decoder = self.lm.get_output_embeddings()
        weight = decoder.weight if weight is None else weight
        rest = -len(hidden) % ROUND
        hidden, target = nn.functional.pad(hidden, (0, 0, 0, rest)), nn.functional.pad(target, (0, rest), value=-100)
        return head_losses(lm_transform(self.lm, hidden), weight, decoder.bias, target).sum()

    def activation_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """As for any Hugging Face model; called by the Trainer."""
        # Earlier versions of transformers have only the earlier name.
        enable = getattr(self.lm, "activation_checkpointing_enable", self.lm.gradient_checkpointing_enable)
        enable(*args, **options)
        self._compile_checkpointed()

    def gradient_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """The name of `activation_checkpointing_enable` in earlier versions of transformers."""
        self.lm.gradient_checkpointing_enable(*args, **options)
        self._compile_checkpointed()

    def compile_layers(self, backend: str = "inductor", mode: str | None = None) -> None:
        """Compile the encoder's layers with torch.compile, once for batches of any size; names and checkpoints stay."""
        self._compiled = {"backend": backend, "mode": mode}
        compile_layers(self.lm, **self._compiled)

    def _compile_checkpointed(self) -> None:
        if self._compiled is not None:
            compile_checkpointed_layers(self.lm, **self._compiled)

def _checked_lengths(lengths: Lengths | None, sequences: int, tokens: int) -> Lengths:
    """The lengths; ValueError if they cannot be those of cu_seqlens, whose values only the device knows."""
    total = None if lengths is None else int(np.sum(lengths))
    if lengths is None or len(lengths) != sequences or total != tokens:
        rule = f"those of the {sequences} sequences of cu_seqlens, {tokens} tokens in all"
        got = "None" if lengths is None else f"{len(lengths)}, {total} tokens in all"
        raise ValueError(f"CMLMModel: expected lengths to be {rule}, got {got}")
    return lengths
