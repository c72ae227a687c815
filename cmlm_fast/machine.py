"""Capabilities of this machine: bfloat16, backends, processes."""

from __future__ import annotations

import os

import torch

from .backends import check_backend, named_backend


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
    """Raise ValueError if a backend (None: the current choice) lacks an op that training runs on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_backend(backend or named_backend(), ("complementary_mask", "token_contrastive", "info_nce"), device)


def processes_for(texts: int) -> int | None:
    """Processes for tokenising: up to one per core if there is enough work; None for this one alone."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = min(here, texts // 20_000)
    return wanted if wanted > 1 else None
