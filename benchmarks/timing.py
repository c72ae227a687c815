"""Honest timing: providers interleaved in one run, medians, ceilings measured beside them, peak memory of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def interleaved(providers: dict[str, Callable[[], Any]], seconds: float = 2.0, least: int = 7) -> dict[str, float]:
    """Median seconds of one call of each provider. Round by round each runs once, so that drift hits all alike."""
    for call in providers.values():
        for _ in range(3):
            call()
    once = {name: _clock(call, 1) for name, call in providers.items()}
    # Short calls are timed in batches of about five milliseconds: long enough for the clock, and for caches that the
    # provider before has emptied.
    batch = {name: max(1, round(5e-3 / max(t, 1e-9))) for name, t in once.items()}
    samples: dict[str, list[float]] = {name: [] for name in providers}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(samples.values()))) < least:
        for name, call in providers.items():
            samples[name].append(_clock(call, batch[name]))
    return {name: statistics.median(values) for name, values in samples.items()}


def _clock(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def peak_memory(call: Callable[[], Any]) -> int:
    """Most bytes that PyTorch's CPU allocator held during `call`, beyond those held before it."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
