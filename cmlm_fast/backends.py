"""Which kernel runs: `auto` (the default), or one named backend.

    reference   plain PyTorch, any device
    cpp         C++ kernels, CPU tensors
    cuda        CUDA C++ kernels, CUDA tensors
    triton      Triton kernels, GPU tensors

The choice, strongest first: the function's `backend=` argument, `use_backend(...)`, the environment variable
`CMLM_FAST_BACKEND`, and the preference below. A named backend is used or raises; it never falls back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from ._library import contracts, load_errors, native_kernels, op, registered

BACKENDS = ("reference", "cpp", "cuda", "triton")

#: What `auto` prefers, by device type, and for an op whose calls are large by (device type, op); the first that is available
#: runs. Large score matrices want each chip's own matrix instructions, which Triton's compiler chooses; by design, not yet
#: by measurement.
PREFERENCE: dict[str | tuple[str, str], tuple[str, ...]] = {
    "cpu": ("cpp", "reference"),
    "cuda": ("cuda", "triton", "reference"),
    ("cuda", "token_contrastive"): ("triton", "cuda", "reference"),
    ("cuda", "token_similarity"): ("triton", "cuda", "reference"),
    ("cuda", "info_nce"): ("triton", "cuda", "reference"),
}

#: Scores from which on a call is large.
LARGE = 2**24

_SUFFIX = {"reference": "_reference", "cpp": "", "cuda": "", "triton": "_triton"}
_DISPATCH_KEY = {"cpp": ("cpu", "CPU", "_C"), "cuda": ("cuda", "CUDA", "_C_cuda")}


def _from_environment() -> str | None:
    name = os.environ.get("CMLM_FAST_BACKEND", "auto")
    return None if name in ("", "auto") else name


#: What `resolve` found before, so that a call costs one look-up.
_resolved: dict[tuple[str, str, str | None, bool], Any] = {}

_current: str | None = _from_environment()


def available(name: str, device: str | torch.device = "cpu") -> dict[str, str | None]:
    """Each backend of op `name` on `device`: None where it can run, else the reason why it cannot.

    >>> available("token_contrastive", "cpu")["reference"] is None
    True
    """
    if name not in contracts:
        raise ValueError(f"cmlm_fast.backends: expected op to be one of {sorted(contracts)}, got {name!r}")
    device_type = torch.device(device).type
    return {backend: _absence(name, device_type, backend) for backend in BACKENDS}


def _absence(name: str, device_type: str, backend: str) -> str | None:
    if backend == "reference":
        return None
    if backend == "triton":
        if name + "_triton" not in registered:
            return "this op has no Triton kernel"
        if find_spec("triton") is None:
            return "the package triton is not installed"
        if device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"Triton kernels run on GPU tensors, not on {device_type} (or interpreted, with TRITON_INTERPRET=1)"
    device, key, library = _DISPATCH_KEY[backend]
    if device_type != device:
        return f"{backend} kernels run on {device} tensors, not on {device_type}"
    if library in load_errors:
        return load_errors[library]
    if (name, key) not in native_kernels:
        return f"this op has no {backend} kernel"
    return None


def resolve(name: str, device: torch.device, backend: str | None = None, size: int = 0) -> Any:
    """The torch op that runs op `name` on `device`: of `backend`, or of the current choice for a call of `size` scores."""
    choice = _current if backend is None else backend
    large = (device.type, name) in PREFERENCE and size >= LARGE  # asked in this order: compiled, sizes are guarded on
    found = _resolved.get((name, device.type, choice, large))
    return _resolve(name, device.type, choice, large) if found is None else found


def _resolve(name: str, device_type: str, asked: str | None, large: bool) -> Any:
    choice = asked
    if choice is None or choice == "auto":
        preference = PREFERENCE[device_type, name] if large else PREFERENCE.get(device_type, ("reference",))
        choice = next(backend for backend in preference if _absence(name, device_type, backend) is None)
    elif choice not in BACKENDS:
        raise ValueError(f"cmlm_fast::{name}: expected backend to be auto or one of {', '.join(BACKENDS)}, got {choice!r}")
    reason = _absence(name, device_type, choice)
    if reason is not None:
        raise RuntimeError(f"cmlm_fast::{name}: expected backend to be available, got {choice!r}: {reason}")
    _resolved[name, device_type, asked, large] = found = op(name, _SUFFIX[choice])
    return found


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Run the ops of a block with one backend (`None` or "auto" restores the automatic choice).

    >>> with use_backend("reference"):
    ...     pass  # every op in here runs its PyTorch reference
    """
    global _current
    if backend not in (None, "auto", *BACKENDS):
        expected = f"auto or one of {', '.join(BACKENDS)}"
        raise ValueError(f"cmlm_fast.use_backend: expected backend to be {expected}, got {backend!r}")
    before, _current = _current, (None if backend == "auto" else backend)
    try:
        yield
    finally:
        _current = before
