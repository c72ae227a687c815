"""Honest timing: each round samples every provider and the ceiling, so that drift hits all alike; results are quantiles.

On a CPU, short calls are timed in batches of about five milliseconds: long enough for the clock, and to refill caches that the
previous provider has emptied. On CUDA, each call is timed by its own events, and the L2 cache is overwritten before it.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from cmlm_fast.machine import bfloat16_hardware

Call = Callable[[], Any]
BATCH_SECONDS = 5e-3


def interleaved(
    calls: Mapping[str, Call], device: torch.device, seconds: float = 2.0, least: int = 5
) -> dict[str, list[float]]:
    """Seconds per call of each provider, one sample per round.

    Rounds go on for `seconds`, and for at least `least` rounds (3 if one takes longer than `seconds`). `repeats_of` warms each
    call.
    """
    repeats = {name: repeats_of(call, device) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names, end, order = list(calls), time.perf_counter() + seconds, random.Random(0)
    while time.perf_counter() < end or len(samples[names[0]]) < least:
        order.shuffle(names)  # so that none always follows the same neighbour
        start = time.perf_counter()
        for name in names:
            samples[name].append(sample(calls[name], repeats[name], device))
        if time.perf_counter() - start > seconds:
            least = min(least, 3)
    return samples


def repeats_of(call: Call, device: torch.device) -> int:
    """Number of calls in one sample. The first call warms up; if it is short, a second one is timed instead."""
    once = sample(call, 1, device)
    if once < 0.1:
        once = sample(call, 1, device)
    return max(1, round(BATCH_SECONDS / max(once, 1e-7)))


def sample(call: Call, repeats: int, device: torch.device) -> float:
    """Mean seconds of `repeats` calls."""
    if device.type == "cuda":
        return _cuda_sample(call, repeats, device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


@cache
def _flush(device: torch.device) -> torch.Tensor:
    """A buffer larger than any L2 cache."""
    return torch.empty(256 * 1024**2, dtype=torch.uint8, device=device)


def _cuda_sample(call: Call, repeats: int, device: torch.device) -> float:
    """Device time without that of the launch queue: events surround each call alone, and are read when all are done."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    with torch.cuda.device(device):
        for start, end in events:
            _flush(device).zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in events) / repeats * 1e-3


def ceilings(device: torch.device, seconds: float = 1.0) -> dict[str, float]:
    """The best that this device does: TFLOP/s of a matrix product in each dtype, GB/s read and written by a copy."""
    n = 1536 if device.type == "cpu" else 8192
    # If the CPU emulates bfloat16, a product this large takes seconds, at half the rate of one that fits in its cache.
    sizes = {"float32": n, "bfloat16": n if device.type != "cpu" or bfloat16_hardware() else n // 4}
    rows = {name: torch.randn(size, size, device=device).to(getattr(torch, name)) for name, size in sizes.items()}
    source = torch.ones(128 * 1024**2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {name: lambda x=x: x @ x for name, x in rows.items()}
    if device.type == "cpu":
        calls |= {f"oneDNN {name}": lambda x=x: onednn(x, x) for name, x in rows.items() if has_onednn(x.dtype)}
    calls["copy"] = lambda: target.copy_(source)
    for call in calls.values():
        call()
    best = {name: min(times) for name, times in interleaved(calls, device, seconds).items()}
    fastest = {name: min(best[name], best.get(f"oneDNN {name}", math.inf)) for name in sizes}
    return {f"{name} TFLOP/s": 2 * size**3 / fastest[name] / 1e12 for name, size in sizes.items()} | {
        "copy GB/s": 2 * source.numel() / best["copy"] / 1e9}  # fmt: skip


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether `onednn` multiplies matrices of this dtype here."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a bᵀ by oneDNN on a CPU, which may take half the time of PyTorch's own choice."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return product


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """(p20, p50, p80)."""
    values = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return tuple(values.tolist())  # type: ignore[return-value]
