"""The ops, one file each: schema, reference, checks, samples, autograd formula and public function."""

from . import dropout, softmax_loss  # noqa: F401 - declare the ops that layers and mlm_cross_entropy call
from .complementary_mask import ComplementaryMask, complementary_mask
from .info_nce import info_nce
from .mlm_cross_entropy import mlm_cross_entropy
from .token_contrastive import token_contrastive
from .token_similarity import token_similarity
from .varlen_attention import varlen_attention

__all__ = [
    "ComplementaryMask",
    "complementary_mask",
    "info_nce",
    "mlm_cross_entropy",
    "token_contrastive",
    "token_similarity",
    "varlen_attention",
]
