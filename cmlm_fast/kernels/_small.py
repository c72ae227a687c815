"""info_nce of few rows, in one launch: losses, the temperature's gradient, the rows' gradients.

grid   strips of D; each program computes the whole score matrix, which fits into its registers: blocks need not wait
       for each other. Without gradients, one program
tile   BR × BR scores: all R rows (R = B; 2B where the views are one matrix [z1; z2]) against each other, R ≤ 64
loop   over D, both operands through shared memory into the matrix units; the rows' norms come from the same tiles
bytes  a program reads the rows once, and its strip again; gradients are written once, the score matrix never
sums   float32, norms of float32 rows float64
Deterministic: one writer per number. Operations: 2·R²·D per strip, plus 4·R²·D.
"""

import triton
import triton.language as tl

from ._scores import NOTHING, SOME, multiply, softmax_of, sums_of


@triton.jit
def rows_at(z1, z2, r, k, B, D, SELF: tl.constexpr):
    """Rows r, columns k of z1, or of [z1; z2]; 0 outside."""
    inside = (r < B)[:, None] & (k < D)[None, :]
    x = tl.load(z1 + r[:, None] * D + k[None, :], mask=inside, other=0.0)
    if SELF:
        inside = ((r >= B) & (r < 2 * B))[:, None] & (k < D)[None, :]
        x += tl.load(z2 + (r - B)[:, None] * D + k[None, :], mask=inside, other=0.0)
    return x


@triton.jit
def inverse_of(squares, NORMALIZE: tl.constexpr):
    """1 / max(‖row‖, 1e-12)."""
    if NORMALIZE:
        return 1.0 / tl.maximum(tl.sqrt(squares), 1e-12)
    return tl.full(squares.shape, 1.0, squares.dtype)


@triton.jit
def loss_of(s, positive, AXIS: tl.constexpr, LABELS: tl.constexpr):
    """For each row (AXIS 1) or column (0) of s, NOTHING where there is no candidate: its loss and, for the gradient of its
    scores, reference, factor (e^(s − reference)·factor), share (of its positive) and pull (of the temperature)."""
    if LABELS:
        top, total, moment = sums_of(s, AXIS)
        count = tl.maximum(tl.sum(positive.to(s.dtype), AXIS), 1.0)
        mean = tl.sum(tl.where(positive, s, 0.0), AXIS) / count
        top, total = tl.where(total == 0.0, 0.0, top), tl.where(total == 0.0, 1.0, total)  # past the last row
        return tl.log(total) + (top - mean), top, 1.0 / total, 1.0 / count, moment / total + (top - mean)
    score = tl.sum(tl.where(positive, s, 0.0), AXIS)
    top, total, moment = sums_of(tl.where(positive, NOTHING, s), AXIS)
    return softmax_of(top, total, moment, score)


@triton.jit
def info_nce_small(z1, z2, tau, labels, loss, d1, d2, dtau, weight, B, D, SELF: tl.constexpr, LABELS: tl.constexpr,
                   COLUMNS: tl.constexpr, NORMALIZE: tl.constexpr, GRADIENT: tl.constexpr, Z1: tl.constexpr,
                   Z2: tl.constexpr, SCALE: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
                   PRECISION: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """GRADIENT: loss [1] = Σ weight·loss_r and its gradients; else loss [R]. COLUMNS: also a softmax over columns."""
    R = B
    if SELF:
        R = 2 * B
    r = tl.arange(0, BR)
    s = tl.zeros((BR, BR), ACC)
    x_squares, y_squares = tl.zeros((BR,), NORM), tl.zeros((BR,), NORM)
    for d in range(0, D, BK):
        k = d + tl.arange(0, BK)
        x = rows_at(z1, z2, r, k, B, D, SELF)
        x_squares += tl.sum(x.to(NORM) * x.to(NORM), 1)
        if SELF:
            y = x
        else:
            y = rows_at(z2, z2, r, k, B, D, False)
            y_squares += tl.sum(y.to(NORM) * y.to(NORM), 1)
        s = multiply(x, tl.trans(y), s, PRECISION)
    if SELF:
        y_squares = x_squares
    x_inverse, y_inverse, t = inverse_of(x_squares, NORMALIZE), inverse_of(y_squares, NORMALIZE), tl.load(tau)
    s = (s * (x_inverse / t)[:, None] * y_inverse[None, :]).to(ACC)

    here = (r < R)[:, None] & (r < R)[None, :]
    positive = here & (r[:, None] == r[None, :])
    if SELF:
        s = tl.where(r[:, None] == r[None, :], NOTHING, s)
        if LABELS:
            label = tl.load(labels + r % B, mask=r < R, other=0)
            positive = here & (label[:, None] == label[None, :]) & (r[:, None] != r[None, :])
        else:
            positive = here & ((r[:, None] + B == r[None, :]) | (r[None, :] + B == r[:, None]))
    s = tl.where(here, s, NOTHING)
    value, reference, factor, share, pull = loss_of(s, positive, 1, LABELS)
    if COLUMNS:
        value_c, reference_c, factor_c, share_c, pull_c = loss_of(s, positive, 0, LABELS)
        value = (value + value_c) / 2
    if not GRADIENT:
        tl.store(loss + r, value, mask=r < R)
        return

    if tl.program_id(0) == 0:
        tl.store(loss, weight * tl.sum(tl.where(r < R, value, 0.0), 0))
        total = tl.sum(tl.where(r < R, pull, 0.0), 0)
        if COLUMNS:
            total = (total + tl.sum(tl.where(r < R, pull_c, 0.0), 0)) / 2
        tl.store(dtau, -weight * total / t)
    # The gradient of the scores in units of weight/SCALE, to fit float16. If the views are one matrix, rows also count as keys.
    if SELF:
        reference_c, factor_c, share_c = reference, factor, share
    g = tl.exp(s - reference[:, None]) * factor[:, None]
    own = tl.zeros((BR, BR), ACC) + share[:, None]
    if COLUMNS or SELF:
        g += tl.exp(s - reference_c[None, :]) * factor_c[None, :]
        own += share_c[None, :]
    if not LABELS:  # the positive was kept out of the sums
        g = tl.where(positive, 0.0, g)
    g = tl.where(positive, g - own, g)
    if COLUMNS:
        g = g * 0.5
    g = tl.where(s <= SOME, 0.0, g * SCALE).to(z1.dtype.element_ty)  # NaN stays NaN
    cosine = tl.where(s <= SOME, 0.0, g.to(ACC) * s) * t
    gain = weight / t / SCALE

    k = tl.program_id(0) * BD + tl.arange(0, BD)
    x = rows_at(z1, z2, r, k, B, D, SELF)
    x_unit = (x.to(ACC) * x_inverse[:, None]).to(x.dtype)
    y, y_unit = x, x_unit
    if not SELF:
        y = rows_at(z2, z2, r, k, B, D, False)
        y_unit = (y.to(ACC) * y_inverse[:, None]).to(y.dtype)
    if Z1 or SELF:
        dx = multiply(g, y_unit, tl.zeros((BR, BD), ACC), PRECISION)
        dx = through(dx, x, x_inverse, tl.sum(cosine, 1), gain, NORMALIZE)
        if Z1:
            put(d1, dx, r, k, B, D)
        if Z2 and SELF:
            put(d2, dx, r - B, k, B, D)
    if Z2 and not SELF:
        dy = multiply(tl.trans(g), x_unit, tl.zeros((BR, BD), ACC), PRECISION)
        put(d2, through(dy, y, y_inverse, tl.sum(cosine, 0), gain, NORMALIZE), r, k, B, D)


@triton.jit
def through(total, x, inverse, along, gain, NORMALIZE: tl.constexpr):
    """The rows' gradient from `total`, that of their unit rows, whose part along the row is `along`."""
    if NORMALIZE:
        total = (total - x.to(total.dtype) * (inverse * along)[:, None]) * inverse[:, None]
    return (total * gain).to(x.dtype)


@triton.jit
def put(out, value, r, k, B, D):
    """Rows r, columns k of out [B, D]."""
    tl.store(out + r[:, None] * D + k[None, :], value, mask=((r >= 0) & (r < B))[:, None] & (k < D)[None, :])
