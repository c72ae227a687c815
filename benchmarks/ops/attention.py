"""Attention over sequences packed end to end, forward and backward, against attention over the padded batch."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import cmlm_fast
from cmlm_fast.testing import eager_varlen_attention

from ..registry import Call, Op, Problem, Provider, Shape, ours
from ._losses import Check, training


def build(device: torch.device, B: int, L: int, H: int, D: int, dtype: str = "float32", dropout: float = 0.0) -> Problem:
    """B sequences of L/4 to L tokens (even steps), H heads of width D; the loss is the dot product with a fixed matrix."""
    kind = getattr(torch, dtype)
    lengths = [round(L * (1 + 3 * b / max(B - 1, 1)) / 4) for b in range(B)]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
    q, k, v = (torch.randn(sum(lengths), H, D).to(device, kind).requires_grad_() for _ in range(3))
    upstream = torch.randn(sum(lengths), H, D).to(device)
    real = torch.arange(L, device=device) < torch.tensor(lengths, device=device)[:, None]

    def exact() -> list[Tensor]:
        wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
        loss = (eager_varlen_attention(*wide, cu, D**-0.5, dropout, 0, 0) * upstream.double()).sum()
        return [loss.detach(), *torch.autograd.grad(loss, wide)]

    pairs = float(sum(n * n for n in lengths) * H * D)
    sizes = {"B": B, "L": L, "H": H, "D": D, "dtype": dtype, "dropout": dropout}
    problem = Problem(sizes, device, (q, k, v, cu, upstream, real), (12 * pairs, "flop"),
                      8.0 * q.numel() * q.element_size(), lambda name, answer: None, matrix=B * H * L * L * q.element_size())
    held = Check(exact, _loop(problem), kind)
    problem.check = lambda name, answer: held(name, [x[real] if x is not None and x.dim() == 4 else x for x in answer])
    blocks = [[x.detach()[begin:begin + n].transpose(0, 1).contiguous() for x in (q, k, v)]
              for begin, n in zip(cu.tolist(), lengths, strict=False)]  # fmt: skip
    problem.ceiling = lambda: [_six(*block) for block in blocks]
    return problem


def _six(q: Tensor, k: Tensor, v: Tensor) -> None:
    """The unavoidable products: scores, weighted values, and the four of the backward pass."""
    s = q @ k.mT
    s @ v, q @ v.mT, s.mT @ q, s @ k, s.mT @ q


def _ours(backend: str | None, problem: Problem) -> Call:
    q, k, v, cu, upstream, _ = problem.inputs
    options = {"dropout": problem.sizes["dropout"], "backend": backend}
    return training(lambda *x: (cmlm_fast.varlen_attention(*x, cu, **options) * upstream).sum(), (q, k, v))


def _loop(problem: Problem) -> Call:
    q, k, v, cu, upstream, _ = problem.inputs
    options = (cu, q.shape[-1] ** -0.5, problem.sizes["dropout"], 0, 0)
    return training(lambda *x: (eager_varlen_attention(*x, *options) * upstream).sum(), (q, k, v))


def _padded(problem: Problem) -> Call:
    """What an encoder does without packing: pads every sequence to the longest, and masks the padding."""
    *rows, _, upstream, real = problem.inputs
    *rows, upstream = (x.new_zeros(*real.shape, *x.shape[1:]).index_put_((real,), x.detach()) for x in (*rows, upstream))

    def loss(*x: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in x), attn_mask=real[:, None, None, :])
        return (out.transpose(1, 2) * upstream).sum()

    return training(loss, [x.requires_grad_() for x in rows])


def _no_dropout(problem: Problem) -> str:
    return "PyTorch's dropout draws other numbers, so that no answer can be compared" if problem.sizes["dropout"] else ""


def _slow(backend: str, problem: Problem) -> str:
    slow = backend == "reference" and problem.sizes["dropout"] and problem.device.type == "cuda"
    return "it draws dropout row by row, seconds per call on a GPU" if slow else ""


def _shape(B: int, L: int, H: int, D: int, dtype: str, suite: str = "quick", label: str = "",
           dropout: float = 0.0) -> Shape:  # fmt: skip
    text = f"{label} {B} sequences of {L // 4} to {L} H={H} D={D} {dtype}" + f" dropout {dropout}" * bool(dropout)
    sizes = {"B": B, "L": L, "H": H, "D": D, "dtype": dtype, "dropout": dropout}
    return Shape(text.strip(), sizes, suite)


OPS = (
    Op(
        "varlen_attention", "attention of packed sequences, forward and backward",
        (
            _shape(3, 12, 2, 8, "float32", "smoke"),
            *(_shape(32, 128, 12, 64, dtype, label="bert-base") for dtype in ("float32", "bfloat16")),
            _shape(8, 128, 2, 64, "float32", dropout=0.1),
            *(_shape(16, 512, 12, 64, dtype, "full", "bert-base") for dtype in ("float32", "bfloat16")),
            _shape(32, 128, 12, 64, "float32", "full", "bert-base", dropout=0.1),
        ),
        build,
        (
            *ours("varlen_attention", _ours, unfit=_slow),
            Provider("SDPA, padded", _padded, unfit=_no_dropout),
            Provider("eager", _loop, unfit=_no_dropout),
        ),
        partial(_ours, None),
        "the softmax between products of short sequences",
    ),
)  # fmt: skip
