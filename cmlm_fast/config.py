"""The objective of post-training: how sequences are masked, and the weights and temperatures of the three losses."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

#: Presets: the fields that differ from the defaults. `paper` is the published command line's objective (alpha 0.5).
PRESETS: dict[str, dict[str, Any]] = {
    "balanced": {},
    "paper": {"mlm_weight": 0.5, "token_weight": 0.5, "sequence_weight": 0.5, "complement_rate": 0.7,
              "token_temperature": 0.05, "mlm_views": "first", "pooling": "cls"},
    "tapt": {"mlm_weight": 1.0, "token_weight": 0.0, "sequence_weight": 0.0},
    "seq": {"mlm_weight": 0.0, "token_weight": 0.0, "sequence_weight": 1.0},
    "simcse": {"mlm_weight": 0.0, "token_weight": 0.0, "sequence_weight": 1.0, "rate": 0.0, "complement_rate": 0.0},
}  # fmt: skip

_CHOICES = {"sampling": ("exact", "bernoulli"), "mlm_views": ("both", "first"), "scope": ("batch", "sequence"),
            "scheme": ("cross", "nt_xent"), "pooling": ("mean", "cls")}  # fmt: skip
_KINDS: dict[str, tuple[type, str]] = {"float": (Real, "a number"), "int": (Integral, "a whole number"),
                                       "bool": (bool, "True or False"), "str": (str, "a string")}  # fmt: skip
FILE = "cmlm_config.json"  # next to a checkpoint's other files


@dataclass(frozen=True)
class CMLMConfig:
    """The objective L = mlm_weight·L_mlm + token_weight·L_token + sequence_weight·L_sequence, and its masks.

    Attributes:
        rate: share of a sequence's eligible units (tokens, or whole words) masked in view 1, in [0, 1].
        complement_rate: share of the remaining units masked in view 2; the default masks as many as in view 1.
        complementary: False draws the masks of the views independently, view 2 masking the share that complementary masks
            would; a token masked in both views is predicted in both and excluded from the token contrast.
        sampling: "exact" masks floor(rate·n + ½) of a sequence's n units, at least one if rate > 0; "bernoulli"
            draws each unit separately.
        mask_share, random_share: shares of masked tokens replaced by the mask token and by a random one.
        mlm_weight, token_weight, sequence_weight: weights of the losses; a loss of weight 0 is not computed.
        mlm_views: MLM at the masked tokens of "both" views or of the "first".
        token_temperature, sequence_temperature: τ of the two contrasts; if learned, its initial value.
        learn_temperature: learn both τ, as a logit scale log(1/τ) of at most log 100.
        scope: a masked token's candidates are the other view's tokens in the whole "batch" or in its "sequence".
        exclude_same_token: the same token elsewhere is not a negative.
        position_jitter: view 2's positions are shifted by a draw from [0, position_jitter]; 0 is off. Only for
            encoders with a position table: relative positions do not change.
        scheme: "cross" contrasts view 1 with view 2, "nt_xent" all 2B vectors with each other.
        pooling: a sequence's vector is the "mean" of its eligible tokens or its first token ("cls").
        projection: width of a two-layer head on that vector; 0 is none. Models saved for other programs omit it.

    Raises:
        ValueError: a value is invalid.

    >>> CMLMConfig.from_preset("paper", token_temperature=0.1).complement_rate
    0.7
    """

    rate: float = 0.15
    complement_rate: float = 0.15 / 0.85
    complementary: bool = True
    sampling: str = "exact"
    mask_share: float = 0.8
    random_share: float = 0.1
    mlm_weight: float = 1.0
    token_weight: float = 0.3
    sequence_weight: float = 0.1
    mlm_views: str = "both"
    token_temperature: float = 0.2
    sequence_temperature: float = 0.05
    learn_temperature: bool = False
    scope: str = "batch"
    exclude_same_token: bool = True
    position_jitter: int = 0
    scheme: str = "cross"
    pooling: str = "mean"
    projection: int = 0

    def __post_init__(self) -> None:
        def rule(condition: bool, name: str, text: str) -> None:
            if not condition:
                raise ValueError(f"CMLMConfig: expected {name} to be {text}, got {getattr(self, name)!r}")

        for field in fields(self):
            kinds, text = _KINDS[str(field.type)]
            value = getattr(self, field.name)
            rule(isinstance(value, kinds) and (kinds is bool) == isinstance(value, bool), field.name, text)
            if kinds is Real and not isinstance(value, (int, float)):  # numpy's
                object.__setattr__(self, field.name, float(value))
            elif kinds is Integral:
                object.__setattr__(self, field.name, int(value))
        for name in ("rate", "complement_rate", "mask_share", "random_share"):
            rule(0.0 <= getattr(self, name) <= 1.0, name, "in [0, 1]")
        rule(self.mask_share + self.random_share <= 1.0 + 1e-9, "random_share", f"<= 1 - mask_share = {1 - self.mask_share:g}")
        for name in ("mlm_weight", "token_weight", "sequence_weight"):
            rule(0.0 <= getattr(self, name) < float("inf"), name, "finite and >= 0")
        weights = self.mlm_weight + self.token_weight + self.sequence_weight
        rule(weights > 0, "sequence_weight", "> 0 if the other weights are 0")
        for name in ("token_temperature", "sequence_temperature"):
            rule(0.0 < getattr(self, name) < float("inf"), name, "finite and > 0")
            rule(not self.learn_temperature or getattr(self, name) >= 0.01, name, ">= 0.01 if learned")
        for name, allowed in _CHOICES.items():
            rule(getattr(self, name) in allowed, name, " or ".join(map(repr, allowed)))
        for name in ("position_jitter", "projection"):
            rule(getattr(self, name) >= 0, name, ">= 0")
        masked = self.rate > 0 or (self.complement_rate > 0 and self.mlm_views == "both")
        rule(masked or self.mlm_weight == 0, "mlm_weight", "0 if nothing is masked")
        rule(self.rate + self.complement_rate > 0 or self.token_weight == 0, "token_weight", "0 if nothing is masked")

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> CMLMConfig:
        """A preset ("balanced", "paper", "tapt", "seq", "simcse") with some fields changed.

        Raises:
            ValueError: there is no such preset or field, or a value is invalid.

        >>> CMLMConfig.from_preset("tapt").token_weight
        0.0
        """
        if name not in PRESETS:
            raise ValueError(f"CMLMConfig: expected preset to be one of {', '.join(PRESETS)}, got {name!r}")
        known = [field.name for field in fields(cls)]
        for change in changes:
            if change not in known:
                raise ValueError(f"CMLMConfig: expected a field to be one of {', '.join(known)}, got {change!r}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def of_checkpoint(cls, folder: str | Path) -> CMLMConfig:
        """The objective that a checkpoint of this package was trained with; the default one if `folder` does not say.

        Raises:
            ValueError: the file there is not one that `save_pretrained` wrote.
        """
        file = Path(folder) / FILE
        if not file.is_file():
            return cls()
        try:
            return cls.from_preset("balanced", **json.loads(file.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"CMLMConfig: expected {file} to hold the fields of an objective, got: {error}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the objective next to a checkpoint's other files."""
        (Path(folder) / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
