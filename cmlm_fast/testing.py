"""Shared by tests and benchmarks: the eager formulas of the ops, errors against float64, poisoned memory.

The eager formulas are what a user would write in PyTorch, with autograd, in the inputs' own dtype. In float64 they are the
truth; in a lower dtype their error is the yardstick: a kernel may err at most twice as much. The ops'
references are judged by them as well; the two share only the candidates' mask and dropout's random bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import contracts, op
from .ops._scores import IGNORE, candidates
from .ops.varlen_attention import keep_mask

#: Slack for outputs that eager happens to round exactly: a few units in the last place of the dtype.
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
#: A float64 sum of terms around 1 that is below this consists of rounding errors.
NOISE = 1e-13


def _cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
    """`F.cross_entropy` of each row. In float64, where it is the truth, the target is kept apart from the others: for a
    saturated softmax, 1 − p would be a rounding error."""
    if scores.dtype != torch.float64:
        return F.cross_entropy(scores, target, reduction="none")
    own, others = scores.gather(1, target[:, None]), scores.scatter(1, target[:, None], -torch.inf)
    alone = torch.isinf(others).all(1, keepdim=True)  # there logsumexp has no gradient
    excess = torch.where(alone, 0.0, others).logsumexp(1, keepdim=True) - own
    return torch.where(alone, 0.0, F.softplus(excess, threshold=40)).squeeze(1)


def _reduce(losses: Tensor, valid: Tensor, reduction: str) -> Tensor:
    losses = torch.where(valid, losses, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / valid.sum().clamp_min(1) if reduction == "mean" else losses.sum()


def eager_scores(query: Tensor, key: Tensor, target: Tensor | None, temperature: Tensor, *rest: Any) -> Tensor:
    """token_similarity as a user writes it: normalise, multiply, mask."""
    *options, normalize = rest
    if normalize:
        query, key = F.normalize(query, dim=-1, eps=1e-12), F.normalize(key, dim=-1, eps=1e-12)
    scores = query @ key.T / temperature
    if all(option is None for option in options):
        return scores
    return scores.masked_fill(~candidates(query, key, target, *options), float("-inf"))


def eager_token_contrastive(query: Tensor, key: Tensor, target: Tensor, temperature: Tensor, *rest: Any) -> Tensor:
    """token_contrastive as a user writes it: the whole score matrix, then cross entropy."""
    *options, normalize, reduction, _, _ = rest
    valid = target != IGNORE
    if key.shape[0] == 0:
        return _reduce(query.sum(1) * 0 + key.sum() * 0 + temperature * 0, valid, reduction)
    scores = eager_scores(query, key, target, temperature, *options, normalize)
    scores = torch.where(valid[:, None], scores, 0.0)
    return _reduce(_cross_entropy(scores, target.clamp_min(0)), valid, reduction)


def eager_info_nce(z1: Tensor, z2: Tensor, temperature: Tensor, labels: Tensor | None, scheme: str, symmetric: bool,
                   normalize: bool, reduction: str, *_: Any) -> Tensor:  # fmt: skip
    """info_nce as a user writes it."""
    if normalize:
        z1, z2 = F.normalize(z1, dim=-1, eps=1e-12), F.normalize(z2, dim=-1, eps=1e-12)
    batch = z1.shape[0]
    index = torch.arange(batch, device=z1.device)
    if labels is None and scheme == "cross":
        scores = z1 @ z2.T / temperature
        losses = _cross_entropy(scores, index) if batch else z1.sum(1) * 0 + z2.sum(1) * 0
        if symmetric and batch:
            losses = (losses + _cross_entropy(scores.T, index)) / 2
        return _reduce(losses, torch.ones_like(index, dtype=torch.bool), reduction)
    z = torch.cat([z1, z2])
    scores = (z @ z.T / temperature).masked_fill(torch.eye(2 * batch, dtype=torch.bool, device=z.device), float("-inf"))
    if labels is None:
        positives = torch.cat([index + batch, index])
        losses = _cross_entropy(scores, positives) if batch else z.sum(1) * 0
        return _reduce(losses, torch.ones_like(positives, dtype=torch.bool), reduction)
    twice = torch.cat([labels, labels])
    same = (twice == twice[:, None]).fill_diagonal_(False)
    log_p = torch.where(same, F.log_softmax(scores, 1), 0.0)
    return _reduce(-log_p.sum(1) / same.sum(1), torch.ones_like(twice, dtype=torch.bool), reduction)


def eager_varlen_attention(query: Tensor, key: Tensor, value: Tensor, cu: Tensor, scale: float, dropout: float,
                           seed: int | Tensor, window: int) -> Tensor:  # fmt: skip
    """varlen_attention as a user writes it: a loop over the sequences."""
    bounds, parts = cu.tolist(), [query[:0] + key[:0] + value[:0]]
    for b, (begin, end) in enumerate(pairwise(bounds)):
        q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))
        scores = q @ k.mT * scale
        if window:
            position = torch.arange(end - begin, device=query.device)
            scores = scores.masked_fill((position[:, None] - position).abs() >= window, float("-inf"))
        weights = torch.softmax(scores, -1)
        if dropout:
            weights = weights * keep_mask(end - begin, query.shape[1], b, dropout, int(seed), query.device) / (1 - dropout)
        parts.append((weights @ v).transpose(0, 1))
    return torch.cat(parts)


def eager_softmax_loss(logits: Tensor, target: Tensor) -> Tensor:
    """softmax_loss as a user writes it."""
    return F.cross_entropy(logits, target, reduction="none")


EAGER: dict[str, Callable[..., Tensor]] = {
    "token_contrastive": eager_token_contrastive,
    "token_similarity": eager_scores,
    "info_nce": eager_info_nce,
    "softmax_loss": eager_softmax_loss,
    "varlen_attention": eager_varlen_attention,
}


def cast(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """`args` with every floating tensor in `dtype`, keeping strides where the dtype stays."""
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def value_and_gradients(function: Callable[..., Any], name: str, args: tuple[Any, ...]) -> list[Tensor]:
    """`[output, *gradients]` of `function(*args)` in float64, with a fixed random upstream gradient."""
    inputs = list(args)
    for position in contracts[name].differentiable:
        inputs[position] = inputs[position].detach().requires_grad_()
    out = function(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    finite = torch.isfinite(out)
    leaves = [inputs[position] for position in contracts[name].differentiable]
    grads = torch.autograd.grad(
        torch.where(finite, out, 0.0), leaves, upstream.to(out.device, out.dtype), allow_unused=True
    )
    values = [out.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True))]
    return [value.double() for value in values]


def error(value: Tensor, truth: Tensor, noise: float = 0.0) -> float:
    """‖value − truth‖ / ‖truth‖ over finite entries; infinities must agree, NaN never passes (it gives infinity). If both
    norms are below `noise`, ‖value − truth‖."""
    if not torch.equal(torch.isfinite(value), torch.isfinite(truth)) or value.isnan().any():
        return float("inf")
    finite = torch.isfinite(truth)
    difference, scale = float((value - truth)[finite].norm()), float(truth[finite].norm())
    return difference / scale if scale > 0 and max(scale, difference) >= noise else difference


def nudged(args: tuple[Any, ...], relative: float, seed: int) -> tuple[Any, ...]:
    """`args` with every entry of the floating tensors off by up to `relative` of itself."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(x: Tensor) -> Tensor:
        return x * (1 + relative * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1).to(x.device))

    return tuple(nudge(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def errors_vs_eager(name: str, suffix: str, args: tuple[Any, ...], nudges: int = 8,
                        ours: list[Tensor] | None = None) -> Iterator[tuple[str, float, float]]:  # fmt: skip
    """(what, the op's error, eager's error) against float64, for the output and each gradient.

    Where a sum cancels, eager may be right by luck, and a small loss is a single number. Eager's error therefore counts as at
    least the one that inputs off by their last bit cause in float64, the worst of `nudges` draws. `ours` is the op's
    `value_and_gradients`, if already known.
    """
    dtype = args[contracts[name].differentiable[0]].dtype
    wide = cast(args, torch.float64)
    truth = value_and_gradients(EAGER[name], name, wide)
    eager = value_and_gradients(EAGER[name], name, args)
    near = [value_and_gradients(EAGER[name], name, nudged(wide, torch.finfo(dtype).eps, seed)) for seed in range(nudges)]
    ours = value_and_gradients(op(name, suffix), name, args) if ours is None else ours
    labels = ["output", *(f"gradient {position}" for position in contracts[name].differentiable)]
    for label, got, exact, *others in zip(labels, ours, truth, eager, *near, strict=True):
        # In float64 the truth has rounding errors of its own; otherwise, probabilities below float32's normal numbers lose
        # digits before the division by τ >= 0.01.
        noise = NOISE if dtype == torch.float64 else 100 * torch.finfo(torch.float32).tiny
        yield label, error(got, exact, noise), max(error(other, exact) for other in others) + ROUNDING[dtype] / 2


def assert_no_worse_than_eager(name: str, suffix: str, args: tuple[Any, ...], nudges: int = 8, times: float = 2.0) -> None:
    """The op's output and gradients err at most `times` as much as the eager formula in the same dtype."""
    for label, ours, eager in errors_vs_eager(name, suffix, args, nudges):
        if not ours <= times * eager:
            raise AssertionError(f"{name}{suffix} {label}: error {ours:.3g} against float64, eager's {eager:.3g}")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every `torch.empty` in the block, also C++ callers', with NaN (integers: the largest value)."""
    settings: Any = torch.utils.deterministic
    mode = torch.get_deterministic_debug_mode()
    fills, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, True
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms() would import Inductor, which takes seconds
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fills
