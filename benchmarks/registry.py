"""What is timed, as data: an op has shapes and providers; a shape makes a problem; a provider makes a call that solves it.

A problem knows the work that nothing can avoid, a ceiling to hold times against, and whether an answer is right. A
provider knows where it can run. Adding a provider or a shape is one line in benchmarks/ops/<op>.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from cmlm_fast.backends import BACKENDS, available
from cmlm_fast.machine import bfloat16_hardware

from .memory import free_bytes

Call = Callable[[], Any]


class Wrong(Exception):
    """A provider's answer is not that of the op, so it has no speed."""


@dataclass
class Problem:
    """One op at one size on one device.

    Attributes:
        sizes: those of the shape.
        inputs: the tensors (or texts) that providers take, in order.
        work: operations ("flop"), bytes ("byte") or tokens ("token") that the task takes at least, and which of them.
        traffic: bytes of inputs and outputs, each once.
        check: of a provider's name and answer, (its error, eager's error); raises `Wrong`. None where no number says it.
        ceiling: the part of the work that stays (the matrix products alone, or a copy of as many bytes), or None.
        matrix: bytes of the score matrix that eager code holds; 0 without one.
    """

    sizes: Mapping[str, Any]
    device: torch.device
    inputs: tuple[Any, ...]
    work: tuple[float, str]
    traffic: float
    check: Callable[[str, Any], tuple[float, float | None] | None] = field(repr=False)
    ceiling: Call | None = field(default=None, repr=False)
    matrix: int = 0


@dataclass(frozen=True)
class Shape:
    """One size of an op: a label, what `Op.build` takes, the smallest suite it belongs to, and the axis of its sweep."""

    label: str
    sizes: Mapping[str, Any]
    suite: str = "quick"
    sweep: str = ""

    def unfit(self, device: torch.device) -> str:
        """Why it is timed on this device only where it is asked for, or ""."""
        if device.type == "cpu" and self.sizes.get("dtype") == "bfloat16" and not bfloat16_hardware():
            return "this CPU does not multiply bfloat16 in hardware, and takes longer for it than for float32"
        return ""


@dataclass(frozen=True)
class Provider:
    """One way to do an op.

    Attributes:
        name: as in tables and `--provider`; ours are `ours/<backend>`.
        make: problem → call. Imports its package itself.
        module: the import that must be there.
        gpu_only: it runs on CUDA tensors alone.
        unfit: problem → why it cannot solve this one, or "".
        held: how many score matrices it holds at once; it is left out where they do not fit into memory.
    """

    name: str
    make: Callable[[Problem], Call] = field(repr=False)
    module: str = ""
    gpu_only: bool = False
    unfit: Callable[[Problem], str] = field(default=lambda problem: "", repr=False)
    held: float = 0.0

    def absence(self, problem: Problem) -> str:
        """Why it cannot run here, or ""."""
        if self.module and find_spec(self.module) is None:
            return f"the package {self.module} is not installed: pip install 'cmlm-fast[bench]'"
        if self.gpu_only and problem.device.type != "cuda":
            return "its kernels need a GPU"
        if reason := self.unfit(problem):
            return reason
        needed, free = self.held * problem.matrix, free_bytes(problem.device)
        if needed > 0.8 * free:
            return f"would hold {needed / 1e9:.1f} GB at once, {free / 1e9:.1f} GB are free"
        return ""


@dataclass(frozen=True)
class Op:
    """One op: what a user gets from it, its problems, and who else does it.

    `auto` makes the call that leaves the choice of a backend to the package; `limit` says in words what holds our kernels
    below the ceiling, for the page of verdicts; `cpu_only`, why there is nothing to time on a GPU, or "".
    """

    name: str
    summary: str
    shapes: tuple[Shape, ...]
    build: Callable[..., Problem]
    providers: tuple[Provider, ...]
    auto: Callable[[Problem], Call]
    limit: str
    cpu_only: str = ""

    def chosen(self, suite: str, wanted: tuple[str, ...] = ()) -> list[Shape]:
        """Shapes of the suite (full: quick's too), or, in any suite but smoke, those whose label has a wanted part."""
        if suite == "smoke":
            return [shape for shape in self.shapes if shape.suite == "smoke"]
        suites = ("quick", "full") if suite == "full" or wanted else ("quick",)
        named = [s for s in self.shapes if not wanted or any(part in s.label for part in wanted)]
        return [shape for shape in named if shape.suite in suites]


def ours(name: str, call: Callable[..., Call], held: float = 5.0,
         unfit: Callable[[str, Problem], str] = lambda backend, problem: "") -> tuple[Provider, ...]:  # fmt: skip
    """A provider a backend of op `name`; `call(backend, problem)` uses it (None: the automatic choice). The reference holds
    `held` score matrices. `unfit`: why a backend cannot solve this one, or ""."""

    def absence(backend: str, problem: Problem) -> str:
        return available(name, problem.device)[backend] or unfit(backend, problem)

    def provider(backend: str) -> Provider:
        matrices = held if backend == "reference" else 0.0
        return Provider(f"ours/{backend}", partial(call, backend), unfit=partial(absence, backend), held=matrices)

    return tuple(provider(backend) for backend in BACKENDS)
