"""Score tiles s = x̂·ŷᵀ/τ and what is computed from them: statistics of rows and columns, and the weights of the gradients.

grid   one program per tile of a panel (panel rows/BM × panel keys/BN), in groups of row tiles: L2 serves the keys again
tile   BM rows × BN keys
loop   over D in steps of BK: both operands through shared memory into the matrix units
bytes  a tile reads (BM + BN)·D numbers; statistics write 3 numbers per row and 3 per key, weights write BM·BN numbers, once
sums   float32 (float64 for float64)
Deterministic: each number has one writer; the partial statistics are merged in tile order.

The positive of a row (its target) is kept out of the sums: if it is nearly all of the softmax, 1 − p would cancel.
Tiles that overlap no row's range are skipped everywhere; `low`, `high` bound the keys of each row tile (see `bounds`).
"""

import os

import triton
import triton.language as tl

NOTHING = tl.constexpr(-1e30)  # the score of a non-candidate: e^(NOTHING - SOME) is 0, and 0 times it is 0
SOME = tl.constexpr(-1e29)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b. The interpreter would multiply bfloat16's bits as integers, so operands are widened there, exactly."""
    if INTERPRETED:
        a, b = a.to(acc.dtype), b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def grouped(pid, row_tiles, col_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles share their columns while these are in L2."""
    width = GROUP * col_tiles
    first = pid // width * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    return first + pid % width % size, pid % width // size


@triton.jit
def rows_of(x, index, limit, D):
    """Pointers of rows `index`; rows past the end repeat the last one, and are masked later."""
    return x + tl.minimum(index, limit - 1).to(tl.int64) * D


@triton.jit
def score_tile(x, y, x_inverse, y_inverse, tau, rows, cols, N, M, D, NORMALIZE: tl.constexpr, BM: tl.constexpr,
               BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
               ACC: tl.constexpr):  # fmt: skip
    """[BM, BN] scores of `rows` against `cols`."""
    x_rows, y_rows = rows_of(x, rows, N, D)[:, None], rows_of(y, cols, M, D)[None, :]
    s = tl.zeros((BM, BN), ACC)
    for d in range(0, D, BK):
        k = d + tl.arange(0, BK)
        if EVEN:
            a, b = tl.load(x_rows + k[None, :]), tl.load(y_rows + k[:, None])
        else:
            a = tl.load(x_rows + k[None, :], mask=k[None, :] < D, other=0.0)
            b = tl.load(y_rows + k[:, None], mask=k[:, None] < D, other=0.0)
        s = multiply(a, b, s, PRECISION)
    if NORMALIZE:
        left = tl.load(x_inverse + rows, mask=rows < N, other=0.0) / tl.load(tau)
        right = tl.load(y_inverse + cols, mask=cols < M, other=0.0)
        return (s * left[:, None] * right[None, :]).to(ACC)
    return s / tl.load(tau)


@triton.jit
def targets_of(target, rows, N, M, TARGETS: tl.constexpr):
    """Each row's target, or -1 if it is absent, ignored, or past the end."""
    if TARGETS:
        t = tl.load(target + rows, mask=rows < N, other=-1)
        return tl.where((t >= 0) & (t < M), t, -1).to(tl.int32)
    return tl.full(rows.shape, -1, tl.int32)


@triton.jit
def candidates_only(s, t, start, end, x_token, y_token, rows, cols, N, M, RANGES: tl.constexpr, TOKENS: tl.constexpr,
                    IGNORED: tl.constexpr):  # fmt: skip
    """s, with NOTHING where column j is not a candidate of row i (targets are not exempt). TOKENS: 1 key tokens only, 2 both.
    IGNORED: a row with t = -1 has no candidates. Each rule is applied immediately: stored masks would fill the registers."""
    good = rows < N
    if IGNORED:
        good &= t >= 0
    s = tl.where(good[:, None] & (cols < M)[None, :], s, NOTHING)
    if RANGES:
        s = tl.where(cols[None, :] >= tl.load(start + rows, mask=rows < N, other=0)[:, None], s, NOTHING)
        s = tl.where(cols[None, :] < tl.load(end + rows, mask=rows < N, other=0)[:, None], s, NOTHING)
    if TOKENS > 0:
        key_token = tl.load(y_token + cols, mask=cols < M, other=-1)
        s = tl.where((key_token != -1)[None, :], s, NOTHING)
        if TOKENS == 2:
            token = tl.load(x_token + rows, mask=rows < N, other=-1)
            s = tl.where(key_token[None, :] != token[:, None], s, NOTHING)
    return s


@triton.jit
def bounds(target, start, end, low, high, N, M, BM: tl.constexpr):
    """Per row tile: keys [low, high) hold the candidates of its rows and their targets; low = M, high = 0 if none."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    t = targets_of(target, rows, N, M, True)
    first = tl.maximum(tl.load(start + rows, mask=rows < N, other=0), 0)
    last = tl.minimum(tl.load(end + rows, mask=rows < N, other=0), M)
    some = first < last
    first, last = tl.where(some, first, t), tl.where(some, last, t + 1)
    tl.store(low + tl.program_id(0), tl.min(tl.where(t >= 0, tl.minimum(first, t), M), 0))
    tl.store(high + tl.program_id(0), tl.max(tl.where(t >= 0, tl.maximum(last, t + 1), 0), 0))


@triton.jit
def sums_of(s, AXIS: tl.constexpr):
    """(maximum, Σ e^(s − maximum), Σ e^(s − maximum)·(s − maximum)) over candidates; (−inf, 0, 0) if none."""
    top = tl.max(s, AXIS)
    shifted = s - tl.expand_dims(tl.maximum(top, SOME), AXIS)
    e = tl.exp(shifted)
    return tl.where(top <= SOME, float("-inf"), top), tl.sum(e, AXIS), tl.sum(e * shifted, AXIS)


@triton.jit
def statistics(x, y, x_inverse, y_inverse, tau, target, start, end, x_token, y_token, labels, low, high, row_part,
               col_part, own_score, row0, col0, row_tiles, col_tiles, N, M, D, NORMALIZE: tl.constexpr,
               TARGETS: tl.constexpr, RANGES: tl.constexpr, TOKENS: tl.constexpr, LABELS: tl.constexpr,
               COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
               EVEN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """One panel's row_part [3 or 4, col_tiles, row_tiles·BM], col_part [3, row_tiles, col_tiles·BN], and own_score [N]
    of the targets. The fourth plane of row_part is the sum of a row's scores at keys with its label."""
    i, j = grouped(tl.program_id(0), row_tiles, col_tiles, GROUP)
    row, col = row0 + i * BM, col0 + j * BN
    if RANGES:
        out_of_reach = (tl.load(low + row // BM) >= col + BN) | (tl.load(high + row // BM) <= col)
        if out_of_reach:
            return
    rows, cols = row + tl.arange(0, BM), col + tl.arange(0, BN)
    s = score_tile(x, y, x_inverse, y_inverse, tau, rows, cols, N, M, D, NORMALIZE, BM, BN, BK, EVEN, PRECISION, ACC)
    t = targets_of(target, rows, N, M, TARGETS)
    if TARGETS:
        score = tl.sum(tl.where(cols[None, :] == t[:, None], s, 0.0), 1)
        tl.store(own_score + rows, score, mask=(t >= col) & (t < col + BN))
        s = tl.where(cols[None, :] == t[:, None], NOTHING, s)
    s = candidates_only(s, t, start, end, x_token, y_token, rows, cols, N, M, RANGES, TOKENS, TARGETS)
    top, total, moment = sums_of(s, 1)
    plane = tl.cast(row_tiles, tl.int64) * BM * col_tiles
    at = (j * row_tiles + i).to(tl.int64) * BM + tl.arange(0, BM)
    tl.store(row_part + at, top)
    tl.store(row_part + plane + at, total)
    tl.store(row_part + 2 * plane + at, moment)
    if LABELS:
        mine = tl.load(labels + rows, mask=rows < N, other=0)
        theirs = tl.load(labels + cols, mask=cols < M, other=0)
        same = tl.where(mine[:, None] == theirs[None, :], tl.where(s > SOME, s, 0.0), 0.0)
        tl.store(row_part + 3 * plane + at, tl.sum(same, 1))
    if COLUMNS:
        top, total, moment = sums_of(s, 0)
        plane = tl.cast(col_tiles, tl.int64) * BN * row_tiles
        at = (i * col_tiles + j).to(tl.int64) * BN + tl.arange(0, BN)
        tl.store(col_part + at, top)
        tl.store(col_part + plane + at, total)
        tl.store(col_part + 2 * plane + at, moment)


@triton.jit
def rescaled(top, total, moment, to):
    """(total, moment) with `to` >= top in place of the maximum."""
    down = tl.where(top == float("-inf"), 0.0, top - to)
    factor = tl.where(top == float("-inf"), 0.0, tl.exp(down))
    return factor * total, factor * (moment + total * down)


@triton.jit
def merge(part, state, low, high, first, panel, tiles, other0, size, N, FIRST: tl.constexpr, RANGES: tl.constexpr,
          LABELS: tl.constexpr, BLOCK: tl.constexpr, OTHER: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Fold a panel's part [3 or 4, tiles, size] into rows first.. of state [3 or 4, N], in tile order. `panel`: rows of
    the panel; `other0`: its first key; OTHER: keys per tile."""
    local = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = first + local
    good = (local < panel) & (rows < N)
    top = tl.full((BLOCK,), float("-inf"), ACC)
    total, moment, same = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    if not FIRST:
        top = tl.load(state + rows, mask=good, other=float("-inf"))
        total = tl.load(state + N + rows, mask=good, other=0.0)
        moment = tl.load(state + 2 * N + rows, mask=good, other=0.0)
        if LABELS:
            same = tl.load(state + 3 * N + rows, mask=good, other=0.0)
    begin, end = 0, tiles
    if RANGES:
        i = first // BLOCK + tl.program_id(0)
        begin = tl.maximum(tl.load(low + i) - other0, 0) // OTHER
        end = tl.minimum(tl.cdiv(tl.maximum(tl.load(high + i) - other0, 0), OTHER), tiles)
    plane = tl.cast(size, tl.int64) * tiles
    at = part + tl.cast(begin, tl.int64) * size + local
    for _ in range(begin, end):
        new_top = tl.load(at, mask=good, other=float("-inf"))
        new_total = tl.load(at + plane, mask=good, other=0.0)
        new_moment = tl.load(at + 2 * plane, mask=good, other=0.0)
        highest = tl.maximum(top, new_top)
        total, moment = rescaled(top, total, moment, highest)
        new_total, new_moment = rescaled(new_top, new_total, new_moment, highest)
        total += new_total
        moment += new_moment
        top = highest
        if LABELS:
            same += tl.load(at + 3 * plane, mask=good, other=0.0)
        at += size
    tl.store(state + rows, top, mask=good)
    tl.store(state + N + rows, total, mask=good)
    tl.store(state + 2 * N + rows, moment, mask=good)
    if LABELS:
        tl.store(state + 3 * N + rows, same, mask=good)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 without losing a small x: the rounding of 1 + x is divided out."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def softmax_of(top, total, moment, score):
    """From the statistics of the other candidates and the positive's score: loss, reference and factor of
    e^(s − reference)·factor = p, 1 − p of the positive, and Σ p·s − score."""
    higher = tl.maximum(top, score)
    others, moment = rescaled(top, total, moment, higher)
    x = score - higher
    one = tl.exp(x)
    small = others < one
    near = log1p(tl.where(small, others, 0.0) / tl.where(small, one, 1.0))
    value = tl.where(small, near, tl.log(others + one) - x)
    return value, higher, 1.0 / (others + one), others / (others + one), (moment - others * x) / (others + one)


@triton.jit
def finish(state, own_score, target, count, weight, peak, tau, loss, reference, factor, own, tau_part, N, M,
           SCALE: tl.constexpr, LABELS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """From a row's statistics: its loss, and for the kernel `weights` e^(s − reference)·factor and the gradient `own`
    at its positive (LABELS: at each of its `count` positives), both in units of peak/SCALE."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    good = rows < N
    top = tl.load(state + rows, mask=good, other=0.0)
    total = tl.load(state + N + rows, mask=good, other=1.0)
    moment = tl.load(state + 2 * N + rows, mask=good, other=0.0)
    if LABELS:
        positives = tl.load(count + rows, mask=good, other=1).to(top.dtype)
        mean = tl.load(state + 3 * N + rows, mask=good, other=0.0) / positives
        value = tl.log(total) + (top - mean)
        ratio, share, pull = 1.0 / total, 1.0 / positives, moment / total + (top - mean)
    else:
        t = tl.load(target + rows, mask=good, other=-100)
        score = tl.load(own_score + rows, mask=good & (t >= 0) & (t < M), other=0.0)
        value, top, ratio, share, pull = softmax_of(top, total, moment, score)
        # A target that is neither a key nor -100 has no loss: NaN, since a kernel cannot raise.
        value = tl.where((t >= 0) & (t < M), value, tl.where(t == -100, 0.0, float("nan")))
    tl.store(loss + rows, value, mask=good)
    if GRADIENT:
        w = tl.load(weight + rows, mask=good, other=0.0)
        if not LABELS:
            w = tl.where(t == -100, 0.0, w)
        normal = w / tl.load(peak) * SCALE
        tl.store(reference + rows, top, mask=good)
        tl.store(factor + rows, normal * ratio, mask=good)
        tl.store(own + rows, -normal * share, mask=good)
        tl.store(tau_part + rows, tl.where(w == 0.0, 0.0, -w * pull / tl.load(tau)), mask=good)


@triton.jit
def weights(x, y, x_inverse, y_inverse, tau, target, start, end, x_token, y_token, labels, low, high, reference, factor,
            own, col_reference, col_factor, col_own, out, row0, col0, row_tiles, col_tiles, N, M, D,
            NORMALIZE: tl.constexpr, TARGETS: tl.constexpr, RANGES: tl.constexpr, TOKENS: tl.constexpr,
            LABELS: tl.constexpr, COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
            GROUP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """out [row_tiles·BM, col_tiles·BN] of a panel: gradient of the scores. COLUMNS: also of a softmax over columns."""
    i, j = grouped(tl.program_id(0), row_tiles, col_tiles, GROUP)
    row, col = row0 + i * BM, col0 + j * BN
    if RANGES:
        out_of_reach = (tl.load(low + row // BM) >= col + BN) | (tl.load(high + row // BM) <= col)
        if out_of_reach:
            return
    rows, cols = row + tl.arange(0, BM), col + tl.arange(0, BN)
    s = score_tile(x, y, x_inverse, y_inverse, tau, rows, cols, N, M, D, NORMALIZE, BM, BN, BK, EVEN, PRECISION, ACC)
    t = targets_of(target, rows, N, M, TARGETS)
    s = candidates_only(s, t, start, end, x_token, y_token, rows, cols, N, M, RANGES, TOKENS, TARGETS)
    mine = tl.load(own + rows, mask=rows < N, other=0.0)[:, None]
    g = tl.exp(s - tl.load(reference + rows, mask=rows < N, other=0.0)[:, None])
    g = g * tl.load(factor + rows, mask=rows < N, other=0.0)[:, None]
    if COLUMNS:
        mine = mine + tl.load(col_own + cols, mask=cols < M, other=0.0)[None, :]
        h = tl.exp(s - tl.load(col_reference + cols, mask=cols < M, other=0.0)[None, :])
        g += h * tl.load(col_factor + cols, mask=cols < M, other=0.0)[None, :]
    if LABELS:
        a, b = tl.load(labels + rows, mask=rows < N, other=0), tl.load(labels + cols, mask=cols < M, other=0)
        g += tl.where(a[:, None] == b[None, :], tl.where(s > SOME, mine, 0.0), 0.0)
    if TARGETS:
        g = tl.where(cols[None, :] == t[:, None], mine, g)
    at = (i * BM + tl.arange(0, BM)).to(tl.int64)[:, None] * (col_tiles * BN) + (j * BN + tl.arange(0, BN))[None, :]
    tl.store(out + at, g.to(out.dtype.element_ty))
