"""softmax_loss in Triton.

grid   one program per row of logits
loop   over the row twice, BLOCK numbers at a time: largest number and sum of exponentials, then the slopes
bytes  reads a row twice, the second time from L2, and writes one row
sums   float32 (float64 for float64), in block order; deterministic: a row has one writer
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._scores import IGNORE, loss_dtype
from ..ops.softmax_loss import _check, check_values
from . import interpreted, on_device

_BLOCK = 4096


@triton.jit
def row_loss(logits, target, losses, slopes, V, IGNORED: tl.constexpr, LOWEST: tl.constexpr, BLOCK: tl.constexpr,
             ACC: tl.constexpr):  # fmt: skip
    """losses [N], slopes [N, V] of logits [N, V]; both NaN where the target is not a column."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target + row)
    logits, slopes = logits + row * V, slopes + row * V
    largest, total = tl.full((), LOWEST, ACC), tl.zeros((), ACC)
    for begin in range(0, V, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < V, other=float("-inf")).to(ACC)
        raised = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - raised) + tl.sum(tl.exp(x - raised), 0)
        largest = raised
    log_total = tl.log(total)  # not largest + log: that would be rounded at a logit's magnitude
    valid, inside = label != IGNORED, (label >= 0) & (label < V)
    own = tl.load(logits + label, mask=inside, other=float("nan")).to(ACC)
    tl.store(losses + row, tl.where(valid, log_total + (largest - own), 0.0))
    for begin in range(0, V, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < V, other=float("-inf")).to(ACC)
        slope = tl.where(inside, tl.exp((x - largest) - log_total) - (at == label).to(ACC), float("nan"))
        tl.store(slopes + at, tl.where(valid, slope, 0.0).to(slopes.dtype.element_ty), mask=at < V)


@on_device
def softmax_loss(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The op: losses [N], slopes [N, V]."""
    _check(logits, target)
    if interpreted(logits):
        check_values(logits, target)
    logits = logits.contiguous()
    (rows, vocabulary), dtype = logits.shape, loss_dtype(logits.dtype)
    losses, slopes = logits.new_empty(rows, dtype=dtype), logits.new_empty(rows, vocabulary)
    if rows:
        block = min(_BLOCK, triton.next_power_of_2(vocabulary))
        row_loss[(rows,)](logits, target.contiguous(), losses, slopes, vocabulary, IGNORED=IGNORE,
                          LOWEST=torch.finfo(dtype).min, BLOCK=block, ACC=getattr(tl, str(dtype)[6:]), num_warps=8)  # fmt: skip
    return losses, slopes
