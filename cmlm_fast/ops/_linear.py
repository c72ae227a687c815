"""x · weightᵀ + bias with the faster library: PyTorch's choice, or oneDNN where MKL leaves the widest vectors unused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import is_transformed, no_second_derivative


@cache
def onednn_is_faster() -> bool:
    """True on non-Intel x86 CPUs with AVX-512: MKL runs AVX2 code there, oneDNN AVX-512 (2.2 times as fast on a Zen 5)."""
    cpu = Path("/proc/cpuinfo")
    other = cpu.exists() and "vendor_id" in (text := cpu.read_text()) and "GenuineIntel" not in text
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # Inductor's op, not public
    return other and there and torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] · weight [M, K]ᵀ + bias [M], without autograd; any strides."""
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.dim() >= 2 and x.numel() > 0
    if not plain or torch.is_autocast_enabled("cpu") or not onednn_is_faster():
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.contiguous()  # oneDNN assumes that it is
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        no_second_derivative("linear")
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias = ctx.needs_input_grad
        rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)
        of_x = product(rows, weight.T).view(x.shape) if by_x else None
        if by_weight and rows.numel():  # reads both operands in their own layout; a plain product would transpose them first
            operands = rows.to_mkldnn(), inputs.to_mkldnn()
            of_weight, of_bias = torch.ops.aten.mkldnn_linear_backward_weights(*operands, weight, by_bias)
            return of_x, of_weight, of_bias if by_bias else None
        return of_x, product(rows.T, inputs.T) if by_weight else None, rows.sum(0) if by_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Equivalent to `F.linear`."""
    own = x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() >= 2 and not is_transformed(x, weight, bias)
    fits = bias is None or (bias.dtype, bias.shape) == (x.dtype, weight.shape[:1])
    own = own and fits and x.shape[-1] == weight.shape[1] > 0
    if not own or torch.is_autocast_enabled("cpu") or not onednn_is_faster():
        return F.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x, weight, bias)
    return out
