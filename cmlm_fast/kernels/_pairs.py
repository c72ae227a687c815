"""The launches behind token_contrastive and info_nce: losses, then the gradients in panels.

    statistics → merge   per panel: maximum and sums of every row (and column), the positives kept apart    2·N·M·D
    finish               losses, and the numbers that turn a score into its gradient
    weights              per panel: the scores recomputed, as gradients of the scores                       2·N·M·D
    products             per panel: weights·ŷ and weightsᵀ·x̂, added up in float32                           4·N·M·D
    project              back through the normalisation, into the gradients

Memory beyond the outputs: one panel of weights (Config.panel, never N×M), its unit rows and sums, float32 sums of x̂'s
gradient [N, D], and a few numbers per row and key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._scores import loss_dtype
from . import chip
from ._configs import config, shape_class
from ._products import inverse_norms, products, project, unit_rows
from ._scores import bounds, finish, merge, statistics, weights

_MATH = {torch.float32: tl.float32, torch.float64: tl.float64}
_ROWS, _DEPTH = 16, 64  # tile of the kernels that process rows alone
FUSED = {"enable_fp_fusion": True}  # Triton's default changes with 3.10


def up(size: int, step: int) -> int:
    """`size` rounded up to whole steps."""
    return -(-size // step) * step


def full_ranges(start: Tensor | None, end: Tensor | None, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """Both ends of the rows' ranges if either is given."""
    if start is None and end is not None:
        start = torch.zeros_like(end)
    if end is None and start is not None:
        end = torch.full_like(start, keys)
    return (None, None) if start is None or end is None else (start.contiguous(), end.contiguous())


@dataclass(frozen=True)
class Side:
    """One softmax's share of the gradient, one number per row: the loss, and what the kernel `weights` reads."""

    loss: Tensor
    reference: Tensor | None
    factor: Tensor | None
    own: Tensor | None
    tau_part: Tensor | None


class Pairs:
    """Rows x [N, D] against keys y [M, D], N and M at least 1.

    Args:
        tau: 0-dim temperature.
        target: int64 [N], the positive of each row, -100 to ignore it; or None with `labels`.
        start, end: int32 [N] or None: ranges of candidates.
        x_token, y_token: [N], [M] or None: keys with the row's token are not candidates, nor are keys marked -1.
        labels: int32 [N]: rows and keys are the same, and a row's positives are the keys with its label.
        columns: softmax over columns as well; N = M, and a key's positive is the row whose target it is.
    """

    def __init__(self, x: Tensor, y: Tensor, tau: Tensor, normalize: bool, *, target: Tensor | None = None,
                 start: Tensor | None = None, end: Tensor | None = None, x_token: Tensor | None = None,
                 y_token: Tensor | None = None, labels: Tensor | None = None,
                 columns: bool = False) -> None:  # fmt: skip
        same = x is y
        self.x = x.contiguous()
        self.y = self.x if same else y.contiguous()
        (self.n, self.width), self.m = x.shape, y.shape[0]
        self.tau, self.normalize, self.labels, self.columns = tau, normalize, labels, columns
        self.dtype = loss_dtype(x.dtype)
        self.config = config(chip(), x.dtype, shape_class(self.width))
        # Weights are at most 2 and may be tiny: scale them into float16's range.
        self.scale = 2.0**14 if x.dtype == torch.float16 else 1.0
        self.target = None if target is None else target.contiguous()
        self.x_token = None if x_token is None else x_token.contiguous()
        self.y_token = None if y_token is None else y_token.contiguous()
        self.start, self.end = full_ranges(start, end, self.m)
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        if self.start is not None:
            self.low, self.high = self._bounds()
        self.x_inverse = self._inverse(self.x) if normalize else None
        self.y_inverse = self.x_inverse if same else self._inverse(self.y) if normalize else None

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.x.device)

    def _bounds(self) -> tuple[Tensor, Tensor]:
        tiles, rows = triton.cdiv(self.n, self.config.scores.rows), self.config.scores.rows
        low, high = self._new(tiles, dtype=torch.int32), self._new(tiles, dtype=torch.int32)
        bounds[(tiles,)](self.target, self.start, self.end, low, high, self.n, self.m, rows, **FUSED)
        return low, high

    def _inverse(self, x: Tensor) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float32 else self.dtype
        inverse = self._new(x.shape[0], dtype=dtype)
        inverse_norms[(triton.cdiv(x.shape[0], _ROWS),)](x, inverse, x.shape[0], self.width, _ROWS, _DEPTH,
                                                         _MATH[dtype])  # fmt: skip
        return inverse

    def _inputs(self) -> tuple[Any, ...]:
        return (self.x, self.y, self.x_inverse, self.y_inverse, self.tau, self.target, self.start, self.end,
                self.x_token, self.y_token, self.labels, self.low, self.high)  # fmt: skip

    def options(self) -> dict[str, Any]:
        tile = self.config.scores
        return {"NORMALIZE": self.normalize, "TARGETS": self.target is not None, "RANGES": self.start is not None,
                "TOKENS": 0 if self.y_token is None else 1 if self.x_token is None else 2,
                "LABELS": self.labels is not None, "COLUMNS": self.columns, "BM": tile.rows, "BN": tile.cols,
                "BK": tile.depth, "GROUP": tile.group, "EVEN": self.width % tile.depth == 0,
                "PRECISION": self.config.precision, "ACC": _MATH[self.dtype], "num_warps": tile.warps,
                "num_stages": tile.stages}  # fmt: skip

    def _panels(self, panel: tuple[int, int]) -> tuple[int, int]:
        tile = self.config.scores
        return min(up(panel[0], tile.rows), up(self.n, tile.rows)), min(up(panel[1], tile.cols), up(self.m, tile.cols))

    def state(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Statistics of the rows [3 or 4, N], of the columns [3, M], and the positives' scores [N]."""
        tile, math, ranges = self.config.scores, _MATH[self.dtype], self.start is not None
        planes = 4 if self.labels is not None else 3
        most_rows, most_keys = self._panels(self.config.statistics_panel)
        row_part = self._new(planes * most_rows * (most_keys // tile.cols))
        col_part = self._new(3 * most_keys * (most_rows // tile.rows)) if self.columns else None
        rows_state, cols_state = self._new(planes, self.n), self._new(3, self.m) if self.columns else None
        own_score = self._new(self.n) if self.target is not None else None
        for row0 in range(0, self.n, most_rows):
            panel_rows = min(most_rows, up(self.n - row0, tile.rows))
            row_tiles = panel_rows // tile.rows
            for col0 in range(0, self.m, most_keys):
                panel_keys = min(most_keys, up(self.m - col0, tile.cols))
                col_tiles = panel_keys // tile.cols
                statistics[(row_tiles * col_tiles,)](
                    *self._inputs(), row_part, col_part, own_score, row0, col0, row_tiles, col_tiles, self.n, self.m,
                    self.width, **self.options(),
                )  # fmt: skip
                merge[(row_tiles,)](row_part, rows_state, self.low, self.high, row0, panel_rows, col_tiles, col0,
                                    panel_rows, self.n, col0 == 0, ranges, planes == 4, tile.rows, tile.cols,
                                    math, **FUSED)  # fmt: skip
                if self.columns:
                    merge[(col_tiles,)](col_part, cols_state, None, None, col0, panel_keys, row_tiles, row0,
                                        panel_keys, self.m, row0 == 0, False, False, tile.cols, tile.rows,
                                        math, **FUSED)  # fmt: skip
        return rows_state, cols_state, own_score

    def side(self, state: Tensor, own_score: Tensor | None, weight: Tensor | None, peak: Tensor | None,
             count: Tensor | None = None) -> Side:  # fmt: skip
        """Losses from statistics and, with `weight` [N] (at most `peak`), the share of the gradient."""
        n = state.shape[1]
        loss = self._new(n)
        made = [self._new(n) if weight is not None else None for _ in range(4)]
        finish[(triton.cdiv(n, 128),)](state, own_score, self.target, count, weight, peak, self.tau, loss, *made, n,
                                       self.m, self.scale, self.labels is not None, weight is not None,
                                       128, **FUSED)  # fmt: skip
        return Side(loss, *made)

    def gradients(self, row: Side, column: Side | None, peak: Tensor, x_grad: bool,
                  y_grad: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Gradients of the weighted losses with respect to x and y, empty if unwanted. `column`: a score's other softmax."""
        empty = self.x.new_empty(0)
        if not (x_grad or y_grad):
            return empty, empty.clone()
        tile, product, math = self.config.scores, self.config.products, _MATH[self.dtype]
        most_rows, most_keys = self._panels(self.config.panel)
        width = up(self.width, product.cols)
        w = self._new(most_rows * most_keys, dtype=self.x.dtype)
        x_unit = self._new(most_rows, width, dtype=self.x.dtype) if y_grad else None
        y_unit = self._new(most_keys, width, dtype=self.x.dtype) if x_grad else None
        x_sum = torch.zeros(up(self.n, tile.rows), width, dtype=self.dtype, device=self.x.device) if x_grad else None
        y_sum = self._new(most_keys, width) if y_grad else None
        x_out = torch.empty_like(self.x) if x_grad else empty
        y_out = torch.empty_like(self.y) if y_grad else empty.clone()
        options = {**self.options(), "COLUMNS": column is not None}
        other = (None,) * 3 if column is None else (column.reference, column.factor, column.own)
        strips = width // product.cols
        for col0 in range(0, self.m, most_keys):
            col_tiles = min(most_keys, up(self.m - col0, tile.cols)) // tile.cols
            if x_grad:
                self._unit(self.y, self.y_inverse, y_unit, col0, col_tiles * tile.cols)
            if y_sum is not None:
                y_sum.zero_()
            for row0 in range(0, self.n, most_rows):
                row_tiles = min(most_rows, up(self.n - row0, tile.rows)) // tile.rows
                weights[(row_tiles * col_tiles,)](
                    *self._inputs(), row.reference, row.factor, row.own, *other, w, row0, col0, row_tiles, col_tiles,
                    self.n, self.m, self.width, **options,
                )  # fmt: skip
                if y_grad and (col0 == 0 or most_rows < self.n):
                    self._unit(self.x, self.x_inverse, x_unit, row0, row_tiles * tile.rows)
                products[(strips * (row_tiles * x_grad + col_tiles * y_grad),)](
                    w, x_unit, y_unit, x_sum, y_sum, self.low, self.high, row0, col0, row_tiles, col_tiles, width,
                    x_grad, y_grad, self.start is not None, tile.rows, tile.cols, product.cols, product.depth,
                    triton.next_power_of_2(most_rows // tile.rows), self.config.precision, math,
                    num_warps=product.warps, num_stages=product.stages, **FUSED,
                )  # fmt: skip
            if y_grad:
                self._project(y_sum, self.y, self.y_inverse, y_out, peak, col0)
        if x_grad:
            self._project(x_sum, self.x, self.x_inverse, x_out, peak, 0)
        return x_out, y_out

    def _unit(self, x: Tensor, inverse: Tensor | None, out: Any, first: int, panel: int) -> None:
        width, depth = out.shape[1], self.config.products.cols
        unit_rows[(triton.cdiv(panel, _ROWS), width // depth)](
            x, inverse, out, first, x.shape[0], self.width, width, self.normalize, _ROWS, depth,
            _MATH[self.dtype], **FUSED,
        )  # fmt: skip

    def _project(self, total: Any, x: Tensor, inverse: Tensor | None, out: Tensor, peak: Tensor, first: int) -> None:
        rows = min(total.shape[0], x.shape[0] - first)
        project[(triton.cdiv(rows, _ROWS),)](
            total, x, inverse, out, peak, self.tau, first, x.shape[0], self.width, total.shape[1], self.scale,
            self.normalize, _ROWS, _DEPTH, _MATH[self.dtype], **FUSED,
        )  # fmt: skip


def peak_of(weight: Tensor) -> Tensor:
    """The largest |weight|, or 1 if all are 0: weights are stored as shares of it."""
    peak = weight.abs().amax()
    return torch.where(peak > 0, peak, torch.ones_like(peak))
