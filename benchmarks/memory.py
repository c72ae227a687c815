"""Memory that a call takes beyond what was held before it, and memory that is free."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def free_bytes(device: torch.device) -> int:
    """Bytes available now on the device; 4 GiB on a CPU system that does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+)", info.read_text()) if info.exists() else None
    return int(found[1]) * 1024 if found else 4 * 1024**3


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Peak bytes that `call` held beyond what was held before it, its results included.

    On CUDA, what PyTorch's allocator counts. On Linux, the peak of the resident set, which includes allocations of libraries
    that bypass PyTorch; for short calls, the smaller of two peaks, since caches only ever add. Elsewhere, None.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not _CLEAR.exists():
        return None
    start = time.perf_counter()
    peak = _resident_peak(call)
    return peak if time.perf_counter() - start > 0.5 else min(peak, _resident_peak(call))


def _resident_peak(call: Callable[[], Any]) -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # returns freed memory to the system, so that the call touches it anew
    _CLEAR.write_text("5")  # resets the peak
    before = _status("VmRSS")
    call()
    return max(_status("VmHWM") - before, 0)


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())
    return int(found[1]) * 1024 if found else 0
