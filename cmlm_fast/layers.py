"""Faster layers for encoders on the CPU, under the parameters' own names: `use_fast_layers(lm)` turns them in place.

    nn.Linear    float32 products by oneDNN where MKL, which PyTorch calls, leaves the CPU's widest vectors unused
    nn.Dropout   the op `dropout`: threads draw in parallel, and no mask is kept
    nn.Embedding, where its weight is the LM head's too: adds its rows to the head's gradient, and makes no table of its own

On a GPU, in another dtype, under autocast or torch.compile each is what it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._library import native_kernels, op
from .ops._linear import linear


class Linear(nn.Linear):
    """`nn.Linear` by the faster library."""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in_features] to [..., out_features]."""
        return linear(input, self.weight, self.bias)


class Dropout(nn.Dropout):
    """`nn.Dropout`; on the CPU its seed comes from torch's generator, which checkpoints keep and recomputation replays."""

    def forward(self, input: Tensor) -> Tensor:
        """input of any shape."""
        own = input.device.type == "cpu" and not torch.compiler.is_compiling() and ("dropout", "CPU") in native_kernels
        if not own or not self.training or not 0.0 < self.p < 1.0:
            return super().forward(input)
        out: Tensor = op("dropout")(input, self.p, int(torch.randint(2**62, ())))
        return out


class TiedEmbedding(nn.Embedding):
    """`nn.Embedding`; inside `head_joins` with a gradient of rows, which autograd adds to the dense one that the LM head makes
    of that weight. Elsewhere, when the encoder is trained on alone, say, its gradient is dense."""

    head_joins = False

    def forward(self, input: Tensor) -> Tensor:
        """input of ids to [..., embedding_dim]."""
        rows = self.head_joins and input.device.type == "cpu" and not torch.compiler.is_compiling()
        return F.embedding(input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, rows)


@contextmanager
def head_joins(embedding: nn.Module) -> Iterator[None]:
    """Forward passes whose loss has a part of the LM head in it."""
    if not isinstance(embedding, TiedEmbedding):
        yield
        return
    embedding.head_joins = True
    try:
        yield
    finally:
        embedding.head_joins = False


def use_fast_layers(model: nn.Module, head: nn.Parameter | None = None) -> None:
    """Turn the model's plain layers into those above; parameters, names and hooks stay.

    Args:
        model: any module.
        head: weight of an LM head that `head_joins`; None: there is none.
    """
    fast: dict[type, type] = {nn.Linear: Linear, nn.Dropout: Dropout}
    for module in model.modules():
        tied = type(module) is nn.Embedding and module.weight is head
        module.__class__ = TiedEmbedding if tied else fast.get(type(module), type(module))
