"""token_similarity in Triton: score tiles, −inf where a key is not a candidate.

grid   one program per tile, row tiles in groups so that L2 serves the keys again
loop   over D
bytes  a tile reads (rows + keys)·D numbers and writes rows·keys, once
sums   float32 (float64 for float64); deterministic: each score has one writer
"""

import triton
import triton.language as tl
from torch import Tensor

from ..ops._scores import check_temperature
from ..ops.token_contrastive import check_pairs, check_target
from . import interpreted, on_device
from ._pairs import Pairs, full_ranges
from ._scores import SOME, candidates_only, grouped, score_tile, targets_of


@triton.jit
def scores(x, y, x_inverse, y_inverse, tau, target, start, end, x_token, y_token, out, row_tiles, col_tiles, N, M, D,
           NORMALIZE: tl.constexpr, TARGETS: tl.constexpr, RANGES: tl.constexpr, TOKENS: tl.constexpr, BM: tl.constexpr,
           BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
           ACC: tl.constexpr):  # fmt: skip
    """out [N, M]."""
    i, j = grouped(tl.program_id(0), row_tiles, col_tiles, GROUP)
    rows, cols = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN)
    s = score_tile(x, y, x_inverse, y_inverse, tau, rows, cols, N, M, D, NORMALIZE, BM, BN, BK, EVEN, PRECISION, ACC)
    t = targets_of(target, rows, N, M, TARGETS)
    shown = candidates_only(s, t, start, end, x_token, y_token, rows, cols, N, M, RANGES, TOKENS, False)
    if TARGETS:
        shown = tl.where(cols[None, :] == t[:, None], s, shown)
    shown = tl.where(shown <= SOME, float("-inf"), shown)  # NaN stays NaN
    at = rows.to(tl.int64)[:, None] * M + cols[None, :]
    tl.store(out + at, shown.to(out.dtype.element_ty), mask=(rows < N)[:, None] & (cols < M)[None, :])


@on_device
def token_similarity(query: Tensor, key: Tensor, target: Tensor | None, temperature: Tensor, key_start: Tensor | None,
                     key_end: Tensor | None, query_token: Tensor | None, key_token: Tensor | None,
                     normalize: bool) -> Tensor:  # fmt: skip
    """The op."""
    check_pairs("token_similarity", query, key, target, temperature, key_start, key_end, query_token, key_token)
    if interpreted(query):
        check_temperature("token_similarity", temperature)
        if target is not None:
            check_target("token_similarity", target, key.shape[0])
    n, m = query.shape[0], key.shape[0]
    out = query.new_empty(n, m)
    if n == 0 or m == 0:
        return out
    pairs = Pairs(query, key, temperature, normalize, target=target, x_token=query_token, y_token=key_token)
    tile = pairs.config.scores
    start, end = full_ranges(key_start, key_end, m)
    options = {**pairs.options(), "RANGES": start is not None}
    del options["LABELS"], options["COLUMNS"]
    tiles = triton.cdiv(n, tile.rows), triton.cdiv(m, tile.cols)
    scores[(tiles[0] * tiles[1],)](pairs.x, pairs.y, pairs.x_inverse, pairs.y_inverse, temperature, pairs.target,
                                   start, end, pairs.x_token, pairs.y_token, out, *tiles, n, m, pairs.width,
                                   **options)  # fmt: skip
    return out
