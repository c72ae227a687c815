"""Sequence-level InfoNCE of two views, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cmlm_fast
from cmlm_fast.testing import eager_info_nce, eager_token_contrastive

from ..registry import Call, Op, Problem, Provider, Shape, ours
from ._losses import Check, compiled, leaf, loss_traffic, products, training, truth
from .contrast import chunked, cut, liger, no_chunked

TAU = 0.05


def build(
    device: torch.device, B: int, D: int, dtype: str = "float32", scheme: str = "cross", symmetric: bool = True
) -> Problem:
    """B pairs of width D."""
    kind = getattr(torch, dtype)
    z1, z2 = leaf(B, D, device, kind), leaf(B, D, device, kind)
    index = torch.arange(2 * B, device=device)

    def part(rows: slice, a: Tensor, b: Tensor) -> Tensor:
        """Each direction is a token contrast: of one view against the other, or (nt_xent) against both, self excluded."""
        i = index[rows]
        if scheme == "nt_xent":
            both = torch.cat([a, b])
            return (_rows(a[rows], both, i + B, i, index) + _rows(b[rows], both, i, i + B, index)) / (2 * B)
        first = _rows(a[rows], b, i)
        return (first + _rows(b[rows], a, i)) / (2 * B) if symmetric else first / B

    nt_xent, numbers = scheme == "nt_xent", B * B
    eager = None if B > 8192 else training(lambda a, b: _eager(a, b, scheme, symmetric), (z1, z2))
    return Problem(
        {"B": B, "D": D, "dtype": dtype, "scheme": scheme, "symmetric": symmetric},
        device,
        (z1, z2),
        work=((12.0 if nt_xent else 6.0) * numbers * D, "flop"),
        traffic=loss_traffic((z1, z2)),
        check=Check(lambda: truth(part, B, 2 * B, (z1, z2)), eager, kind),
        ceiling=_symmetric_products(torch.cat([z1, z2])) if nt_xent else products(z1, z2),
        matrix=(4 if nt_xent else 1) * numbers * z1.element_size(),
    )


def _symmetric_products(z: Tensor) -> Call:
    """Half of z zᵀ, which is symmetric, and one product for the gradient."""
    z = z.detach()
    p = torch.randn(z.shape[0], z.shape[0], device=z.device).to(z.dtype)
    return lambda: (z[: z.shape[0] // 2] @ z.T, p @ z)


def _rows(q: Tensor, k: Tensor, target: Tensor, *tokens: Tensor) -> Tensor:
    tau = torch.tensor(TAU, dtype=q.dtype, device=q.device)
    return eager_token_contrastive(q, k, target, tau, None, None, *(tokens or (None, None)), True, "sum", True, True)


def _eager(z1: Tensor, z2: Tensor, scheme: str, symmetric: bool, function: Any = eager_info_nce) -> Tensor:
    return function(z1, z2, torch.tensor(TAU, device=z1.device), None, scheme, symmetric, True, "mean")


def _make(loss: Callable[[Tensor, Tensor, Problem], Tensor]) -> Callable[[Problem], Call]:
    return lambda problem: training(lambda a, b: loss(a, b, problem), problem.inputs)


def _ours(backend: str | None, p: Problem) -> Call:
    options = {"temperature": TAU, "scheme": p.sizes["scheme"], "symmetric": p.sizes["symmetric"], "backend": backend}
    return training(lambda a, b: cmlm_fast.info_nce(a, b, **options), p.inputs)


def _one_sided(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Problem], Call]:
    """A provider made of a linear cross entropy of unit rows, in one or both directions."""

    def both(a: Tensor, b: Tensor, p: Problem) -> Tensor:
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
        own = torch.arange(p.sizes["B"], device=a.device)
        first = loss(a / TAU, b, own)
        return (first + loss(b / TAU, a, own)) / 2 if p.sizes["symmetric"] else first

    return _make(both)


def _cross(p: Problem) -> str:
    return "" if p.sizes["scheme"] == "cross" else "has no NT-Xent"


def _ranking(a: Tensor, b: Tensor, p: Problem) -> Tensor:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    loss = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=1 / TAU, **(both if p.sizes["symmetric"] else {}))
    return loss.compute_loss_from_embeddings([a, b], None)


def _metric(a: Tensor, b: Tensor, p: Problem) -> Tensor:
    from pytorch_metric_learning.losses import NTXentLoss

    return NTXentLoss(temperature=TAU)(torch.cat([a, b]), torch.arange(p.sizes["B"], device=a.device).repeat(2))


def _metric_unfit(p: Problem) -> str:
    needed = 3.0 * 4 * 2 * p.sizes["B"] * (2 * p.sizes["B"]) ** 2  # every pair of a positive and a negative
    if p.sizes["scheme"] != "nt_xent":
        return "has NT-Xent alone"
    return f"would hold {needed / 1e9:.0f} GB: every pair of a positive and a negative" if needed > 1e9 else ""


def _info_nce_pytorch(a: Tensor, b: Tensor, p: Problem) -> Tensor:
    from info_nce import info_nce

    first = info_nce(a, b, temperature=TAU)
    return (first + info_nce(b, a, temperature=TAU)) / 2 if p.sizes["symmetric"] else first


def _inf_cl(a: Tensor, b: Tensor, p: Problem) -> Tensor:
    from inf_cl import cal_flash_loss

    a, b, width = F.normalize(a, dim=-1), F.normalize(b, dim=-1), min(p.sizes["D"], 256)
    first = cal_flash_loss(a, b, scale=1 / TAU, head_dim=width).mean()
    return (first + cal_flash_loss(b, a, scale=1 / TAU, head_dim=width).mean()) / 2 if p.sizes["symmetric"] else first


def _inf_cl_unfit(p: Problem) -> str:
    d = p.sizes["D"]
    fits = d % 256 == 0 or d in (16, 32, 64, 128)
    return _cross(p) or ("" if fits else "needs D to be a power of two, or a multiple of 256")


def _shape(B: int, suite: str = "quick", sweep: str = "", D: int = 384, dtype: str = "float32", label: str = "",
           **more: Any) -> Shape:  # fmt: skip
    kind = more.get("scheme", "cross") + " one-sided" * (not more.get("symmetric", True))
    return Shape(f"{label} B={B} D={D} {dtype} {kind}".strip(), {"B": B, "D": D, "dtype": dtype, **more}, suite, sweep)


OPS = (
    Op(
        "info_nce", "InfoNCE of two views, forward and backward",
        (
            _shape(12, "smoke", D=16), _shape(12, "smoke", D=16, scheme="nt_xent"),
            *(_shape(b, sweep="B") for b in (64, 256, 1024, 2048)),
            _shape(32, D=768, label="bert-base"),
            _shape(128, scheme="nt_xent"),
            *(_shape(b, "full", "B") for b in (4096, 16384, 32768)),
            *(_shape(b, "full", symmetric=False) for b in (64, 256, 1024, 4096)),
            *(_shape(b, "full", scheme="nt_xent") for b in (64, 256, 1024, 4096, 16384)),
            *(_shape(b, "full", D=d, dtype=dtype)
              for b in (256, 4096) for d in (128, 768) for dtype in ("float32", "bfloat16")),
        ),
        build,
        (
            *ours("info_nce", _ours),
            Provider("eager", _make(lambda a, b, p: _eager(a, b, p.sizes["scheme"], p.sizes["symmetric"])), score_matrices=4),
            Provider("torch.compile", _make(lambda a, b, p: _eager(
                a, b, p.sizes["scheme"], p.sizes["symmetric"], compiled(eager_info_nce))), score_matrices=3),
            Provider("F.linear_cross_entropy", _one_sided(chunked), unfit=lambda p: no_chunked(p) or _cross(p)),
            Provider("sentence-transformers", _make(_ranking), "sentence_transformers", unfit=_cross, score_matrices=4),
            Provider("pytorch-metric-learning", _make(_metric), "pytorch_metric_learning", unfit=_metric_unfit),
            Provider("info-nce-pytorch", _make(_info_nce_pytorch), "info_nce", unfit=_cross, score_matrices=4),
            Provider("cut-cross-entropy", _one_sided(cut), "cut_cross_entropy", unfit=_cross, score_matrices=3),
            Provider("liger-kernel", _one_sided(liger), "liger_kernel", gpu_only=True, unfit=_cross),
            Provider("inf-cl", _make(_inf_cl), "inf_cl", gpu_only=True, unfit=_inf_cl_unfit),
        ),
        partial(_ours, None),
        "exponentials of B² scores in addition to the products",
    ),
)  # fmt: skip
