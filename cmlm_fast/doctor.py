"""`cmlm-fast doctor`: what is installed, what was built, and which kernels of each op run here."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import _library
from .backends import BACKENDS, available
from .kernels._configs import user_file
from .machine import bfloat16_hardware

_PACKAGES = ("cmlm-fast", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy",
             "triton", "sentence-transformers", "scikit-learn")  # fmt: skip


def diagnose() -> dict[str, Any]:
    """The report as plain values: versions, devices, threads, libraries, build, and ops[op][device][backend].

    A backend's value is None if it runs, else the reason why not; likewise for a library.

    Example:
        >>> diagnose()["ops"]["info_nce"]["cpu"]["reference"] is None
        True
    """
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processors": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "bfloat16 in hardware": bfloat16_hardware(),
            "kernels' instruction set": _isa(),
            "CMLM_FAST_BACKEND": _backend(),
            "Triton tile sizes": _tiles(),
            "devices": _devices(),
        },
        "libraries": {name: _library.load_errors.get(name) for name in ("_C", "_C_cuda")},
        "build": _build_info(),
        "ops": {op: {device: available(op, device) for device in _device_types()} for op in _library.contracts},
    }


def _backend() -> str:
    name = os.environ.get("CMLM_FAST_BACKEND") or "auto"
    return name if name in ("auto", *BACKENDS) else f"{name}: no such backend, every op will say so"


def print_report(console: Console) -> None:
    """Print `diagnose()` as tables."""
    facts = diagnose()
    for title, key in (("Versions", "versions"), ("Machine", "machine"), ("Build", "build")):
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in facts[key].items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            table.add_row(str(name), Text(text or "none"))  # not markup: it may contain a path
        console.print(table)
    table = Table(title="Compiled libraries", show_header=False, title_justify="left")
    for name, reason in facts["libraries"].items():
        table.add_row(name, Text("loaded" if reason is None else reason))
    console.print(table)
    for device in _device_types():
        table = Table(title=f"Ops on {device}", title_justify="left")
        for heading in ("op", *BACKENDS):
            table.add_column(heading)
        reasons: list[str] = []
        for op, states in facts["ops"].items():
            table.add_row(op, *(_mark(states[device][backend], reasons) for backend in BACKENDS))
        console.print(table)
        for number, reason in enumerate(reasons, 1):
            console.print(Text(f"  ({number}) {reason}"))


def _mark(reason: str | None, reasons: list[str]) -> str:
    if reason is None:
        return "yes"
    if reason not in reasons:
        reasons.append(reason)
    return f"no ({reasons.index(reason) + 1})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _device_types() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _devices() -> list[str]:
    return ["cpu", *(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))]


def _tiles() -> str:
    path = user_file()
    return "the package's" if path is None or not path.exists() else f"the package's, and those tuned in {path}"


def _isa() -> str:
    if "_C" in _library.load_errors:
        return "none (no compiled CPU kernels)"
    try:
        return str(torch.ops.cmlm_fast._isa())
    except RuntimeError as error:  # CMLM_FAST_ISA names one that this machine lacks
        return str(error).splitlines()[0]


def _build_info() -> dict[str, Any]:
    try:
        from ._build import build_info
    except ImportError:
        pure = "_C" in _library.load_errors
        return {"native build": "none (a pure-Python install)" if pure else "unknown (built without Python's headers)"}
    return dict(build_info())
