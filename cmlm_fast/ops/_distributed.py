"""InfoNCE whose negatives come from every rank of a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._library import expect
from ..backends import resolve
from ._scores import gradients_in_forward


class _GatherRows(torch.autograd.Function):
    """Gather the rows of all ranks, [ΣB_r, D]; the backward pass sums all ranks' gradients of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: Any) -> Tensor:
        ctx.group, ctx.sizes = group, sizes
        parts = [rows.new_empty(size, *rows.shape[1:]) for size in sizes]
        # all_gather needs equal shapes: pad uneven batches to the longest, then trim.
        longest = max(sizes)
        padded = torch.cat([rows, rows.new_zeros(longest - rows.shape[0], *rows.shape[1:])])
        buffers = [torch.empty_like(padded) for _ in parts]
        dist.all_gather(buffers, padded, group=group)
        return torch.cat([buffer[:size] for buffer, size in zip(buffers, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # Sum in float32, so that the all-reduce rounds no more than a single process would.
        total = grad.to(torch.promote_types(grad.dtype, torch.float32))
        total = total.clone() if total is grad else total
        dist.all_reduce(total, group=ctx.group)
        return total.split(ctx.sizes)[dist.get_rank(ctx.group)].to(grad.dtype), None, None


class _SumOverRanks(torch.autograd.Function):
    """Sum the ranks' parts of one loss; in the backward pass each part receives the gradient of the whole."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def info_nce_across_ranks(
    z1: Tensor, z2: Tensor, temperature: Tensor, labels: Tensor | None, scheme: str, symmetric: bool, normalize: bool,
    reduction: str, *, group: Any, backend: str | None,
) -> Tensor:  # fmt: skip
    """Loss of the concatenated batch. Each rank contrasts its own rows with all ranks' rows: O(B_rank · ΣB) work."""
    expect("info_nce", reduction != "none", "reduction", "'mean' or 'sum' when group is given", repr(reduction))
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    expect("info_nce", rank >= 0, "group", "a process group that this rank is a member of", group)
    # Under torch.compile, `torch.tensor` would be a constant; it would then run the wait for the collective, and hang.
    count = torch.full((1,), z1.shape[0], dtype=torch.int64, device=z1.device)
    counts = [torch.empty_like(count) for _ in range(world)]
    dist.all_gather(counts, count, group=group)
    sizes: list[int] = torch.cat(counts).tolist()  # the only wait for the device
    first, total = sum(sizes[:rank]), sum(sizes)
    all1, all2 = _GatherRows.apply(z1, sizes, group), _GatherRows.apply(z2, sizes, group)
    recording = torch.is_grad_enabled() and gradients_in_forward(z1.dtype)
    if labels is not None:
        # SupCon has a set of positives per row: every rank computes the whole loss, so its own rows' gradient is complete
        # without a sum over ranks. Each rank's copy is weighted by 1/world before the gather's backward pass sums the copies.
        every = _GatherRows.apply(labels, sizes, group)
        args = (all1, all2, temperature, every, scheme, symmetric, normalize, reduction)
        grads = (recording and all1.requires_grad, recording and all2.requires_grad)
        loss = resolve("info_nce", z1.device, backend, z1.dtype, total**2)(*args, *grads)[0]
        return _SumOverRanks.apply(loss / world, group)
    contrast = resolve("token_contrastive", z1.device, backend, z1.dtype, z1.shape[0] * total)

    def rows(query: Tensor, key: Tensor, target: Tensor, token: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        grads = (recording and query.requires_grad, recording and key.requires_grad)
        loss: Tensor = contrast(query, key, target, temperature, None, None, token, tokens, normalize, "sum", *grads)[0]
        return loss

    own = torch.arange(first, first + z1.shape[0], device=z1.device)
    if scheme == "cross":
        part = rows(z1, all2, own)
        if symmetric:
            part = (part + rows(z2, all1, own)) / 2
        terms = total
    else:
        # A row's own vector and its positive carry its sequence's token: the first is excluded, the second kept as the target.
        keys, tokens = torch.cat([all1, all2]), torch.arange(total, device=z1.device).repeat(2)
        part = rows(z1, keys, own + total, own, tokens) + rows(z2, keys, own, own, tokens)
        terms = 2 * total
    if reduction == "mean":
        part = part / max(terms, 1)
    return _SumOverRanks.apply(part, group)
