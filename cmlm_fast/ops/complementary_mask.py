"""Complementary random masking: two views of each sequence whose masks never overlap (arXiv 2106.02327).

    role[i] = 0 visible in both views, 1 masked in view 1 only, 2 masked in view 2 only        (one draw decides)
    view v shows input_ids[i] unless role[i] = v; then mask_token_id (share mask_share), a random id (random_share), or
    input_ids[i] itself

Random bits: Philox4x32-10 with key = seed and counter = (c, step, sample id); a unit's assignment word is w0 at c = unit
id, a token's corruption words are w1, w2 at c = position. A sequence's masks therefore depend on (seed, step, sample id) alone.
Shapes: T tokens of B sequences packed end to end. The compiled kernels write nothing but the three outputs to memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._library import Contract, contracts, declare, expect, expect_values, is_number, is_traced, is_whole
from ..backends import resolve
from ._philox import philox, signed_seed
from ._roles import can_be_masked, corruption_bounds, exact_roles, role_bounds

_NAME = "complementary_mask"
_SCHEMA = (
    "(Tensor input_ids, Tensor cu_seqlens, Tensor special_ids, Tensor? eligible, Tensor? unit_ids, Tensor? sample_ids, "
    "int mask_token_id, int vocab_size, float rate, float complement_rate, bool exact, float mask_share, "
    "float random_share, SymInt seed, SymInt step) -> (Tensor view1, Tensor view2, Tensor role)"
)


class ComplementaryMask(NamedTuple):
    """Both views, with input_ids' shape and dtype, and `role` (uint8): 0 visible, 1 masked in view 1, 2 masked in view 2."""

    view1: Tensor
    view2: Tensor
    role: Tensor


def _check(ids: Tensor, cu: Tensor, special: Tensor, eligible: Tensor | None, units: Tensor | None,
           samples: Tensor | None, mask_id: int, vocab: int, rate: float, complement: float, exact: bool,
           mask_share: float, random_share: float, seed: int, step: int) -> None:  # fmt: skip
    def rule(condition: bool, argument: str, text: str, value: object) -> None:
        expect(_NAME, condition, argument, text, value)

    integer = (torch.int64, torch.int32)
    rule(ids.dtype in integer, "input_ids", "int64 or int32", ids.dtype)
    rule(ids.dim() == 1, "input_ids", "of shape [T]", list(ids.shape))
    rule(ids.numel() < 2**31, "input_ids", "fewer than 2^31 tokens, what cu_seqlens can hold", ids.numel())
    rule(cu.dtype == torch.int32 and cu.dim() == 1 and cu.numel() >= 1, "cu_seqlens", "int32 of shape [B + 1]", cu)
    rule(special.dtype == torch.int64 and special.dim() == 1 and special.numel() <= 16, "special_ids",
         "int64 of shape [S], S <= 16", special)  # fmt: skip
    tokens, sequences = ids.shape, (cu.shape[0] - 1,)
    optional = (("eligible", eligible, torch.bool, tokens), ("unit_ids", units, torch.int32, tokens),
                ("sample_ids", samples, torch.int64, sequences))  # fmt: skip
    for name, tensor, dtype, shape in optional:
        if tensor is not None:
            rule(tensor.dtype == dtype and tensor.shape == shape, name, f"{dtype} of shape {list(shape)}", tensor)
    for name, tensor in (("cu_seqlens", cu), ("special_ids", special), ("eligible", eligible), ("unit_ids", units),
                         ("sample_ids", samples)):  # fmt: skip
        if tensor is not None:
            rule(tensor.device == ids.device, name, f"on {ids.device}", tensor.device)
    rule(1 <= vocab < 2**31, "vocab_size", "in [1, 2^31)", vocab)
    rule(0 <= mask_id < vocab, "mask_token_id", f"in [0, vocab_size = {vocab})", mask_id)
    for name, value in (("rate", rate), ("complement_rate", complement), ("mask_share", mask_share),
                        ("random_share", random_share)):  # fmt: skip
        rule(0.0 <= value <= 1.0, name, "in [0, 1]", value)
    # The slack admits shares such as 0.9 and 0.1, whose sum may exceed 1 by a rounding error.
    rule(mask_share + random_share <= 1.0 + 1e-9, "mask_share + random_share", "<= 1", mask_share + random_share)
    rule(0 <= step < 2**32, "step", "in [0, 2^32)", step)


def _check_values(ids: Tensor, cu: Tensor, eligible: Tensor, units: Tensor | None, vocab: int) -> None:
    malformed = cu[0] != 0 or cu[-1] != ids.numel() or bool((cu.diff() < 0).any())
    expect_values(_NAME, not malformed, "cu_seqlens", f"non-decreasing from 0 to {ids.numel()}", cu.tolist()[:8])
    outside = eligible & ((ids < 0) | (ids >= vocab))
    if outside.any():
        expect_values(_NAME, False, "input_ids", f"in [0, vocab_size = {vocab})", int(ids[outside][0]))
    if units is not None and (units[eligible] < 0).any():
        expect_values(_NAME, False, "unit_ids", ">= 0", int(units[eligible].min()))


def _reference(ids: Tensor, cu: Tensor, special: Tensor, eligible: Tensor | None, units: Tensor | None,
               samples: Tensor | None, mask_id: int, vocab: int, rate: float, complement: float, exact: bool,
               mask_share: float, random_share: float, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check(ids, cu, special, eligible, units, samples, mask_id, vocab, rate, complement, exact, mask_share,
           random_share, seed, step)  # fmt: skip
    can = can_be_masked(ids, special, eligible)
    _check_values(ids, cu, can, units, vocab)
    lengths = cu.diff().long()
    sequence = torch.repeat_interleave(torch.arange(lengths.numel(), device=ids.device), lengths)
    position = torch.arange(ids.numel(), device=ids.device) - cu.long()[sequence]
    sample = sequence if samples is None else samples[sequence]
    unit = position if units is None else units.long()
    assignment = philox(unit, sample, seed, step)[0]
    if exact:
        role = exact_roles(assignment, sequence, unit, can, lengths.numel(), rate, complement)
    else:
        first, second = role_bounds(rate, complement)
        role = (assignment < first).long() + 2 * ((assignment >= first) & (assignment < second)).long()
        role = role * can
    _, w1, w2, _ = philox(position, sample, seed, step)
    below_mask, below_random = corruption_bounds(mask_share, random_share)
    changed = torch.where(w1 < below_random, (w2 * vocab) >> 32, ids.long())
    corrupted = torch.where(w1 < below_mask, mask_id, changed).to(ids.dtype)
    return torch.where(role == 1, corrupted, ids), torch.where(role == 2, corrupted, ids), role.to(torch.uint8)


def _fake(ids: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check(ids, *args)
    return torch.empty_like(ids), torch.empty_like(ids), torch.empty_like(ids, dtype=torch.uint8)


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Packed batches: equal and ragged lengths, empty and one-token sequences, units, odd seeds, both samplings; special ids
    unsorted, repeated, with gaps of one id."""
    generator = torch.Generator().manual_seed(0)

    def make(lengths: list[int], **options: Any) -> tuple[Any, ...]:
        tokens = sum(lengths)
        ids = torch.randint(0, 1000, (tokens,), generator=generator).to(device, dtype)
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
        o: dict[str, Any] = {"eligible": None, "units": None, "samples": None, "rate": 0.15, "complement": 0.15 / 0.85,
             "exact": True, "mask": 0.8, "random": 0.1, "seed": 42, "step": 3, "special": [0, 101, 102, 103],
             **options}  # fmt: skip
        special = torch.tensor(o["special"], device=device)
        return (ids, cu, special, o["eligible"], o["units"], o["samples"], 103, 1000, o["rate"], o["complement"],
                o["exact"], o["mask"], o["random"], o["seed"], o["step"])  # fmt: skip

    for exact in (True, False):
        label = "exact" if exact else "bernoulli"
        yield f"{label}-8x128", make([128] * 8, exact=exact)
        yield f"{label}-ragged", make([1, 0, 63, 7, 1000, 2], exact=exact, seed=-1, step=2**32 - 1)
        eligible = (torch.rand(300, generator=generator) < 0.5).to(device)
        units = torch.randint(0, 40, (300,), generator=generator).to(device, torch.int32)
        units = units.masked_fill(~eligible, -1)  # tokens outside any word
        samples = torch.tensor([2**40 + 5, 7, -3], device=device)
        yield f"{label}-units", make([100, 150, 50], exact=exact, eligible=eligible, units=units, samples=samples)
        yield f"{label}-paper", make([37] * 5, exact=exact, complement=0.7, mask=1.0, random=0.0)
    yield "nothing-eligible", make([20, 20], eligible=torch.zeros(40, dtype=torch.bool, device=device))
    yield "no-tokens", make([0, 0])
    yield "no-sequences", make([])
    yield "all-masked", make([50], rate=1.0)
    yield "long", make([8192, 3], complement=0.5)
    yield "special-ids", make([300], rate=1.0, special=[*range(990, 0, -90), 2, 4, 2, 3])


declare(_NAME, _SCHEMA, _reference, _fake)
contracts[_NAME] = Contract(_NAME, _samples, (torch.int64, torch.int32), exact=True)


@lru_cache(maxsize=64)
def _special_tensor(special_ids: tuple[int, ...], device: torch.device) -> Tensor:
    """One device copy of a tokenizer's special ids, so that a call copies nothing between host and device."""
    return torch.tensor(special_ids, dtype=torch.int64, device=device)


@lru_cache(maxsize=64)
def _equal_lengths(batch: int, length: int, device: torch.device, stream: int) -> Tensor:
    """cu_seqlens of a padded batch, cached for the CUDA stream that fills it: other streams would not wait for it."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


def complementary_mask(
    input_ids: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    mask_token_id: int,
    vocab_size: int,
    special_ids: Sequence[int] | Tensor,
    attention_mask: Tensor | None = None,
    eligible: Tensor | None = None,
    unit_ids: Tensor | None = None,
    rate: float = 0.15,
    complement_rate: float = 0.15 / 0.85,
    sampling: str = "exact",
    mask_share: float = 0.8,
    random_share: float = 0.1,
    seed: int = 0,
    step: int = 0,
    sample_ids: Tensor | None = None,
    backend: str | None = None,
) -> ComplementaryMask:
    """Mask each sequence twice, at positions that never overlap; return both views and each position's role.

    Args:
        input_ids: int64 or int32, [B, L], or [T] with `cu_seqlens`.
        cu_seqlens: int32 [B + 1]; sequence b is `input_ids[cu_seqlens[b]:cu_seqlens[b + 1]]`. Only with [T] ids.
        mask_token_id: id that replaces a masked token.
        vocab_size: random replacements are drawn from [0, vocab_size).
        special_ids: at most 16 ids that are never masked (cls, sep, pad, mask, ...), a sequence or an int64 tensor.
        attention_mask: [B, L]; positions where it is 0 are never masked.
        eligible: bool, shape of `input_ids`; positions where it is False are never masked.
        unit_ids: int32 >= 0, shape of `input_ids`; tokens of a sequence that share an id (a word, a span) are masked together.
        rate: share of eligible units masked in view 1, in [0, 1].
        complement_rate: share of the remaining units masked in view 2, in [0, 1].
        sampling: "exact" masks floor(rate·n + ½) of a sequence's n eligible units, at least 1 if rate > 0; "bernoulli" draws
            each alone.
        mask_share, random_share: shares of masked tokens replaced by `mask_token_id` and by a random id; the rest stay.
        seed: 64-bit key of the random numbers, in [-2⁶³, 2⁶⁴); a negative one is read as the unsigned number of the same bits.
        step: training step, in [0, 2³²). The same arguments give the same masks: pass a new step in every step.
        sample_ids: int64 [B], default 0..B-1: the id of each sequence in the dataset. Masks depend on
            (seed, step, sample id) alone, not on the batch, right padding, device or backend.
        backend: "reference", "cpp", "cuda" or "triton"; None: the current choice (see `use_backend`).

    Returns:
        `ComplementaryMask(view1, view2, role)`, each of `input_ids`' shape. MLM labels of view v are
        `torch.where(role == v, input_ids, -100)`.

    Raises:
        ValueError: a shape, dtype, device or number is invalid.
        RuntimeError: `cu_seqlens` is malformed, an eligible token's id is outside the vocabulary, or its unit id is negative
            (checked on the CPU).

    >>> ids = torch.arange(5, 25).view(2, 10)
    >>> masked = complementary_mask(ids, mask_token_id=3, vocab_size=30, special_ids=(0, 1, 2, 3), rate=0.2)
    >>> (masked.role == 1).sum(1).tolist(), bool((masked.view1[masked.role != 1] == ids[masked.role != 1]).all())
    ([2, 2], True)
    """
    expect(_NAME, sampling in ("exact", "bernoulli"), "sampling", "'exact' or 'bernoulli'", repr(sampling))
    expect(_NAME, isinstance(input_ids, Tensor), "input_ids", "a tensor", type(input_ids).__name__)
    for name, number in (("mask_token_id", mask_token_id), ("vocab_size", vocab_size), ("step", step)):
        expect(_NAME, is_whole(number), name, "a whole number", number)
    for name, share in (("rate", rate), ("complement_rate", complement_rate), ("mask_share", mask_share),
                        ("random_share", random_share)):  # fmt: skip
        expect(_NAME, is_number(share), name, "a number in [0, 1]", share)
    shape, device = input_ids.shape, input_ids.device
    traced = is_traced()
    if cu_seqlens is None:
        expect(_NAME, input_ids.dim() == 2, "input_ids", "of shape [B, L] when cu_seqlens is not given", list(shape))
        # A tensor made during graph capture exists only in the graph's replays: do not cache it.
        once = traced or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" and not once else 0
        cu_seqlens = (_equal_lengths.__wrapped__ if once else _equal_lengths)(*shape, device, stream)
    else:
        expect(_NAME, input_ids.dim() == 1, "input_ids", "of shape [T] when cu_seqlens is given", list(shape))
    given = {"cu_seqlens": cu_seqlens, "sample_ids": sample_ids, "attention_mask": attention_mask, "eligible": eligible,
             "unit_ids": unit_ids}  # fmt: skip
    for name, tensor in given.items():
        if tensor is not None:
            expect(_NAME, isinstance(tensor, Tensor), name, "a tensor", type(tensor).__name__)
            like = name in ("cu_seqlens", "sample_ids") or tensor.shape == shape
            expect(_NAME, like, name, f"of input_ids' shape {list(shape)}", list(tensor.shape))
    for name, tensor, dtype in (("eligible", eligible, torch.bool), ("unit_ids", unit_ids, torch.int32)):
        expect(_NAME, tensor is None or tensor.dtype == dtype, name, str(dtype), getattr(tensor, "dtype", None))
    if attention_mask is not None:
        attended = attention_mask != 0
        eligible = attended if eligible is None else eligible & attended
    if not isinstance(special_ids, Tensor):
        expect(_NAME, hasattr(special_ids, "__iter__"), "special_ids", "a sequence or a tensor", special_ids)
        given_ids = tuple(special_ids)  # an iterator yields them only once
        whole = all(is_whole(token) and -(2**63) <= token < 2**63 for token in given_ids)
        expect(_NAME, whole, "special_ids", "whole numbers of 64 bits", list(given_ids))
        special_ids = (_special_tensor.__wrapped__ if traced else _special_tensor)(given_ids, device)
    args = (
        input_ids.reshape(-1).contiguous(),
        cu_seqlens.contiguous(),
        special_ids.contiguous(),
        None if eligible is None else eligible.reshape(-1).contiguous(),
        None if unit_ids is None else unit_ids.reshape(-1).contiguous(),
        None if sample_ids is None else sample_ids.contiguous(),
        mask_token_id,
        vocab_size,
        float(rate),
        float(complement_rate),
        sampling == "exact",
        float(mask_share),
        float(random_share),
        signed_seed(_NAME, seed),
        step,
    )
    _check(*args)
    view1, view2, role = resolve(_NAME, device, backend, input_ids.dtype, input_ids.numel())(*args)
    return ComplementaryMask(view1.view(shape), view2.view(shape), role.view(shape))
