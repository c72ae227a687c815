"""The LM heads of Hugging Face masked LMs: the layers between encoder and decoder."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import Tensor, nn

#: Encoders whose padding changes the other tokens' states despite the attention mask.
_PADS_LEAK = ("convbert", "nystromformer", "yoso")


def lm_transform(lm: Any, hidden: Tensor | None = None) -> Any:
    """Apply a masked LM's head, up to its decoder, to hidden rows [n, D]; without rows, only check that the head is known."""
    predictions: Any = getattr(getattr(lm, "cls", lm), "predictions", None)
    head: Any = getattr(lm, "lm_head", None)
    own_bias = getattr(head, "bias", None) is not None and getattr(lm.get_output_embeddings(), "bias", None) is None  # ESM
    gelu = nn.functional.gelu
    steps: list[Any] | None
    known = hidden is not None or (  # checked once, not in every step
        hasattr(lm.base_model, "embeddings") and "attention_mask" in signature(lm.base_model.forward).parameters
        and lm.config.model_type not in _PADS_LEAK)
    if not known or (hasattr(predictions, "transform") and hasattr(predictions, "dense")):  # FNet and others, MobileBERT
        steps = None
    elif hasattr(predictions, "transform"):  # BERT and its kin
        steps = [predictions.transform]
    elif hasattr(predictions, "LayerNorm"):  # ALBERT
        steps = [predictions.dense, predictions.activation, predictions.LayerNorm]
    elif hasattr(head, "layer_norm") and hasattr(head, "dense") and not own_bias:  # RoBERTa, XLM-R, CamemBERT, MPNet
        steps = [head.dense, gelu, head.layer_norm]
    elif hasattr(lm, "vocab_transform"):  # DistilBERT
        steps = [lm.vocab_transform, lm.activation, lm.vocab_layer_norm]
    elif hasattr(lm, "generator_predictions"):  # ELECTRA
        steps = [lm.generator_predictions]
    elif hasattr(lm, "head") and hasattr(lm, "decoder"):  # ModernBERT
        steps = [lm.head]
    else:
        steps = None
    if steps is None:
        kinds = "BERT, RoBERTa, XLM-R, DistilBERT, ELECTRA, MPNet, ALBERT or ModernBERT"
        raise ValueError(f"CMLMModel: expected lm to be a masked LM of the kind of {kinds}, got {type(lm).__name__}")
    for step in steps if hidden is not None else ():
        hidden = step(hidden)
    return hidden
