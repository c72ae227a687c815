"""The checkpoint that an experiment starts from, and its fingerprint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from ..config import CMLMConfig
from ..options import expect
from ..same_run import fingerprint_of_weights
from ..start import check_vocabulary, load_model, load_tokenizer, sequence_length
from .methods import Method

if TYPE_CHECKING:
    from ..modeling import CMLMModel
    from .experiment import FewShotExperiment

_OF_THE_FILE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


class Start(NamedTuple):
    """Tokenizer and model; maximum tokens per sequence; a fingerprint of everything that affects their output."""

    tokenizer: Any
    model: CMLMModel
    max_length: int
    id: str


def load_start(experiment: FewShotExperiment, methods: Mapping[str, Method]) -> Start:
    """Load and check the start. If the checkpoint lacks an LM head, the seed initialises one."""
    from transformers import set_seed

    tokenizer = load_tokenizer(experiment.model)
    set_seed(experiment.seed)
    model = load_model(experiment.model, CMLMConfig())
    # Extra outputs are of no use here, and a model that returns attentions cannot be saved with packed attention.
    model.config.update({"return_dict": True, "output_hidden_states": False, "output_attentions": False})
    check_vocabulary(model, tokenizer)
    objectives = [method.objective for method in methods.values() if method.objective]
    jitter = max((each.position_jitter for each in objectives), default=0)
    model.check_jitter(jitter)
    length = sequence_length(model, tokenizer, experiment.max_length, jitter)
    # The tokenizer's whole behaviour, and the configuration except for its origin.
    config = {name: value for name, value in model.config.to_diff_dict().items() if name not in _OF_THE_FILE}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    settings = json.dumps([config, words, *_unusual(tokenizer)], sort_keys=True, default=str)
    if any(method.whole_word for method in methods.values()):  # fail now if the tokenizer has no words
        from ..data import tokenize_texts

        tokenize_texts(["a text"], tokenizer, whole_word=True)  # resets the truncation and padding that `words` contains
    check_dropout(experiment.model, model.lm, methods)
    return Start(tokenizer, model, length, fingerprint_of_weights(model, settings))


def _unusual(tokenizer: Any) -> list[Any]:
    """Settings that tokenizer.json lacks, if not the usual ones, so that most starts add nothing to their fingerprint."""
    side, names = getattr(tokenizer, "truncation_side", "right"), list(tokenizer.model_input_names)
    found: list[Any] = [side] if side != "right" else []
    if tokenizer.mask_token != ("[MASK]" if "[MASK]" in tokenizer.get_vocab() else "<mask>"):
        found.append({"mask_token": tokenizer.mask_token})
    if names != list(type(tokenizer).model_input_names):
        found.append({"model_input_names": names})
    return found


def check_dropout(name: str, lm: Any, methods: Mapping[str, Method]) -> None:
    """Raise ValueError if a method contrasts two dropout passes and the encoder has no dropout."""
    layers = (module.p for module in lm.base_model.modules() if isinstance(module, nn.Dropout))
    if max(layers, default=0.0) > 0 or getattr(lm.config, "attention_dropout", 0.0) > 0:
        return
    for label, method in methods.items():
        seen = method.objective
        same = method.second == "masked" and seen is not None and seen.rate == seen.complement_rate == 0
        rule = f"one with dropout for method {label}, whose two passes differ by nothing else"
        expect(method.contrast is None and not same, "model", rule, f"{name}, without")
