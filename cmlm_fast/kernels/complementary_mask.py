"""complementary_mask in Triton: both views and the roles in one launch, bit for bit equal to the reference.

bernoulli  grid tokens/BLOCK → BLOCK tokens → no loop. A block guesses its first sequence (equal lengths), else bisects
           for it, and walks the boundaries inside it. Nothing is read or written twice: 25 bytes per token (int64).
exact      grid sequences → one sequence. Up to BLOCK tokens stay in registers: draw, count, find the two thresholds
           that separate the roles, write. A longer one is walked in steps of BLOCK; its draws are kept in the views,
           which are written last.
Integers throughout (64-bit offsets), except for the quotas floor(rate·n + 0.5): float64 without fused multiply-add.
Deterministic: a token's outputs depend on its position, sequence and (seed, step, sample id) alone, and have one
writer.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._roles import can_be_masked, corruption_bounds, role_bounds
from ..ops.complementary_mask import _check, _check_values
from . import interpreted, on_device
from ._philox import philox

_TOP = tl.constexpr(2**63 - 1)


@triton.jit
def tokens_at(ids, special, eligible, units, index, inside, position, SPECIAL: tl.constexpr, ELIGIBLE: tl.constexpr,
              UNITS: tl.constexpr):  # fmt: skip
    """(ids, whether they can be masked, unit ids)."""
    token = tl.load(ids + index, mask=inside, other=0)
    can = inside
    for s in tl.static_range(SPECIAL):
        can &= token != tl.load(special + s)
    if ELIGIBLE:
        can &= tl.load(eligible + index, mask=inside, other=0) != 0
    unit = position
    if UNITS:
        unit = tl.load(units + index, mask=inside, other=0)
        can &= unit >= 0  # other backends refuse negative units, whose keys would never separate
    return token, can, unit


@triton.jit
def draw(token, position, unit, sample, k0, k1, step, vocab, mask_id, below_mask, below_random, UNITS: tl.constexpr):
    """(assignment word of the unit as int64, what the token becomes where it is masked)."""
    low, high = sample.to(tl.uint32), (sample >> 32).to(tl.uint32)
    k0, k1, step = k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True), step.to(tl.uint32, bitcast=True)
    word, w1, w2, _ = philox(position.to(tl.uint32), step, low, high, k0, k1)
    if UNITS:
        word = philox(unit.to(tl.uint32), step, low, high, k0, k1)[0]
    w1 = w1.to(tl.int64)
    changed = tl.where(w1 < below_random, ((w2.to(tl.uint64) * vocab.to(tl.uint64)) >> 32).to(token.dtype), token)
    changed = tl.where(w1 < below_mask, mask_id.to(token.dtype), changed)
    return word.to(tl.int64), changed


@triton.jit
def write(view1, view2, role, index, inside, token, changed, role1, role2):
    """Both views and the role."""
    tl.store(view1 + index, tl.where(role1, changed, token), mask=inside)
    tl.store(view2 + index, tl.where(role2, changed, token), mask=inside)
    tl.store(role + index, role1.to(tl.uint8) + 2 * role2.to(tl.uint8), mask=inside)


# T is specialised: where 16 divides it, accesses are 16 bytes wide.
_RUNTIME = ["B", "mask_id", "vocab", "below_mask", "below_random", "k0", "k1", "step"]


@triton.jit(do_not_specialize=[*_RUNTIME, "below1", "below2"])
def bernoulli(ids, cu, special, eligible, units, samples, view1, view2, role, T, B, mask_id, vocab, below1, below2,
              below_mask, below_random, k0, k1, step, SPECIAL: tl.constexpr, ELIGIBLE: tl.constexpr,
              UNITS: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Each unit independently: role 1 below `below1`, role 2 below `below2`."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    index = begin + tl.arange(0, BLOCK)
    inside = index < T
    low = begin * B // T
    hit = (tl.load(cu + low) <= begin) & (tl.load(cu + low + 1) > begin)
    high = tl.where(hit, low + 1, tl.cast(B, tl.int64))
    low = tl.where(hit, low, 0)
    while high - low > 1:
        middle = (low + high) // 2
        above = tl.load(cu + middle) > begin
        high = tl.where(above, middle, high)
        low = tl.where(above, low, middle)
    sequence = tl.zeros((BLOCK,), tl.int64) + low
    start = tl.zeros((BLOCK,), tl.int64) + tl.load(cu + low)
    low += 1
    edge = tl.load(cu + low)
    while (edge < begin + BLOCK) & (low < B):
        start = tl.where(index >= edge, edge, start)
        sequence = tl.where(index >= edge, low, sequence)
        low += 1
        edge = tl.load(cu + low)
    position = (index - start).to(tl.int32)
    sample = sequence
    if SAMPLES:
        sample = tl.load(samples + sequence, mask=inside, other=0)
    token, can, unit = tokens_at(ids, special, eligible, units, index, inside, position, SPECIAL, ELIGIBLE, UNITS)
    word, changed = draw(token, position, unit, sample, k0, k1, step, vocab, mask_id, below_mask, below_random, UNITS)
    role1 = can & (word < below1)
    write(view1, view2, role, index, inside, token, changed, role1, can & (word >= below1) & (word < below2))


@triton.jit
def first_of_unit(ids, special, eligible, units, begin, position, unit, can, upto, SPECIAL: tl.constexpr,
                  ELIGIBLE: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """Whether no earlier eligible token of the sequence has the token's unit; looks at positions below `upto`."""
    seen = tl.zeros(unit.shape, tl.int32)
    for other in range(0, upto, STEP):
        at = other + tl.arange(0, STEP)
        _, can_other, unit_other = tokens_at(ids, special, eligible, units, begin + at, at < upto, at, SPECIAL,
                                             ELIGIBLE, True)  # fmt: skip
        same = (unit_other[None, :] == unit[:, None]) & can_other[None, :] & (at[None, :] < position[:, None])
        seen |= tl.max(same.to(tl.int32), 1)
    return can & (seen == 0)


@triton.jit
def quota(rate, n):
    """floor(rate·n + 0.5), at least 1 where rate > 0, at most n."""
    share = tl.cast(rate, tl.int64).to(tl.float64, bitcast=True)
    k = tl.floor(share * n.to(tl.float64) + 0.5).to(tl.int64)
    k = tl.where((k == 0) & (share > 0), 1, k)
    return tl.minimum(k, n)


@triton.jit
def guess(k, low, high, at_low, at_high, turn):
    """Next x to try for k keys <= x, between low with at_low < k keys and high with at_high > k. Keys are uniform, so
    interpolation converges within a few turns; bisection, after a while, guarantees termination."""
    share = (k - at_low + 0.5) / (at_high - at_low + 1.0)
    share = tl.where(turn < 24, share, 0.5).to(tl.float64)
    middle = low + (share * (high.to(tl.float64) - low.to(tl.float64))).to(tl.int64)
    return tl.minimum(tl.maximum(middle, low + 1), high - 1)


@triton.jit
def threshold(keys, counted, k, n):
    """A value that exactly k of the n counted keys do not exceed."""
    low, high = tl.full((), -1, tl.int64), tl.full((), _TOP, tl.int64)
    at_low, at_high = tl.zeros((), tl.int64), n
    x = tl.where(k == 0, low, high)
    at, turn = tl.where(k == 0, 0, n), 0
    while at != k:
        x = guess(k, low, high, at_low, at_high, turn)
        at = tl.sum((counted & (keys <= x)).to(tl.int64))
        low, at_low = tl.where(at < k, x, low), tl.where(at < k, at, at_low)
        high, at_high = tl.where(at > k, x, high), tl.where(at > k, at, at_high)
        turn += 1
    return x


@triton.jit
def parting_kept(view1, view2, begin, length, k, n, BLOCK: tl.constexpr):
    """`threshold` of keys kept in the views: the word in view 1, the unit or -1 (not counted) in view 2."""
    low, high = tl.full((), -1, tl.int64), tl.full((), _TOP, tl.int64)
    at_low, at_high = tl.zeros((), tl.int64), n
    x = tl.where(k == 0, low, high)
    at, turn = tl.where(k == 0, 0, n), 0
    while at != k:
        x = guess(k, low, high, at_low, at_high, turn)
        found = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, length, BLOCK):
            here = first + tl.arange(0, BLOCK)
            word = tl.load(view1 + begin + here, mask=here < length, other=0).to(tl.uint32).to(tl.int64)
            unit = tl.load(view2 + begin + here, mask=here < length, other=-1).to(tl.int64)
            found += ((unit >= 0) & ((word << 31 | unit) <= x)).to(tl.int32)
        at = tl.sum(found).to(tl.int64)
        low, at_low = tl.where(at < k, x, low), tl.where(at < k, at, at_low)
        high, at_high = tl.where(at > k, x, high), tl.where(at > k, at, at_high)
        turn += 1
    return x


@triton.jit(do_not_specialize=[*_RUNTIME, "rate", "complement"])
def exact(ids, cu, special, eligible, units, samples, view1, view2, role, T, B, mask_id, vocab, rate, complement,
          below_mask, below_random, k0, k1, step, SPECIAL: tl.constexpr, ELIGIBLE: tl.constexpr, UNITS: tl.constexpr,
          SAMPLES: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """In each sequence, ordered by (word, unit id), the first k1 units get role 1, the next k2 role 2. rate and complement
    are the bits of float64 numbers."""
    b = tl.program_id(0)
    begin = tl.minimum(tl.maximum(tl.load(cu + b), 0), T).to(tl.int64)  # a malformed cu must not reach out of bounds
    length = tl.minimum(tl.load(cu + b + 1), T) - begin.to(tl.int32)
    sample = b.to(tl.int64)
    if SAMPLES:
        sample = tl.load(samples + b)
    if length <= BLOCK:
        at = tl.arange(0, BLOCK)
        inside = at < length
        token, can, unit = tokens_at(ids, special, eligible, units, begin + at, inside, at, SPECIAL, ELIGIBLE, UNITS)
        word, changed = draw(token, at, unit, sample, k0, k1, step, vocab, mask_id, below_mask, below_random, UNITS)
        keys, counted = word << 31 | unit, can
        if UNITS:
            counted = first_of_unit(ids, special, eligible, units, begin, at, unit, can, length, SPECIAL, ELIGIBLE,
                                    STEP)  # fmt: skip
        n = tl.sum(counted.to(tl.int64))
        first = quota(rate, n)
        both = first + quota(complement, n - first)
        x, y = threshold(keys, counted, first, n), threshold(keys, counted, both, n)
        write(view1, view2, role, begin + at, inside, token, changed, can & (keys <= x), can & (keys > x) & (keys <= y))
    else:
        n = tl.zeros((), tl.int64)
        for base in range(0, length, BLOCK):
            at = base + tl.arange(0, BLOCK)
            inside = at < length
            of = begin + at
            token, can, unit = tokens_at(ids, special, eligible, units, of, inside, at, SPECIAL, ELIGIBLE, UNITS)
            word, changed = draw(token, at, unit, sample, k0, k1, step, vocab, mask_id, below_mask, below_random, UNITS)
            counted = can
            if UNITS:
                upto = tl.minimum(base + BLOCK, length)
                counted = first_of_unit(ids, special, eligible, units, begin, at, unit, can, upto, SPECIAL, ELIGIBLE,
                                        STEP)  # fmt: skip
            n += tl.sum(counted.to(tl.int64))
            tl.store(view1 + begin + at, word.to(token.dtype), mask=inside)
            tl.store(view2 + begin + at, tl.where(counted, unit, -1).to(token.dtype), mask=inside)
        tl.debug_barrier()  # other threads read what was kept
        first = quota(rate, n)
        both = first + quota(complement, n - first)
        x = parting_kept(view1, view2, begin, length, first, n, BLOCK)
        y = parting_kept(view1, view2, begin, length, both, n, BLOCK)
        tl.debug_barrier()
        for base in range(0, length, BLOCK):
            at = base + tl.arange(0, BLOCK)
            inside = at < length
            of = begin + at
            token, can, unit = tokens_at(ids, special, eligible, units, of, inside, at, SPECIAL, ELIGIBLE, UNITS)
            word, changed = draw(token, at, unit, sample, k0, k1, step, vocab, mask_id, below_mask, below_random, UNITS)
            keys = word << 31 | unit
            write(view1, view2, role, begin + at, inside, token, changed, can & (keys <= x),
                  can & (keys > x) & (keys <= y))  # fmt: skip


def _signed(word: int) -> int:
    """The 32-bit word as a signed number of the same bits, so that one kernel serves all words."""
    word &= 2**32 - 1
    return word - 2**32 if word >= 2**31 else word


@on_device
def complementary_mask(ids: Tensor, cu: Tensor, special: Tensor, eligible: Tensor | None, units: Tensor | None,
                       samples: Tensor | None, mask_id: int, vocab: int, rate: float, complement: float, is_exact: bool,
                       mask_share: float, random_share: float, seed: int, step: int) -> tuple[Tensor, ...]:  # fmt: skip
    """The op."""
    _check(ids, cu, special, eligible, units, samples, mask_id, vocab, rate, complement, is_exact, mask_share,
           random_share, seed, step)  # fmt: skip
    if interpreted(ids):
        _check_values(ids, cu, can_be_masked(ids, special, eligible), units, vocab)
    ids = ids.contiguous()
    views = torch.empty_like(ids), torch.empty_like(ids), torch.empty_like(ids, dtype=torch.uint8)
    tokens, sequences = ids.numel(), cu.numel() - 1
    if tokens == 0 or sequences == 0:
        return views
    flags = {"SPECIAL": special.numel(), "ELIGIBLE": eligible is not None, "UNITS": units is not None,
             "SAMPLES": samples is not None, "enable_fp_fusion": False}  # fmt: skip
    given = [None if x is None else x.contiguous() for x in (eligible, units, samples)]
    eligible = given[0]
    tensors = (ids, cu.contiguous(), special.contiguous(), eligible if eligible is None else eligible.view(torch.uint8),
               *given[1:], *views, tokens, sequences, mask_id, vocab)  # fmt: skip
    words = *corruption_bounds(mask_share, random_share), _signed(seed), _signed(seed >> 32), _signed(step)
    if is_exact:
        # Room for the average sequence in registers; with equal lengths, for all sequences.
        block = min(max(triton.next_power_of_2(-(-tokens // sequences)), 64), 1024)
        bits = [struct.unpack("<q", struct.pack("<d", share))[0] for share in (rate, complement)]
        warps = max(block // 128, 1)
        exact[(sequences,)](*tensors, *bits, *words, **flags, BLOCK=block, STEP=8, num_warps=warps)
    else:
        grid = (triton.cdiv(tokens, 512),)
        bernoulli[grid](*tensors, *role_bounds(rate, complement), *words, **flags, BLOCK=512, num_warps=4)
    return views
