"""Shared by the contrastive ops: unit vectors, candidates, argument checks, row weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .._library import expect, expect_values, is_number, is_traced, is_transformed

IGNORE = -100
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of losses, sums and exponentials: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_rows(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Rows of `x` in the accumulation dtype, divided by max(‖x‖, 1e-12) if `normalize`; and that divisor."""
    x = x.to(loss_dtype(x.dtype))
    if not normalize:
        return x, None
    norm = x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return x / norm, norm


def through_unit_rows(grad: Tensor, unit: Tensor, norm: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Backward pass of `unit_rows`: from the gradient of the unit vectors to that of the rows, in the rows' dtype."""
    if norm is not None:
        grad = (grad - unit * (grad * unit).sum(-1, keepdim=True)) / norm
    return grad.to(dtype)


def scaled(rows: Tensor, factor: Tensor) -> Tensor:
    """rows · factor, a scalar, rounded once.

    PyTorch would first round a scalar tensor to the dtype of 16-bit rows (on the CPU, only if the scalar comes first). On the
    CPU a factor of 1, as in `loss.backward()`, costs no pass over the rows.
    """
    on_cpu = rows.device.type == "cpu"
    if on_cpu and not is_transformed(factor) and _is_last_one(factor):
        return rows
    if rows.dtype == factor.dtype or on_cpu:
        return rows * factor
    # is_grads_batched does not support `out`, and dynamo not this question.
    if not is_traced() and torch._C._functorch.is_legacy_batchedtensor(factor):
        return (rows * factor.reshape(1)).to(rows.dtype)
    return torch.mul(rows, factor.reshape(1), out=torch.empty_like(rows))


def _is_last_one(factor: Tensor) -> bool:
    """Whether `factor` is 1 and the graph that holds the rows is not kept: else their receiver could alter its next result."""
    kept = torch._C._autograd._get_current_graph_task_keep_graph()
    return not kept and not torch._C._functorch.is_legacy_batchedtensor(factor) and factor.item() == 1.0


def candidates(query: Tensor, key: Tensor, target: Tensor | None, key_start: Tensor | None, key_end: Tensor | None,
               query_token: Tensor | None, key_token: Tensor | None) -> Tensor:  # fmt: skip
    """Bool [N, M]: whether key j is a candidate of row i. The target always is."""
    column = torch.arange(key.shape[0], device=key.device)
    mask = torch.ones(query.shape[0], key.shape[0], dtype=torch.bool, device=key.device)
    if key_start is not None:
        mask &= column >= key_start[:, None]
    if key_end is not None:
        mask &= column < key_end[:, None]
    if key_token is not None:
        mask &= key_token != -1
        if query_token is not None:
            mask &= key_token != query_token[:, None]
    if target is not None:
        mask |= column == target[:, None]
    return mask


def as_temperature(op: str, temperature: float | Tensor, rows: Tensor) -> Tensor:
    """`temperature` as the 0-dim tensor that the raw ops take; a number is checked here, a tensor by the kernel."""
    dtype = loss_dtype(rows.dtype)
    if not isinstance(temperature, Tensor):
        number = is_number(temperature) and 0.0 < temperature < float("inf")
        expect(op, number, "temperature", "a number, finite and > 0, or a tensor", temperature)
        least = torch.finfo(dtype).tiny  # below this, the inverse may overflow
        expect(op, temperature >= least, "temperature", f"a number >= {least:.2g}", temperature)
        most = torch.finfo(dtype).max
        expect(op, temperature <= most, "temperature", f"a number <= {most:.2g}", temperature)
        return torch.full((), temperature, dtype=dtype, device=rows.device)
    expect(op, temperature.numel() == 1, "temperature", "a number or a tensor of one element", list(temperature.shape))
    expect(op, rows.is_meta or not temperature.is_meta, "temperature", f"on {rows.device} like the rows", temperature.device)
    expect(op, not temperature.is_complex(), "temperature", "a real number", temperature.dtype)
    _no_tangent(op, "temperature", temperature)
    return temperature.reshape(()).to(device=rows.device, dtype=dtype)


def check_temperature(op: str, temperature: Tensor) -> None:
    """Check a temperature tensor's value."""
    value = float(temperature)
    expect_values(op, 0.0 < value < float("inf"), "temperature", "finite and > 0", value)


def check_rows(op: str, first: str, a: Tensor, second: str, b: Tensor, temperature: Tensor) -> None:
    """Check two matrices of vectors and the temperature."""
    expect(op, a.dim() == 2, first, "of shape [rows, D]", list(a.shape))
    expect(op, b.dim() == 2 and b.shape[1] == a.shape[1], second, f"of shape [rows, D = {a.shape[1]}]", list(b.shape))
    expect(op, a.shape[1] >= 1, first, "of D >= 1", list(a.shape))
    expect(op, a.dtype in FLOATING, first, "float32, bfloat16, float16 or float64", a.dtype)
    expect(op, b.dtype == a.dtype, second, f"{a.dtype} like {first}", b.dtype)
    expect(op, b.device == a.device, second, f"on {a.device} like {first}", b.device)
    scalar = temperature.dim() == 0 and temperature.dtype == loss_dtype(a.dtype) and temperature.device == a.device
    expect(op, scalar, "temperature", f"a 0-dim {loss_dtype(a.dtype)} tensor on {a.device}",
           f"{temperature.dtype} {list(temperature.shape)} on {temperature.device}")  # fmt: skip


def check_vector(op: str, name: str, tensor: Tensor | None, length: int, dtypes: tuple[torch.dtype, ...],
                 device: torch.device) -> None:  # fmt: skip
    """Check an optional vector with one entry per row or key."""
    if tensor is None:
        return
    expect(op, isinstance(tensor, Tensor), name, "a tensor", type(tensor).__name__)
    # Format a list: torch.compile makes constants of numbers formatted into a string, and recompiles for other values.
    expect(op, tensor.shape == (length,), name, f"of shape {[length]}", list(tensor.shape))
    expect(op, tensor.dtype in dtypes, name, " or ".join(str(dtype) for dtype in dtypes), tensor.dtype)
    expect(op, tensor.device == device, name, f"on {device}", tensor.device)


def check_reduction(op: str, reduction: str) -> None:
    """Check `reduction`."""
    expect(op, reduction in ("none", "mean", "sum"), "reduction", "'mean', 'sum' or 'none'", repr(reduction))


def gradients_in_forward(dtype: torch.dtype) -> bool:
    """Whether the forward pass computes the gradients, for an upstream gradient of 1.

    float16 computes them in the backward pass, scaled: small values would be lost before the loss scale is applied.
    """
    return dtype != torch.float16


def reduction_weight(valid: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """Weight [rows] of each row's loss: 1, or 1/count for the mean; 0 for rows that do not count."""
    weight = valid.to(dtype)
    return weight / valid.sum().clamp_min(1) if reduction == "mean" else weight


def fake_gradients(query: Tensor, key: Tensor, temperature: Tensor, query_grad: bool, key_grad: bool) -> tuple[Tensor, ...]:
    """Gradients of either loss; one that is not requested is empty."""
    dq = query.new_empty(query.shape if query_grad else 0)
    dk = key.new_empty(key.shape if key_grad else 0)
    return dq, dk, torch.empty_like(temperature)


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast is on; also takes meta tensors, whose device does not support it."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _no_tangent(op: str, name: str, given: Tensor) -> None:
    if unpack_dual(given).tangent is not None:  # its derivative would be lost
        rule = "without a tangent (there is no forward mode)"
        raise NotImplementedError(f"cmlm_fast::{op}: expected {name} to be {rule}, got one")


def autocast_rows(op: str, **rows: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, cast rows to its dtype, as `matmul` does (float64 stays); losses are float32 regardless."""
    for name, given in rows.items():
        expect(op, isinstance(given, Tensor), name, "a tensor", type(given).__name__)
        expect(op, given.layout is torch.strided, name, "a dense tensor", given.layout)
        _no_tangent(op, name, given)
    tensors = tuple(rows.values())
    device_type = tensors[0].device.type
    if not autocast_is_on(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def random_rows(shapes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device, seed: int) -> Iterator[Any]:
    """Gaussian matrices for the samples."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes)
