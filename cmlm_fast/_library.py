"""The torch library `cmlm_fast`: how an op is declared, and which compiled kernels were loaded.

`declare` turns one contract (schema, reference, fake, autograd, samples) into registered ops with one schema:

    cmlm_fast::<op>              native kernels (C++, CUDA) where loaded, else the reference, on any device
    cmlm_fast::<op>_reference    the plain PyTorch formula, on any device
    cmlm_fast::<op>_triton       Triton kernels, where cmlm_fast/kernels/<op>.py has them

All of them share one fake kernel and one autograd formula, so a kernel can differ from the reference only in speed and
rounding.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd.forward_ad import unpack_dual
from torch.utils._python_dispatch import _get_current_dispatch_mode

LIBRARY = torch.library.Library("cmlm_fast", "DEF")

#: Increment at every change to an op's schema, here and in csrc/module.cpp: a library of other schemas would misread arguments.
SCHEMAS = 1

#: Why a compiled library is absent, by name ("_C", "_C_cuda"); a loaded library has no entry.
load_errors: dict[str, str] = {}

#: Every op defined here, and the (op, dispatch key) pairs that a compiled library implements. Plain sets, since
#: torch.compile traces the choice of a backend.
registered: set[str] = set()
native_kernels: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Contract:
    """What every backend of one op must agree on.

    Attributes:
        name: op name without the namespace.
        samples: `samples(dtype, device)` yields `(label, args)`; `args` are positional arguments of the raw op.
        dtypes: dtypes of the floating inputs (or of the ids, for an op on ids).
        differentiable: positions in `args` of the tensors that take gradients.
        exact: True where backends must agree bit for bit.
    """

    name: str
    samples: Callable[[torch.dtype, torch.device], Iterator[tuple[str, tuple[Any, ...]]]]
    dtypes: tuple[torch.dtype, ...]
    differentiable: tuple[int, ...] = ()
    exact: bool = False


contracts: dict[str, Contract] = {}


def expect(op: str, condition: bool, argument: str, rule: str, value: object) -> None:
    """Raise `ValueError` in the package's one error pattern unless `condition` holds; a tensor is shown as dtype and shape."""
    if not condition:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else value
        raise ValueError(f"cmlm_fast::{op}: expected {argument} to be {rule}, got {got}")


def expect_values(op: str, condition: torch.Tensor | bool, argument: str, rule: str, value: object) -> None:
    """Like `expect`, for rules on a tensor's values: raises `RuntimeError`, as the compiled kernels do."""
    if not bool(condition):
        raise RuntimeError(f"cmlm_fast::{op}: expected {argument} to be {rule}, got {value}")


def is_number(value: object) -> bool:
    """Whether an option is a plain number; a tensor, which may require a gradient, is not."""
    return isinstance(value, (int, float, np.number))


def is_whole(value: object) -> bool:
    """Whether an option is a whole number: an int, an object with `__index__`, or a one-element tensor of integers."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_floating_point() and not value.is_complex()
    return isinstance(value, int) or hasattr(value, "__index__")


def expect_flag(op: str, argument: str, value: object) -> None:
    """Check an option that is on or off."""
    expect(op, isinstance(value, (bool, np.bool_)), argument, "True or False", repr(value))


def is_traced() -> bool:
    """Whether tensors are being traced, or fake: they hold no values, and nothing made from them is of use to later calls."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def is_transformed(*tensors: torch.Tensor | None) -> bool:
    """Whether tracing, a torch.func transform or forward mode sees these tensors.

    Code that has only a backward pass would fail there, or silently lose a derivative.
    """
    if is_traced() or torch._C._functorch.maybe_current_level() is not None:
        return True
    return any(x is not None and unpack_dual(x).tangent is not None for x in tensors)


def declare(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Register `cmlm_fast::<name>`, `<name>_reference` and, if there is a Triton kernel, `<name>_triton`.

    `setup_context(ctx, inputs, output)` and `backward(ctx, *grads)` are those of `torch.library.register_autograd`;
    `ctx.backend` is the suffix of the op that ran, for `op(name, ctx.backend)` in the backward pass.
    """
    for suffix in ("", "_reference"):
        _register(name + suffix, schema, reference, fake, suffix, setup_context, backward)
    if (Path(__file__).parent / "kernels" / f"{name.removesuffix('_backward')}.py").exists():
        _register(name + "_triton", schema, _triton_launcher(name), fake, "_triton", setup_context, backward)


def _triton_launcher(name: str) -> Callable[..., Any]:
    """The launcher `cmlm_fast.kernels.<op>.<name>`, imported together with triton at its first call."""

    def launch(*args: Any) -> Any:
        module = import_module(f"cmlm_fast.kernels.{name.removesuffix('_backward')}")
        return getattr(module, name)(*args)

    return launch


def _register(
    qualified: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    suffix: str,
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any] | None,
) -> None:
    """Define one op, its kernel for every device, its fake kernel and its autograd formula."""
    registered.add(qualified)
    LIBRARY.define(qualified + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(qualified, _without_autocast(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"cmlm_fast::{qualified}", fake, lib=LIBRARY)
    if backward is None or setup_context is None:
        return

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend = suffix
        setup_context(ctx, inputs, output)

    def once(ctx: Any, *grads: Any) -> Any:
        no_second_derivative(name)
        return backward(ctx, *grads)

    name = qualified.removesuffix("_reference").removesuffix("_triton")
    torch.library.register_autograd(f"cmlm_fast::{qualified}", once, setup_context=setup, lib=LIBRARY)


def no_second_derivative(name: str) -> None:
    """Raise in a backward pass with create_graph=True: kernels record no graph, so their result would count as a constant.

    (`once_differentiable` raises only if the incoming gradient requires grad.)
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"cmlm_fast::{name}: expected create_graph to be False (there is no second derivative), got True")


def _without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Run a kernel without autocast: the public functions have already cast what autocast casts."""

    def run(*args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return implementation(*args)

    return run


def op(name: str, suffix: str = "") -> Any:
    """The callable `torch.ops.cmlm_fast.<name><suffix>.default`."""
    return getattr(torch.ops.cmlm_fast, name + suffix).default


def load_kernels() -> None:
    """Load `_C` (and `_C_cuda` if PyTorch has CUDA); record in `load_errors` why one did not load."""
    folder = Path(__file__).parent
    if os.environ.get("CMLM_FAST_NATIVE") == "0":
        load_errors.update(dict.fromkeys(("_C", "_C_cuda"), "CMLM_FAST_NATIVE=0 is set"))
    else:
        own = os.environ.get("CMLM_FAST_LIBRARY")
        _load("_C", Path(own) if own else folder / "_C.so", checked=not own)
        if torch.version.cuda is None:
            load_errors["_C_cuda"] = "this PyTorch is built without CUDA"
        else:
            _load("_C_cuda", folder / "_C_cuda.so")
    for name in registered:
        for key in ("CPU", "CUDA"):
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"cmlm_fast::{name}", key):
                native_kernels.add((name, key))


def _load(name: str, path: Path, checked: bool = True) -> None:
    if not path.exists():
        load_errors[name] = f"{path.name} was not built (a pure-Python install, or no compiler was found)"
        return
    if checked and _schemas_built() != SCHEMAS:
        load_errors[name] = f"{path.name} was built for another version of the package: install it again"
    else:
        try:
            torch.ops.load_library(str(path))
            return
        except OSError as error:
            load_errors[name] = f"{path.name} does not load: {error.__cause__ or error}"
    warnings.warn(f"cmlm_fast: {load_errors[name]}; without it ops are slower", stacklevel=2)


def _schemas_built() -> int | None:
    """The value of `SCHEMAS` that the libraries in this folder were built for."""
    try:
        from ._build import build_info
    except ImportError:  # built without Python's headers: it cannot be asked
        return SCHEMAS
    return dict(build_info()).get("schemas")
