"""Token-level contrast, forward and backward: N anchors against M keys of the batch, or of their own sequence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cmlm_fast
from cmlm_fast.testing import eager_scores, eager_token_contrastive

from ..registry import Call, Op, Problem, Provider, Shape, Wrong, ours
from ._losses import Check, compiled, error, leaf, loss_traffic, products, training, truth

TAU = 0.05


def build(device: torch.device, N: int, M: int, D: int, dtype: str = "float32", length: int = 0,
          exclude: bool = False) -> Problem:  # fmt: skip
    """N anchors and M keys of width D.

    `length`: keys come in sequences of that length; anchors are spread evenly over them and meet only keys of their own.
    `exclude`: the same word elsewhere is not a negative (5,000 words).
    """
    kind = getattr(torch, dtype)
    query, key = leaf(N, D, device, kind), leaf(M, D, device, kind)
    target = torch.arange(0, M, M // N)[:N] if length else torch.randperm(M).repeat(-(-N // M))[:N]
    words, start, end = torch.randint(0, 5000, (M,)), None, None
    if length:
        start = (target // length * length).int()
        end = (start + length).to(device)
        start = start.to(device)
    tokens = (words[target].to(device), words.to(device)) if exclude else (None, None)
    inputs = (query, key, target.to(device), start, end, *tokens)
    keys = length or M

    def part(rows: slice, q: Tensor, k: Tensor) -> Tensor:
        return _eager((q, k, *inputs[2:]), rows, "sum") / N

    eager = None if _too_large(N, M) else training(lambda q, k: _eager((q, k, *inputs[2:])), (query, key))
    ceiling = products(query, key)
    if length:
        q, k = query.detach().view(M // length, -1, D), key.detach().view(M // length, length, D)
        p = torch.randn(*q.shape[:2], length, device=device).to(kind)
        ceiling = lambda: (q @ k.mT, p @ k, p.mT @ q)  # noqa: E731
    return Problem(
        {"N": N, "M": M, "D": D, "dtype": dtype, "length": length, "exclude": exclude}, device, inputs,
        (6.0 * N * keys * D, "flop"), loss_traffic((query, key)), Check(lambda: truth(part, N, M, (query, key)), eager, kind),
        ceiling, N * M * query.element_size(),
    )  # fmt: skip


def _too_large(n: int, m: int) -> bool:
    return n * m > 2**28  # eager would take minutes and tens of gigabytes just to be compared


def as_written(query: Tensor, key: Tensor, target: Tensor, tau: Tensor, start: Tensor | None, end: Tensor | None,
               query_token: Tensor | None, key_token: Tensor | None, normalize: bool, reduction: str,
               *_: Any) -> Tensor:  # fmt: skip
    """token_contrastive as a user writes it in PyTorch if no row is ignored: masks only if something is left out."""
    if normalize:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    scores = query @ key.T / tau
    if query_token is not None and key_token is not None:
        same = (query_token[:, None] == key_token).scatter(1, target[:, None], False)
        scores = scores.masked_fill(same, float("-inf"))
    if start is not None and end is not None:
        column = torch.arange(key.shape[0], device=key.device)
        scores = scores.masked_fill((column < start[:, None]) | (column >= end[:, None]), float("-inf"))
    return F.cross_entropy(scores, target, reduction=reduction)


def _eager(inputs: tuple[Any, ...], rows: slice = slice(None), reduction: str = "mean", function: Any = None) -> Tensor:
    query, key, target, start, end, query_token, key_token = inputs
    cut = [None if x is None else x[rows] for x in (start, end, query_token)]
    tau = torch.tensor(TAU, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    function = function or eager_token_contrastive
    return function(query[rows], key, target[rows], tau, *cut, key_token, True, reduction, True, True)


def _ours(backend: str | None, problem: Problem) -> Call:
    query, key, target, start, end, query_token, key_token = problem.inputs
    options = {
        "temperature": TAU,
        "key_start": start,
        "key_end": end,
        "query_token": query_token,
        "key_token": key_token,
    }
    return training(lambda q, k: cmlm_fast.token_contrastive(q, k, target, backend=backend, **options), (query, key))


def _of_rows(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Problem], Call]:
    """A provider made of a linear cross entropy, which takes unit rows, already divided by τ, and targets."""

    def make(problem: Problem) -> Call:
        query, key, target = problem.inputs[:3]
        unit = lambda q, k: loss(F.normalize(q, dim=-1) / TAU, F.normalize(k, dim=-1), target)  # noqa: E731
        return training(unit, (query, key))

    return make


def all_keys(problem: Problem) -> str:
    """Why a linear cross entropy cannot solve this one, or "": it cannot restrict the candidates."""
    if problem.sizes.get("length") or problem.sizes.get("exclude"):
        return "takes every key as a candidate: no ranges, no exclusion of the same token"
    return ""


def chunked(rows: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's linear cross entropy, in chunks."""
    return F.linear_cross_entropy(rows, weight, target, linear_bias=bias, options=torch.nn.LinearCrossEntropyOptions())


def no_chunked(problem: Problem) -> str:
    return "" if hasattr(F, "linear_cross_entropy") else "PyTorch has it from 2.13 on"


def cut(rows: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Apple's Cut Cross-Entropy: Triton kernels on a GPU, its torch.compile implementation on a CPU."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(rows, weight, target, impl="cce" if rows.is_cuda else "torch_compile")


def liger(rows: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    """Liger's fused linear cross entropy."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(rows, weight, target, bias)


def _tacl(problem: Problem) -> Call:
    """TaCL's token loss (Su et al. 2021, eq. 1): −Σ_i log exp(h̃_i·h_i/τ) / Σ_j exp(h̃_i·h_j/τ), j over i's sequence.

    It takes one batched product over all positions, as in the paper: rows that are not anchors are multiplied, then dropped.
    """
    query, key, target = problem.inputs[:3]
    length = problem.sizes["length"]
    b, d = key.shape[0] // length, key.shape[1]
    positions = torch.arange(length, device=key.device).expand(b, -1)
    masked = torch.zeros(key.shape[0], dtype=torch.bool, device=key.device).index_fill_(0, target, True).view(b, length)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        student = F.normalize(torch.zeros_like(k).index_copy(0, target, q), dim=-1).view(b, length, d)
        scores = student @ F.normalize(k, dim=-1).view(b, length, d).mT / TAU
        losses = F.cross_entropy(scores.flatten(0, 1).float(), positions.flatten(), reduction="none").view(b, length)
        return (losses * masked).sum() / masked.sum()

    return training(loss, (query, key))


def _metric(problem: Problem) -> Call:
    from pytorch_metric_learning.losses import NTXentLoss

    query, key, target = problem.inputs[:3]
    nt_xent, labels = NTXentLoss(temperature=TAU), torch.arange(key.shape[0], device=key.device)
    return training(lambda q, k: nt_xent(q, target, ref_emb=k, ref_labels=labels), (query, key))


def _metric_unfit(problem: Problem) -> str:
    needed = 12.0 * problem.sizes["N"] ** 2 * problem.sizes["M"]  # a matrix of positive × negative pairs, three times
    return all_keys(problem) or (
        f"would hold {needed / 1e9:.0f} GB: every pair of a positive and a negative" * (needed > 1e9)
    )


def _rows(label: str, N: int, M: int, D: int, dtype: str, suite: str = "quick", sweep: str = "", **more: Any) -> Shape:
    text = f"{label} N={N} M={M} D={D} {dtype}" + " same token excluded" * bool(more.get("exclude"))
    return Shape(text.strip(), {"N": N, "M": M, "D": D, "dtype": dtype, **more}, suite, sweep)


_GRID = tuple(
    _rows("", n, m, d, dtype, "full")
    for n in (256, 1024, 4096, 8192) for m in (4096, 16384, 65536) for d in (128, 384, 768)
    for dtype in ("float32", "bfloat16")
)  # fmt: skip
_SHAPES = (
    _rows("", 24, 96, 16, "float32", "smoke"), _rows("", 24, 96, 16, "bfloat16", "smoke", exclude=True),
    _rows("sequence scope", 24, 96, 16, "float32", "smoke", length=32),
    *(_rows("", 256, m, 384, "float32", sweep="M") for m in (1024, 4096, 16384)),
    _rows("bert-base", 614, 4096, 768, "float32"), _rows("bert-base", 614, 4096, 768, "bfloat16"),
    _rows("", 1024, 8192, 128, "float32", exclude=True),
    _rows("sequence scope", 1024, 4096, 384, "bfloat16", length=128),
    _rows("sequence scope", 1024, 4096, 384, "float32", "full", length=128),
    *(_rows("", 1024, 8192, d, dtype, "full", exclude=e) for d in (128, 384, 768) for dtype in ("float32", "bfloat16")
      for e in (False, True) if (d, dtype, e) != (128, "float32", True)),
    *(_rows("sequence scope", 2048, 8192, d, "bfloat16", "full", length=128) for d in (384, 768)),
)  # fmt: skip
_LABELS = {shape.label for shape in _SHAPES}
CONTRAST = Op(
    "token_contrastive", "token-level contrast, forward and backward",
    (*_SHAPES, *(shape for shape in _GRID if shape.label not in _LABELS)),
    build,
    (
        *ours("token_contrastive", _ours),
        Provider("eager", lambda p: training(
            lambda q, k: _eager((q, k, *p.inputs[2:]), function=as_written), p.inputs[:2]), score_matrices=4),
        Provider("torch.compile", lambda p: training(
            lambda q, k: _eager((q, k, *p.inputs[2:]), function=compiled(as_written)), p.inputs[:2]), score_matrices=3),
        Provider("F.linear_cross_entropy", _of_rows(chunked), unfit=lambda p: no_chunked(p) or all_keys(p)),
        Provider("TaCL token loss", _tacl, unfit=lambda p: "" if p.sizes["length"] and not p.sizes["exclude"] else
                 "its candidates are those of the own sequence"),
        Provider("pytorch-metric-learning", _metric, "pytorch_metric_learning", unfit=_metric_unfit),
        Provider("cut-cross-entropy", _of_rows(cut), "cut_cross_entropy", unfit=all_keys, score_matrices=3),
        Provider("liger-kernel", _of_rows(liger), "liger_kernel", gpu_only=True, unfit=all_keys),
    ),
    partial(_ours, None),
    "between the products, exponentials and, per key block, summing the keys' gradient",
)  # fmt: skip


def build_similarity(device: torch.device, N: int, M: int, D: int, dtype: str = "float32") -> Problem:
    """The score matrix itself."""
    kind = getattr(torch, dtype)
    query, key = (leaf(n, D, device, kind).detach() for n in (N, M))
    exact = eager_scores(query.double(), key.double(), None, torch.tensor(TAU, dtype=torch.float64, device=device),
                         None, None, None, None, True)  # fmt: skip
    eager = error(_scores(query, key).double(), exact)

    def check(name: str, scores: Tensor) -> tuple[float, float]:
        got = error(scores.double(), exact)
        if not got <= 2 * eager + 1e-6:
            raise Wrong(f"{name}: error {got:.3g} against float64, eager's {eager:.3g}")
        return got, eager

    matrix = N * M * query.element_size()
    return Problem({"N": N, "M": M, "D": D, "dtype": dtype}, device, (query, key), (2.0 * N * M * D, "flop"),
                   float((N + M) * D * query.element_size() + matrix), check, lambda: query @ key.T, matrix)  # fmt: skip


def _scores(query: Tensor, key: Tensor) -> Tensor:
    return eager_scores(query, key, None, torch.tensor(TAU, device=query.device), None, None, None, None, True)


def _similarity(backend: str | None, problem: Problem) -> Call:
    return lambda: cmlm_fast.token_similarity(*problem.inputs, temperature=TAU, backend=backend)


SIMILARITY = Op(
    "token_similarity", "the score matrix of the token contrast",
    (Shape("N=24 M=96 D=16 float32", {"N": 24, "M": 96, "D": 16}, "smoke"),
     Shape("N=1024 M=8192 D=384 float32", {"N": 1024, "M": 8192, "D": 384})),
    build_similarity,
    (
        *ours("token_similarity", _similarity, score_matrices=3),
        Provider("eager", lambda p: lambda: _scores(*p.inputs), score_matrices=3),
    ),
    partial(_similarity, None),
    "writing the matrix",
)  # fmt: skip

OPS = (CONTRAST, SIMILARITY)
