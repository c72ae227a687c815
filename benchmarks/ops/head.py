"""The LM head's loss at the masked rows, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import cmlm_fast

from ..registry import Call, Op, Problem, Provider, Shape
from ._losses import Check, compiled, leaf, loss_traffic, products, training, truth
from .contrast import chunked, cut, liger, no_chunked


def build(device: torch.device, N: int, V: int, D: int, dtype: str = "float32") -> Problem:
    """N masked rows of width D against a vocabulary of V, with a bias (of zeros, as heads start)."""
    kind = getattr(torch, dtype)
    hidden, weight = leaf(N, D, device, kind), (leaf(V, D, device, kind).detach() * 0.02).requires_grad_()
    bias, target = torch.zeros(V, device=device, dtype=kind, requires_grad=True), torch.randint(0, V, (N,)).to(device)

    def part(rows: slice, h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h[rows], w, b), target[rows], reduction="sum") / N

    leaves = (hidden, weight, bias)
    eager = training(lambda h, w, b: _eager(h, w, b, target), leaves)
    return Problem({"N": N, "V": V, "D": D, "dtype": dtype}, device, (*leaves, target), (6.0 * N * V * D, "flop"),
                   loss_traffic(leaves), Check(lambda: truth(part, N, V, leaves), eager, kind), products(hidden, weight),
                   N * V * hidden.element_size())  # fmt: skip


def _eager(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), target)


def _make(loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[[Problem], Call]:
    return lambda p: training(lambda h, w, b: loss(h, w, b, p.inputs[3]), p.inputs[:3])


def _shape(N: int, suite: str = "quick", sweep: str = "", V: int = 30_522, D: int = 384, dtype: str = "float32",
           label: str = "") -> Shape:  # fmt: skip
    return Shape(f"{label} N={N} V={V} D={D} {dtype}".strip(), {"N": N, "V": V, "D": D, "dtype": dtype}, suite, sweep)


OPS = (
    Op(
        "mlm_cross_entropy", "LM head and cross entropy at the masked rows, forward and backward",
        (
            _shape(12, "smoke", V=50, D=16), *(_shape(n, sweep="N") for n in (100, 200, 400)),
            _shape(614, "full", D=768, label="bert-base"), _shape(614, "full", D=768, dtype="bfloat16", label="bert-base"),
            _shape(614, "full", V=50_265, D=768, label="roberta-base"),
            *(_shape(n, "full", "N") for n in (800, 2000, 8000)),
        ),
        build,
        (
            Provider("ours/python", _make(cmlm_fast.mlm_cross_entropy), score_matrices=3),
            Provider("eager", _make(_eager), score_matrices=3),
            Provider("torch.compile", _make(lambda *inputs: compiled(_eager)(*inputs)), score_matrices=3),
            Provider("F.linear_cross_entropy", _make(lambda h, w, b, t: chunked(h, w, t, b)), unfit=no_chunked),
            Provider("cut-cross-entropy", _make(lambda h, w, b, t: cut(h, w, t)), "cut_cross_entropy", score_matrices=3),
            Provider("liger-kernel", _make(lambda h, w, b, t: liger(h, w, t, b)), "liger_kernel", gpu_only=True),
        ),
        _make(cmlm_fast.mlm_cross_entropy),
        "the softmax over the vocabulary between the products (cut-cross-entropy takes no bias)",
    ),
)  # fmt: skip
