"""What is timed, as data: an op has shapes and providers; a shape makes a problem; a provider makes a call that solves it.

A problem knows the unavoidable work, a ceiling to compare times with, and whether an answer is right. A provider
knows where it can run. Adding a provider or a shape is one line in benchmarks/ops/<op>.py.
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
    """A provider's answer is not the op's, so it gets no time."""


@dataclass
class Problem:
    """One op at one size on one device.

    Attributes:
        sizes: the shape's.
        inputs: the tensors (or texts) that providers take, in order.
        work: the least operations ("flop"), bytes ("byte") or tokens ("token") that the task takes, and which of these.
        traffic: bytes of inputs and outputs, each once.
        check: maps a provider's name and answer to (its error, eager's error), None if no number says it; raises `Wrong`.
        ceiling: the unavoidable part of the work (the matrix products alone, or a copy of as many bytes), or None.
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
        """Why it is timed on this device only if asked for, or ""."""
        if device.type == "cpu" and self.sizes.get("dtype") == "bfloat16" and not bfloat16_hardware():
            return "this CPU does not multiply bfloat16 in hardware, and takes longer for it than for float32"
        return ""


@dataclass(frozen=True)
class Provider:
    """One way to do an op.

    Attributes:
        name: as in tables and `--provider`; ours are `ours/<backend>`.
        make: problem → call. Imports its package itself.
        module: the package that must be importable.
        gpu_only: it runs on CUDA tensors only.
        unfit: problem → why it cannot solve this one, or "".
        score_matrices: how many score matrices it holds at once; it is left out if they do not fit into memory.
    """

    name: str
    make: Callable[[Problem], Call] = field(repr=False)
    module: str = ""
    gpu_only: bool = False
    unfit: Callable[[Problem], str] = field(default=lambda problem: "", repr=False)
    score_matrices: float = 0.0

    def absence(self, problem: Problem) -> str:
        """Why it cannot run here, or ""."""
        if self.module and find_spec(self.module) is None:
            return f"the package {self.module} is not installed: pip install 'cmlm-fast[bench]'"
        if self.gpu_only and problem.device.type != "cuda":
            return "its kernels need a GPU"
        if reason := self.unfit(problem):
            return reason
        needed, free = self.score_matrices * problem.matrix, free_bytes(problem.device)
        if needed > 0.8 * free:
            return f"would hold {needed / 1e9:.1f} GB at once, {free / 1e9:.1f} GB are free"
        return ""


@dataclass(frozen=True)
class Op:
    """One op: what a user gets from it, its problems, and its providers.

    `auto` makes the call that leaves the choice of backend to the package; `limit` says in words what keeps our kernels
    below the ceiling, for the page of verdicts; `cpu_only` says why there is nothing to time on a GPU, or "".
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
        """Shapes of the suite (full includes quick), or, in any suite but smoke, all those whose label has a wanted part."""
        if suite == "smoke":
            return [shape for shape in self.shapes if shape.suite == "smoke"]
        suites = ("quick", "full") if suite == "full" or wanted else ("quick",)
        named = [s for s in self.shapes if not wanted or any(part in s.label for part in wanted)]
        return [shape for shape in named if shape.suite in suites]


def ours(name: str, call: Callable[..., Call], score_matrices: float = 5.0,
         unfit: Callable[[str, Problem], str] = lambda backend, problem: "") -> tuple[Provider, ...]:  # fmt: skip
    """One provider per backend of op `name`; `call(backend, problem)` uses it (None: the automatic choice).

    `score_matrices`: how many of them the reference holds. `unfit` says why a backend cannot solve a problem, or "".
    """

    def absence(backend: str, problem: Problem) -> str:
        return available(name, problem.device)[backend] or unfit(backend, problem)

    def provider(backend: str) -> Provider:
        matrices = score_matrices if backend == "reference" else 0.0
        return Provider(f"ours/{backend}", partial(call, backend), unfit=partial(absence, backend), score_matrices=matrices)

    return tuple(provider(backend) for backend in BACKENDS)
