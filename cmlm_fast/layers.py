"""Faster encoder layers for the CPU: `use_fast_layers(lm)` swaps them in place; parameters keep their names.

    nn.Linear    float32 products with oneDNN where MKL, which PyTorch calls, leaves the CPU's widest vectors unused
    nn.Dropout   the op `dropout`: threads draw in parallel, and no mask is kept
    nn.Embedding, if its weight is also the LM head's: the gradient of its rows is added to the head's, in place

On a GPU or under torch.compile each acts as PyTorch's own layer; so do `Linear` and `Dropout` in torch.func transforms,
forward mode and tracing, and `Linear` in 16 bits and under autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._library import is_transformed, no_second_derivative
from .backends import replacement_op
from .ops._linear import linear


class Linear(nn.Linear):
    """`nn.Linear` with the faster library."""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in_features] to [..., out_features]."""
        return linear(input, self.weight, self.bias)


class Dropout(nn.Dropout):
    """`nn.Dropout`; on the CPU its seed comes from torch's generator, which checkpoints save and recomputation replays."""

    def forward(self, input: Tensor) -> Tensor:
        """input of any shape."""
        drops = self.training and not self.inplace and 0.0 < self.p < 1.0 and input.dim() > 0
        drops = drops and not is_transformed(input)  # no transform can read a seed
        own = replacement_op("dropout", input.device) if drops else None
        if own is None:
            return super().forward(input)
        out: Tensor = own(input, self.p, int(torch.randint(2**62, (), device="cpu")))
        return out


class _TiedWeight(torch.autograd.Function):
    """weight [V, D] twice, for the embedding and for the LM head; the backward pass adds up their gradients."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, rows: Tensor | None, dense: Tensor | None) -> Tensor | None:
        no_second_derivative("embedding")
        if rows is None or dense is None:
            return rows.to_dense() if rows is not None else dense  # the optimizer takes no sparse gradient
        return dense.add_(rows)  # only the head's product holds `dense`; autograd would allocate a new table


class TiedEmbedding(nn.Embedding):
    """`nn.Embedding`; inside `tied_head` its gradient is sparse, and is added to the head's."""

    weight_of_pass: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """input [...] of ids to [..., embedding_dim]."""
        rows = self.weight_of_pass is not None
        weight = self.weight if self.weight_of_pass is None else self.weight_of_pass
        return F.embedding(input, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, rows)


@contextmanager
def tied_head(embedding: nn.Module, decoder: Any) -> Iterator[Tensor | None]:
    """Context of a forward pass whose LM head multiplies by the yielded tensor; None: by its own weight."""
    here = decoder.weight.device.type == "cpu" and not torch.compiler.is_compiling()
    if not isinstance(embedding, TiedEmbedding) or embedding.weight is not decoder.weight or not here:
        yield None
        return
    embedding.weight_of_pass, head = _TiedWeight.apply(embedding.weight)
    try:
        yield head
    finally:
        embedding.weight_of_pass = None


class LowPrecisionLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` with input and output in autocast's dtype, so that the sums between layers have that dtype as well."""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., *normalized_shape]; mean and variance are float32, as PyTorch's kernels have them."""
        kind = input.device.type
        if not torch.is_autocast_enabled(kind):
            return super().forward(input)
        dtype = torch.get_autocast_dtype(kind)
        weight, bias = (None if x is None else x.to(dtype) for x in (self.weight, self.bias))
        with torch.autocast(kind, enabled=False):  # autocast would use float32
            return F.layer_norm(input.to(dtype), self.normalized_shape, weight, bias, self.eps)


def use_low_precision_layer_norm(model: nn.Module, use: bool = True) -> int:
    """Switch the model's plain layer norms to low precision, or back; parameters, names and hooks stay.

    Returns:
        The number of layer norms.
    """
    norms = [module for module in model.modules() if type(module) in (nn.LayerNorm, LowPrecisionLayerNorm)]
    for module in norms:
        module.__class__ = LowPrecisionLayerNorm if use else nn.LayerNorm
    return len(norms)


def use_fast_layers(model: nn.Module, head: nn.Parameter | None = None) -> None:
    """Replace the model's plain layers by those above, in place; parameters, names and hooks stay.

    Args:
        model: any module.
        head: weight of an LM head to use with `tied_head`; None: there is none.
    """
    fast: dict[type, type] = {nn.Linear: Linear, nn.Dropout: Dropout}
    for module in model.modules():
        tied = type(module) is nn.Embedding and module.weight is head
        tied = tied and module.max_norm is None and not module.scale_grad_by_freq  # not with a sparse gradient
        module.__class__ = TiedEmbedding if tied else fast.get(type(module), type(module))
