"""Post-training steps as people write them, to compare ours with.

    naive    two padded passes, logits of the whole vocabulary at every position, eager losses, plain AdamW
    strong   both views in one pass, batches of sequences of similar length, the LM head on the masked rows, fused AdamW

Both make their masks with transformers' collator and, like ours, clip the gradient norm.
"""

from .common import to_device
from .naive import Naive
from .strong import Strong

__all__ = ["Naive", "Strong", "to_device"]
