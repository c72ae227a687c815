"""What this machine is good at: bfloat16, backends, processes."""

from __future__ import annotations

import os

import torch

from .backends import check_backend, chosen


def bfloat16_hardware() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX or AVX-512 BF16), so that autocast pays."""
    tests = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # absent from some torch builds
    return any(bool(getattr(torch.cpu, test, bool)()) for test in tests)


def fast_in_bf16() -> bool:
    """Whether this machine multiplies bfloat16 matrices in hardware."""
    if torch.accelerator.is_available():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
    return bfloat16_hardware()


def check_backend_here(backend: str | None) -> None:
    """Raise ValueError where a backend, or without one that which is chosen, does not run what a training runs here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_backend(backend or chosen(), ("complementary_mask", "token_contrastive", "info_nce"), device)


def processes_for(texts: int) -> int | None:
    """For tokenising: one a core where there is work for them, else this one."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = min(here, texts // 20_000)
    return wanted if wanted > 1 else None
