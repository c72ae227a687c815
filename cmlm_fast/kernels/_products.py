"""Unit rows, the gradients' products, and the backward pass of the normalisation.

unit_rows   grid rows/BLOCK; reads a row twice (its norm, then itself; the second time from cache), writes it once
products    grid (key tiles + row tiles) × D/BD, the longer sums first; a tile reads a strip of the weights and of the
            other side's rows, and adds to float32 sums that it alone owns; each weight is read by at most D/BD programs
            per side
project     grid rows/BLOCK; reads sums and row twice, writes the gradient once
Sums are float32 (float64 for float64). Deterministic: one writer per number, contractions in tile order.
"""

import triton
import triton.language as tl

from ._scores import multiply


@triton.jit
def inverse_norms(x, out, R, D, BLOCK: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr):
    """out [R] = 1 / max(‖x‖, 1e-12). Its error enters every score of the row: float32 rows keep it in float64."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = x + rows.to(tl.int64)[:, None] * D
    total = tl.zeros((BLOCK,), ACC)
    for d in range(0, D, BD):
        k = d + tl.arange(0, BD)
        v = tl.load(at + k[None, :], mask=(rows < R)[:, None] & (k < D)[None, :], other=0.0).to(ACC)
        total += tl.sum(v * v, 1)
    tl.store(out + rows, 1.0 / tl.maximum(tl.sqrt(total), 1e-12), mask=rows < R)


@triton.jit
def unit_rows(x, inverse, out, first, R, D, width, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr,
              ACC: tl.constexpr):  # fmt: skip
    """out [panel, width] = rows first.. of x at unit length, in x's dtype; 0 past row R and past column D."""
    local = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = first + local
    k = tl.program_id(1) * BD + tl.arange(0, BD)
    v = tl.load(x + rows.to(tl.int64)[:, None] * D + k[None, :], mask=(rows < R)[:, None] & (k < D)[None, :], other=0.0)
    if NORMALIZE:
        v = (v.to(ACC) * tl.load(inverse + rows, mask=rows < R, other=0.0)[:, None]).to(v.dtype)
    tl.store(out + local.to(tl.int64)[:, None] * width + k[None, :], v)


@triton.jit
def y_product(w, x, y_sum, low, high, j, d, row0, col0, row_tiles, col_tiles, width, RANGES: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
              PRECISION: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Key tile j, columns d.. of y_sum += wᵀ·x."""
    stride = col_tiles * BN
    cols, d = j * BN + tl.arange(0, BN), d + tl.arange(0, BD)
    begin, end = 0, row_tiles
    if RANGES:  # the row tiles from the first to the last whose keys overlap this tile's
        tile = tl.arange(0, TILES)
        lows = tl.load(low + row0 // BM + tile, mask=tile < row_tiles, other=2147483647)
        highs = tl.load(high + row0 // BM + tile, mask=tile < row_tiles, other=0)
        meets = (lows < col0 + (j + 1) * BN) & (highs > col0 + j * BN)
        begin, end = tl.min(tl.where(meets, tile, TILES), 0), tl.max(tl.where(meets, tile + 1, 0), 0)
    acc = tl.zeros((BN, BD), ACC)
    for r in range(begin * BM, end * BM, BK):
        k = r + tl.arange(0, BK)
        at = w + k[:, None] * stride + cols[None, :]
        if RANGES:  # a tile between them without overlap was never written
            i = row0 // BM + k // BM
            written = (tl.load(low + i) < col0 + (j + 1) * BN) & (tl.load(high + i) > col0 + j * BN)
            a = tl.load(at, mask=written[:, None], other=0.0)
        else:
            a = tl.load(at)
        b = tl.load(x + k[:, None] * width + d[None, :])
        acc = multiply(tl.trans(a), b, acc, PRECISION)
    if begin < end:
        at = y_sum + cols[:, None] * width + d[None, :]
        tl.store(at, tl.load(at) + acc)


@triton.jit
def x_product(w, y, x_sum, low, high, i, d, row0, col0, col_tiles, width, RANGES: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
              ACC: tl.constexpr):  # fmt: skip
    """Row tile i, columns d.. of x_sum += w·y."""
    stride = col_tiles * BN
    rows, d = i * BM + tl.arange(0, BM), d + tl.arange(0, BD)
    begin, end = 0, col_tiles
    if RANGES:
        begin = tl.maximum(tl.load(low + row0 // BM + i) - col0, 0) // BN
        end = tl.minimum(tl.cdiv(tl.maximum(tl.load(high + row0 // BM + i) - col0, 0), BN), col_tiles)
    acc = tl.zeros((BM, BD), ACC)
    for c in range(begin * BN, end * BN, BK):
        k = c + tl.arange(0, BK)
        a = tl.load(w + rows[:, None] * stride + k[None, :])
        b = tl.load(y + k[:, None] * width + d[None, :])
        acc = multiply(a, b, acc, PRECISION)
    if begin < end:
        at = x_sum + (row0 + rows).to(tl.int64)[:, None] * width + d[None, :]
        tl.store(at, tl.load(at) + acc)


@triton.jit
def products(w, x, y, x_sum, y_sum, low, high, row0, col0, row_tiles, col_tiles, width, X_SUM: tl.constexpr,
             Y_SUM: tl.constexpr, RANGES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
             BK: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """x_sum[row0.., :] += w·y and y_sum += wᵀ·x, for w [row_tiles·BM, col_tiles·BN], x [row_tiles·BM, width],
    y [col_tiles·BN, width], y_sum [col_tiles·BN, width], x_sum [N up to whole tiles, width]. Offsets inside a panel are
    32-bit: Config bounds its size."""
    pid = tl.program_id(0)
    strips = width // BD
    if Y_SUM:
        if pid < col_tiles * strips:
            y_product(w, x, y_sum, low, high, pid // strips, pid % strips * BD, row0, col0, row_tiles, col_tiles, width,
                      RANGES, BM, BN, BD, BK, TILES, PRECISION, ACC)  # fmt: skip
        pid -= col_tiles * strips
    if X_SUM:
        i, d = pid // strips, pid % strips * BD
        if pid >= 0:
            x_product(w, y, x_sum, low, high, i, d, row0, col0, col_tiles, width, RANGES, BM, BN, BD, BK,
                      PRECISION, ACC)  # fmt: skip


@triton.jit
def project(total, x, inverse, out, peak, tau, first, R, D, width, SCALE: tl.constexpr, NORMALIZE: tl.constexpr,
            BLOCK: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """out[first..] = the rows' gradient from that of their unit rows, total [panel, width] in units of
    peak/(SCALE·τ)."""
    local = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = first + local
    good = rows < R
    at, sums = rows.to(tl.int64)[:, None] * D, total + local.to(tl.int64)[:, None] * width
    gain = tl.load(peak) / tl.load(tau) / SCALE
    along = tl.zeros((BLOCK,), ACC)
    length = tl.full((BLOCK,), 1.0, ACC)
    if NORMALIZE:
        length = tl.load(inverse + rows, mask=good, other=0.0)
        for d in range(0, D, BD):
            k = d + tl.arange(0, BD)
            v = tl.load(x + at + k[None, :], mask=good[:, None] & (k < D)[None, :], other=0.0).to(ACC)
            along += tl.sum(v * tl.load(sums + k[None, :], mask=good[:, None] & (k < D)[None, :], other=0.0), 1)
        along *= length
    for d in range(0, D, BD):
        k = d + tl.arange(0, BD)
        inside = good[:, None] & (k < D)[None, :]
        g = tl.load(sums + k[None, :], mask=inside, other=0.0)
        if NORMALIZE:
            v = tl.load(x + at + k[None, :], mask=inside, other=0.0).to(ACC) * length[:, None]
            g = (g - v * along[:, None]) * length[:, None]
        tl.store(out + at + k[None, :], (g * gain).to(out.dtype.element_ty), mask=inside)
