"""Which kernel runs: `auto` (the default), or one named backend.

    reference   plain PyTorch, any device
    cpp         C++ kernels, CPU tensors
    cuda        CUDA C++ kernels, CUDA tensors
    triton      Triton kernels, GPU tensors

The choice, in order of precedence: the function's `backend=` argument, `use_backend(...)`, the environment variable
`CMLM_FAST_BACKEND`, and the table CHOICES below. A named backend is used or raises; it never falls back.
The exceptions are kernels that replace a PyTorch function (`replacement_op`): without one, that function runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from ._library import contracts, load_errors, native_kernels, op, registered

BACKENDS = ("reference", "cpp", "cuda", "triton")

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_FLOATING = (*_SIXTEEN_BITS, torch.float32, torch.float64)
#: Widest head row in bytes: twice as many would cost Triton's attention 130 KB of shared memory, more than some chips have.
WIDEST_ROW = 512


@dataclass(frozen=True)
class Rule:
    """One line of CHOICES.

    Attributes:
        order: backends; the first one available for the op runs.
        op: the op it applies to; None: any.
        dtypes: those of the rows, or ids; (): any.
        min_size: smallest size it applies to: scores (N·M; B² for info_nce), tokens (mask) or bytes of a head's row
            (attention); needs `op` and `dtypes`.
    """

    order: tuple[str, ...]
    op: str | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    min_size: int = 0


#: What `auto` picks, by device type; the first matching rule applies. On the CPU it follows benchmarks/results/cpu.json: the
#: C++ kernels beat the reference on every row of the ops that have them. On a GPU it follows measurements on an H100
#: (docs/tuning.md): the CUDA contrasts are faster at every size and take less host time; the Triton masks are faster where
#: their extra 0.1 ms of host time is hidden. token_similarity was not measured there: Triton writes its matrix once, not in
#: two passes.
CHOICES: dict[str, tuple[Rule, ...]] = {
    "cpu": (Rule(("cpp", "reference")),),
    "cuda": (
        Rule(("triton", "cuda", "reference"), "token_similarity", _SIXTEEN_BITS),
        Rule(("triton", "cuda", "reference"), "complementary_mask", (torch.int64,), min_size=2**23),
        Rule(("reference",), "varlen_attention", _FLOATING, min_size=WIDEST_ROW + 1),
        Rule(("cuda", "triton", "reference")),
    ),
}

_SUFFIX = {"reference": "_reference", "cpp": "", "cuda": "", "triton": "_triton"}
_DISPATCH_KEY = {"cpp": ("cpu", "CPU", "_C"), "cuda": ("cuda", "CUDA", "_C_cuda")}


def _from_environment() -> str | None:
    name = os.environ.get("CMLM_FAST_BACKEND", "auto")
    return None if name in ("", "auto") else name


#: Earlier results of `resolve`, so that a call costs two look-ups.
_resolved: dict[tuple[str, torch.device, str | None, torch.dtype | None, int], Any] = {}


def _find_changes() -> dict[tuple[str, str, torch.dtype | None], tuple[int, ...]]:
    found: dict[tuple[str, str, torch.dtype | None], tuple[int, ...]] = {}
    for device_type, rules in CHOICES.items():
        for rule in rules:
            for dtype in rule.dtypes if rule.op and rule.min_size else ():
                key = (device_type, rule.op or "", dtype)
                found[key] = tuple(sorted((*found.get(key, ()), rule.min_size)))
    return found


#: Sizes at which the choice changes, if it does: (device type, op, dtype) → ascending sizes.
_changes = _find_changes()

_current: str | None = _from_environment()
_blocks: list[list[str | None]] = [[_current]]  # requests of the open use_backend blocks


def available(name: str, device: str | torch.device = "cpu") -> dict[str, str | None]:
    """Each backend of op `name` on `device`, mapped to None if it can run, else to the reason why it cannot.

    Raises:
        ValueError: there is no such op.

    >>> available("token_contrastive", "cpu")["reference"] is None
    True
    """
    if name not in contracts:
        raise ValueError(f"cmlm_fast.backends: expected op to be one of {', '.join(sorted(contracts))}, got {name!r}")
    return {backend: _why_unavailable(name, torch.device(device), backend) for backend in BACKENDS}


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _why_unavailable(name: str, on: torch.device, backend: str) -> str | None:
    if backend == "reference":
        return None
    if backend == "triton":
        if name + "_triton" not in registered:
            return "this op has no Triton kernel"
        if not _has_triton():
            return "the package triton is not installed"
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        if on.type == "cuda":
            return _other_device("Triton", ("80",), on) if torch.cuda.is_available() else "PyTorch sees no GPU"
        return f"Triton kernels run on GPU tensors, not on {on.type} (or interpreted, with TRITON_INTERPRET=1)"
    device, key, library = _DISPATCH_KEY[backend]
    if library in load_errors:
        return load_errors[library]
    if on.type != device:
        return f"{backend} kernels run on {device} tensors, not on {on.type}"
    if (name, key) not in native_kernels:
        return f"this op has no {backend} kernel"
    return _other_device("CUDA", _built_for(), on) if backend == "cuda" else None


# For torch.compile, which cannot trace build_info and need not: torch.compiler.assume_constant_result sets the same, but
# imports all of torch._dynamo.
_why_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _other_device(kernels: str, archs: Sequence[str], on: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return None
    have = torch.cuda.get_device_capability(on)  # a machine may have GPUs of several kinds
    if any(runs_on(arch, have) for arch in archs):
        return None
    return f"{kernels} kernels are built for {', '.join(archs)}, not for compute capability {have[0]}.{have[1]}"


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for `arch` (CMake's name) runs on a GPU: "80-real" on 8.0 and 8.6, "80" on all newer ones as well.

    >>> runs_on("80-real", (8, 6)), runs_on("90a-real", (8, 0)), runs_on("80", (12, 0))
    (True, False, True)
    """
    digits = re.match(r"\d+", arch)
    if digits is None:  # "native", say: built on this machine
        return True
    major, minor = divmod(int(digits[0]), 10)
    if arch[digits.end() :].startswith("a"):  # for that chip alone
        return (major, minor) == capability
    return (major, minor) <= capability and (major == capability[0] or not arch.endswith("-real"))


def _built_for() -> tuple[str, ...]:
    try:
        from ._build import build_info
    except ImportError:  # built without Python's headers: assume this machine's GPU
        return ("native",)
    return tuple(build_info()["cuda_archs"])


def resolve(
    name: str, device: torch.device, backend: str | None = None, dtype: torch.dtype | None = None, size: int = 0
) -> Any:
    """The torch op that runs op `name` on `device`: that of `backend`, or of the current choice for `dtype` and `size`."""
    choice = _current if backend is None else backend
    band = 0
    for min_size in _changes.get((device.type, name, dtype), ()):  # torch.compile guards on sizes here alone
        if size >= min_size:
            band = min_size
    key = (name, device, choice, dtype, band)
    if torch.compiler.is_compiling():  # a change to `_resolved` would trigger recompilation
        return _resolve(*key)
    found = _resolved.get(key)
    if found is None:
        _resolved[key] = found = _resolve(*key)
    return found


def named_backend() -> str | None:
    """The backend that `use_backend` or CMLM_FAST_BACKEND names; None for the automatic choice."""
    return _current


def replacement_op(name: str, device: torch.device) -> Any:
    """The torch op that runs in place of a PyTorch function; None if that function itself is to run.

    That is so on devices without a kernel for this op, under a named backend that has none, and, except on the CPU, under
    `reference`: PyTorch's function is plain PyTorch.
    """
    choice = _current or {"cpu": "cpp", "cuda": "triton"}.get(device.type, "reference")
    _check_name(name, choice)
    if choice == "reference" and device.type != "cpu":
        return None
    return None if _why_unavailable(name, device, choice) is not None else op(name, _SUFFIX[choice])


def preference(name: str, device_type: str, dtype: torch.dtype | None = None, size: int = 0) -> tuple[str, ...]:
    """The order in which CHOICES would try backends."""
    for rule in CHOICES.get(device_type, ()):
        if rule.op in (None, name) and (not rule.dtypes or dtype in rule.dtypes) and size >= rule.min_size:
            return rule.order
    return ("reference",)


def _resolve(name: str, device: torch.device, asked: str | None, dtype: torch.dtype | None, band: int) -> Any:
    choice = asked
    if choice is None or choice == "auto":
        order = preference(name, device.type, dtype, band)
        choice = next(backend for backend in order if _why_unavailable(name, device, backend) is None)
    _check_name(name, choice)
    reason = _why_unavailable(name, device, choice)
    if reason is not None:
        raise RuntimeError(f"cmlm_fast::{name}: expected backend to be available, got {choice!r}: {reason}")
    return op(name, _SUFFIX[choice])


def _check_name(name: str, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"cmlm_fast::{name}: expected backend to be auto or one of {', '.join(BACKENDS)}, got {backend!r}")


def check_backend(backend: str | None, ops: Sequence[str] = (), device: str | torch.device = "cpu") -> None:
    """Raise ValueError if there is no such backend, or it cannot run one of `ops` on `device`."""
    if backend not in (None, "auto", *BACKENDS):
        expected = f"auto or one of {', '.join(BACKENDS)}"
        raise ValueError(f"cmlm_fast.use_backend: expected backend to be {expected}, got {backend!r}")
    for name in ops if backend in BACKENDS else ():
        if absence := available(name, device)[str(backend)]:
            raise ValueError(f"cmlm_fast.use_backend: expected backend to be one that runs here, got {backend!r}: {absence}")


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Run the ops of a block with one backend (`None` or "auto" restores the automatic choice), in all threads of the process.

    Raises:
        ValueError: there is no such backend.

    >>> with use_backend("reference"):
    ...     pass  # every op in here runs its PyTorch reference
    """
    global _current
    check_backend(backend)
    mine = [None if backend == "auto" else backend]  # a list, so that each block has its own object
    _blocks.append(mine)
    _current = mine[0]
    try:
        yield
    finally:  # blocks of several threads may end in any order
        _blocks[:] = [block for block in _blocks if block is not mine]
        _current = _blocks[-1][0]
