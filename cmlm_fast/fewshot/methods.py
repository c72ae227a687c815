"""The methods under comparison: how each uses the unlabelled texts, and how it then learns the labels."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..config import CMLMConfig


@dataclass(frozen=True)
class Contrast:
    """Supervised contrast while fine-tuning (Gunel et al. 2021): L = (1 − weight)·L_ce + weight·L_supcon.

    Every batch passes through the encoder twice, with two dropout masks, so that each text has a positive even if its class
    occurs only once in the batch. L_supcon is `info_nce(first, second, labels=…)` of the 2B first-token vectors, L_ce the mean
    over both passes.

    Attributes:
        weight: in [0, 1].
        temperature: τ > 0.
    """

    weight: float = 0.9
    temperature: float = 0.3

    def __post_init__(self) -> None:
        for name, holds, rule in (("weight", 0 <= self.weight <= 1, "in [0, 1]"),
                                  ("temperature", 0 < self.temperature < float("inf"), "finite and > 0")):  # fmt: skip
            if not holds:
                raise ValueError(f"Contrast: expected {name} to be {rule}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Method:
    """One way from unlabelled texts and a few labels to a classifier.

    Attributes:
        description: a short description.
        objective: objective of the post-training; None: no post-training.
        second: view 2 is the "masked" text, another text made by "eda", or the text's "paraphrase"; with another text nothing
            is masked.
        whole_word: mask whole words.
        contrast: supervised contrast while fine-tuning.
    """

    description: str
    objective: CMLMConfig | None = None
    second: str = "masked"
    whole_word: bool = False
    contrast: Contrast | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """Everything that the scores depend on, as plain values."""
        known = asdict(self)
        del known["description"]
        return known


_SIMCSE = CMLMConfig.from_preset("simcse")

METHODS: dict[str, Method] = {
    "ft": Method("fine-tuning alone"),
    "scl": Method("no post-training; supervised contrast while fine-tuning (Gunel et al. 2021)", contrast=Contrast()),
    "tapt": Method("MLM on both views (Gururangan et al. 2020)", CMLMConfig.from_preset("tapt")),
    "simcse": Method("sequence contrast of two dropout passes (Gao et al. 2021)", _SIMCSE),
    "seq-eda": Method("sequence contrast of a text and its EDA variant (Wei and Zou 2019)", _SIMCSE, second="eda"),
    "cssl": Method("sequence contrast of a text and its paraphrase", _SIMCSE, second="paraphrase"),
    "cmlm": Method("CMLM, preset balanced", CMLMConfig.from_preset("balanced")),
    "cmlm-paper": Method("CMLM, preset paper", CMLMConfig.from_preset("paper")),
    "cmlm-no-token": Method("cmlm without the token contrast", CMLMConfig(token_weight=0.0)),
    "cmlm-no-sequence": Method("cmlm without the sequence contrast", CMLMConfig(sequence_weight=0.0)),
    "cmlm-no-mlm": Method("cmlm without MLM", CMLMConfig(mlm_weight=0.0)),
    "cmlm-independent": Method("cmlm with independent masks for the two views", CMLMConfig(complementary=False)),
    "cmlm-bernoulli": Method("cmlm with each token's mask drawn independently", CMLMConfig(sampling="bernoulli")),
    "cmlm-whole-word": Method("cmlm with whole-word masks", CMLMConfig(), whole_word=True),
}

#: The fields that affect the sequence contrast of two texts.
_SEQUENCE = ("sequence_weight", "sequence_temperature", "learn_temperature", "scheme", "pooling", "projection")

_KINDS: dict[str, Any] = {"float": float, "int": int, "str": str, "bool": {"true": True, "false": False}.__getitem__}


def find_method(text: str) -> Method:
    """The method `name`, or `name:field=value:…` with other values in its objective (or in scl's contrast).

    Raises:
        ValueError: unknown method or field, or a value that breaks its rule.

    >>> find_method("cmlm:sequence_weight=0.3:scope=sequence").objective.sequence_weight
    0.3
    """
    name, *changes = text.split(":")
    if name not in METHODS:
        raise ValueError(f"expected methods to be among {', '.join(METHODS)}, each also with :field=value, got {name!r}")
    method = METHODS[name]
    if not changes:
        return method
    options: Any = method.objective or method.contrast
    if options is None:
        raise ValueError(f"expected method {name} to have no options, got {text!r}")
    kinds = {field.name: str(field.type) for field in fields(options)}
    if method.objective and method.second != "masked":  # two texts share no positions: no masks, no other losses
        kinds = {field: kind for field, kind in kinds.items() if field in _SEQUENCE}
    given: dict[str, Any] = {}
    for change in changes:
        option, given_value, value = change.partition("=")
        if not given_value:
            raise ValueError(f"expected methods to be names, or name:field=value, got {text!r}")
        if option not in kinds:
            raise ValueError(f"expected an option of method {name} to be one of {', '.join(kinds)}, got {option!r}")
        try:
            given[option] = _KINDS[kinds[option]](value)
        except (ValueError, KeyError) as error:
            raise ValueError(f"expected {option} of method {name} to be a {kinds[option]}, got {value!r}") from error
    which = "objective" if method.objective else "contrast"
    return replace(method, **{which: replace(options, **given)})
