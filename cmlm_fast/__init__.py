"""cmlm_fast: fused ops and a trainer for CMLM post-training of text encoders (arXiv 2106.02327)."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from . import _library, ops
from .backends import available, use_backend
from .ops import (
    ComplementaryMask,
    complementary_mask,
    info_nce,
    mlm_cross_entropy,
    token_contrastive,
    token_similarity,
    varlen_attention,
)

if TYPE_CHECKING:
    from . import data
    from .config import CMLMConfig
    from .data import CMLMDataCollator
    from .fewshot import FewShotExperiment
    from .losses import CMLMLoss, InfoNCELoss, TokenContrastiveLoss
    from .masking import Masker
    from .modeling import CMLMModel, CMLMOutput
    from .trainer import CMLMTrainer, CMLMTrainingArguments

try:
    __version__ = version("cmlm_fast")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0.0.0"

_library.load_kernels()

# transformers takes seconds to import: names that need it are resolved on first use.
_LAZY = {
    "CMLMConfig": "config",
    "CMLMDataCollator": "data",
    "CMLMLoss": "losses",
    "InfoNCELoss": "losses",
    "TokenContrastiveLoss": "losses",
    "CMLMModel": "modeling",
    "CMLMOutput": "modeling",
    "Masker": "masking",
    "CMLMTrainer": "trainer",
    "CMLMTrainingArguments": "trainer",
    "FewShotExperiment": "fewshot",
}


def __getattr__(name: str) -> Any:
    if name == "data":
        return import_module(".data", __name__)
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


__all__ = [
    "CMLMConfig",
    "CMLMDataCollator",
    "CMLMLoss",
    "CMLMModel",
    "CMLMOutput",
    "CMLMTrainer",
    "CMLMTrainingArguments",
    "ComplementaryMask",
    "FewShotExperiment",
    "InfoNCELoss",
    "Masker",
    "TokenContrastiveLoss",
    "available",
    "complementary_mask",
    "data",
    "info_nce",
    "mlm_cross_entropy",
    "ops",
    "token_contrastive",
    "token_similarity",
    "use_backend",
    "varlen_attention",
]
