"""Which kernel runs: `auto` (the default), or one named backend.

    reference   plain PyTorch, any device
    cpp         C++ kernels, CPU tensors
    cuda        CUDA C++ kernels, CUDA tensors
    triton      Triton kernels, GPU tensors

The choice, strongest first: the function's `backend=` argument, `use_backend(...)`, the environment variable
`CMLM_FAST_BACKEND`, and the table CHOICES below. A named backend is used or raises; it never falls back.
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
#: Bytes of a head's row: twice as many would cost Triton's attention 130 KB of shared memory, more than some chips have.
WIDEST_ROW = 512


@dataclass(frozen=True)
class Rule:
    """One line of CHOICES.

    Attributes:
        order: backends; the first that is available for the op runs.
        op: the op it is about; None: any.
        dtypes: of the rows, or ids; (): any.
        least: calls of at least so many scores (N·M; B² of info_nce), tokens of a mask, or bytes of a head's row (attention);
            needs `op` and `dtypes`.
    """

    order: tuple[str, ...]
    op: str | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    least: int = 0


#: What `auto` takes, by device type; the first rule that fits holds. On the CPU it follows benchmarks/results/cpu.json: the C++
#: kernels beat the reference on every row of ops that have them. On a GPU it follows measurements on an H100
#: (docs/tuning.md): CUDA's contrasts are faster at every size, and cost the host less; Triton's masks are faster where the
#: 0.1 ms more of the host's time that they take is hidden. token_similarity was not measured there: Triton writes its matrix
#: once, not in two passes.
CHOICES: dict[str, tuple[Rule, ...]] = {
    "cpu": (Rule(("cpp", "reference")),),
    "cuda": (
        Rule(("triton", "cuda", "reference"), "token_similarity", _SIXTEEN_BITS),
        Rule(("triton", "cuda", "reference"), "complementary_mask", (torch.int64,), least=2**23),
        Rule(("reference",), "varlen_attention", _FLOATING, least=WIDEST_ROW + 1),
        Rule(("cuda", "triton", "reference")),
    ),
}

_SUFFIX = {"reference": "_reference", "cpp": "", "cuda": "", "triton": "_triton"}
_DISPATCH_KEY = {"cpp": ("cpu", "CPU", "_C"), "cuda": ("cuda", "CUDA", "_C_cuda")}


def _from_environment() -> str | None:
    name = os.environ.get("CMLM_FAST_BACKEND", "auto")
    return None if name in ("", "auto") else name


#: What `resolve` found before, so that a call costs two look-ups.
_resolved: dict[tuple[str, torch.device, str | None, torch.dtype | None, int], Any] = {}


def _find_changes() -> dict[tuple[str, str, torch.dtype | None], tuple[int, ...]]:
    found: dict[tuple[str, str, torch.dtype | None], tuple[int, ...]] = {}
    for device_type, rules in CHOICES.items():
        for rule in rules:
            for dtype in rule.dtypes if rule.op and rule.least else ():
                key = (device_type, rule.op or "", dtype)
                found[key] = tuple(sorted((*found.get(key, ()), rule.least)))
    return found


#: Sizes at which CHOICES changes, where it does: (device type, op, dtype) → ascending sizes.
_changes = _find_changes()

_current: str | None = _from_environment()
_blocks: list[list[str | None]] = [[_current]]  # what the blocks of use_backend that are open ask for


def available(name: str, device: str | torch.device = "cpu") -> dict[str, str | None]:
    """Each backend of op `name` on `device`: None where it can run, else the reason why it cannot.

    Raises:
        ValueError: there is no such op.

    >>> available("token_contrastive", "cpu")["reference"] is None
    True
    """
    if name not in contracts:
        raise ValueError(f"cmlm_fast.backends: expected op to be one of {', '.join(sorted(contracts))}, got {name!r}")
    return {backend: _absence(name, torch.device(device), backend) for backend in BACKENDS}


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _absence(name: str, on: torch.device, backend: str) -> str | None:
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
            return _other_device("Triton", ("80",), on)
        return f"Triton kernels run on GPU tensors, not on {on.type} (or interpreted, with TRITON_INTERPRET=1)"
    device, key, library = _DISPATCH_KEY[backend]
    if library in load_errors:
        return load_errors[library]
    if on.type != device:
        return f"{backend} kernels run on {device} tensors, not on {on.type}"
    if (name, key) not in native_kernels:
        return f"this op has no {backend} kernel"
    return _other_device("CUDA", _built_for(), on) if backend == "cuda" else None


# For torch.compile, which cannot look into build_info and need not: what torch.compiler.assume_constant_result sets, without
# the import of all of torch._dynamo.
_absence._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _other_device(kernels: str, archs: Sequence[str], on: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return None
    have = torch.cuda.get_device_capability(on)  # a machine may have GPUs of several kinds
    if any(runs_on(arch, have) for arch in archs):
        return None
    return f"{kernels} kernels are there for {', '.join(archs)}, not for compute capability {have[0]}.{have[1]}"


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for `arch`, as CMake names them, runs on a GPU: "80-real" on 8.0 and 8.6, "80" on all newer ones too.

    >>> runs_on("80-real", (8, 6)), runs_on("90a-real", (8, 0)), runs_on("80", (12, 0))
    (True, False, True)
    """
    digits = re.match(r"\d+", arch)
    if digits is None:  # "native", say: made on this machine
        return True
    major, minor = divmod(int(digits[0]), 10)
    if arch[digits.end() :].startswith("a"):  # of that chip alone
        return (major, minor) == capability
    return (major, minor) <= capability and (major == capability[0] or not arch.endswith("-real"))


def _built_for() -> tuple[str, ...]:
    try:
        from ._build import build_info
    except ImportError:  # built without Python's headers: nothing says for what, so for this machine
        return ("native",)
    return tuple(build_info()["cuda_archs"])


def resolve(
    name: str, device: torch.device, backend: str | None = None, dtype: torch.dtype | None = None, size: int = 0
) -> Any:
    """The torch op that runs op `name` on `device`: of `backend`, or of the current choice for `size` scores of `dtype`."""
    choice = _current if backend is None else backend
    band = 0
    for least in _changes.get((device.type, name, dtype), ()):  # compiled, sizes are guarded on here alone
        if size >= least:
            band = least
    key = (name, device, choice, dtype, band)
    if torch.compiler.is_compiling():  # compiled code would be made anew with the first change of what was found
        return _resolve(*key)
    found = _resolved.get(key)
    if found is None:
        _resolved[key] = found = _resolve(*key)
    return found


def chosen() -> str | None:
    """The backend that `use_backend` or CMLM_FAST_BACKEND names; None for the automatic choice."""
    return _current


def instead(name: str, device: torch.device) -> Any:
    """The torch op that runs in the place of a PyTorch function; None where that function runs itself.

    That is so on devices without a kernel for this op, under a named backend that has none, and, but for the CPU, under
    `reference`: PyTorch's function is plain PyTorch.
    """
    choice = _current or {"cpu": "cpp", "cuda": "triton"}.get(device.type, "reference")
    _check_name(name, choice)
    if choice == "reference" and device.type != "cpu":
        return None
    return None if _absence(name, device, choice) is not None else op(name, _SUFFIX[choice])


def preference(name: str, device_type: str, dtype: torch.dtype | None = None, size: int = 0) -> tuple[str, ...]:
    """The order in which CHOICES would try backends."""
    for rule in CHOICES.get(device_type, ()):
        if rule.op in (None, name) and (not rule.dtypes or dtype in rule.dtypes) and size >= rule.least:
            return rule.order
    return ("reference",)


def _resolve(name: str, device: torch.device, asked: str | None, dtype: torch.dtype | None, band: int) -> Any:
    choice = asked
    if choice is None or choice == "auto":
        order = preference(name, device.type, dtype, band)
        choice = next(backend for backend in order if _absence(name, device, backend) is None)
    _check_name(name, choice)
    reason = _absence(name, device, choice)
    if reason is not None:
        raise RuntimeError(f"cmlm_fast::{name}: expected backend to be available, got {choice!r}: {reason}")
    return op(name, _SUFFIX[choice])


def _check_name(name: str, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"cmlm_fast::{name}: expected backend to be auto or one of {', '.join(BACKENDS)}, got {backend!r}")


def check_backend(backend: str | None, ops: Sequence[str] = (), device: str | torch.device = "cpu") -> None:
    """Raise ValueError where there is no such backend, or it cannot run one of `ops` on `device`."""
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
    mine = [None if backend == "auto" else backend]  # a list: one of its own for each block
    _blocks.append(mine)
    _current = mine[0]
    try:
        yield
    finally:  # in whatever order the blocks of several threads end
        _blocks[:] = [block for block in _blocks if block is not mine]
        _current = _blocks[-1][0]
