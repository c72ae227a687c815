"""The one schema of results, benchmarks/results/<device>.json: what ran where, one row per provider, and what did not run.

schema     1
machine    device, threads, instruction set, python, system, load of the machine when the run began
versions   of every package that was timed
commit     of the repository ("+" if there are changes), date, suite, seconds per shape
ceilings   TFLOP/s of matrix products and GB/s of a copy, measured in this run
rows       op, shape, sizes, provider; seconds (p20, p50, p80) of one call, samples, rate and its unit, share of the
           row's ceiling, peak bytes, error and eager's error against float64, operations and bytes of the task
absent     op, shape, provider, reason
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from math import log
from pathlib import Path
from typing import Any

import torch

from cmlm_fast._library import contracts
from cmlm_fast.backends import preference

SCHEMA = 1
FOLDER = Path(__file__).parent / "results"
PACKAGES = ("cmlm-fast", "torch", "triton", "transformers", "datasets", "sentence-transformers", "pytorch-metric-learning",
            "info-nce-pytorch", "cut-cross-entropy", "liger-kernel", "inf-cl")  # fmt: skip
KEPT = 40  # samples a row keeps, for bootstrap intervals


@dataclass(frozen=True)
class Row:
    """One provider on one shape."""

    op: str
    shape: str
    provider: str
    sizes: Mapping[str, Any]
    p20: float
    p50: float
    p80: float
    samples: list[float]
    rate: float
    unit: str
    ceiling_share: float | None
    peak_bytes: int | None
    error: float | None
    eager_error: float | None
    work: float
    traffic: float
    sweep: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.shape, self.provider

    @property
    def is_ours(self) -> bool:
        return self.provider.startswith("ours/")


@dataclass(frozen=True)
class Absent:
    """A provider that could not run on a shape, and why."""

    op: str
    shape: str
    provider: str
    reason: str


@dataclass
class Results:
    """A results file."""

    machine: dict[str, Any]
    versions: dict[str, str | None]
    commit: str
    date: str
    suite: str
    seconds: float
    ceilings: dict[str, float]
    rows: list[Row] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write it, one line per row, so that a diff shows which rows changed."""
        whole = {"schema": SCHEMA, **asdict(self)}
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = []
        for name, value in whole.items():
            if name in ("rows", "absent"):
                lines = ",\n".join("  " + json.dumps(_short(row)) for row in value)
                parts.append(f' "{name}": [\n{lines}\n ]')
            else:
                parts.append(f' "{name}": {json.dumps(_short(value))}')
        path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file; `ValueError` if it is not one of ours."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"expected a results file of `cmlm-fast bench`, got {path}, which does not exist") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: expected a results file of `cmlm-fast bench`, got no JSON: {error}") from None
        if not isinstance(found, dict) or found.pop("schema", None) != SCHEMA:
            raise ValueError(f"{path}: expected a results file of `cmlm-fast bench` with schema {SCHEMA}")
        rows, absent = found.pop("rows"), found.pop("absent")
        return cls(**found, rows=[Row(**row) for row in rows], absent=[Absent(**row) for row in absent])

    def put(self, key: tuple[str, str], rows: list[Row], absent: list[Absent]) -> None:
        """Replace the rows of one (op, shape)."""
        self.rows = [row for row in self.rows if (row.op, row.shape) != key] + rows
        self.absent = [a for a in self.absent if (a.op, a.shape) != key] + absent

    def continued(self, now: Results) -> Results:
        """This file, for a run that begins now to add shapes to; `ValueError` if its numbers belong to something else."""
        for name in ("versions", "commit"):
            then, today = getattr(self, name), getattr(now, name)
            if then != today:
                raise ValueError(
                    f"bench: expected --update to go on with a file of the same {name}, {today}, got {then}"
                )
        if {**self.machine, "load": 0} != {**now.machine, "load": 0}:
            raise ValueError(f"bench: expected --update to go on with a file of this machine, got {self.machine}")
        return self

    def groups(self) -> dict[tuple[str, str], list[Row]]:
        """The rows of each (op, shape), in the file's order."""
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            found.setdefault((row.op, row.shape), []).append(row)
        return found

    def slopes(self) -> list[tuple[str, str, str, float, int]]:
        """(op, axis, provider, exponent of the cost in the axis, points) of each sweep with three points or more."""
        found: dict[tuple[str, str, str], list[Row]] = {}
        for row in self.rows:
            if row.sweep:
                found.setdefault((row.op, row.sweep, row.provider), []).append(row)
        return [(*key, slope([(row.sizes[key[1]], row.p50) for row in rows]), len(rows))
                for key, rows in found.items() if len(rows) >= 3]  # fmt: skip


def slope(points: Iterable[tuple[float, float]]) -> float:
    """Least-squares slope of log y over log x: 1 where the cost is linear, 2 where it is quadratic.

    >>> round(slope([(1, 3.0), (10, 30.0), (100, 300.0)]), 6)
    1.0
    """
    logs = [(log(x), log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def best_other(row: Row, group: list[Row]) -> Row | None:
    """The fastest other row; for a row of ours, the fastest that is not ours."""
    others = [r for r in group if r.provider != row.provider and not (row.is_ours and r.is_ours)]
    return min(others, key=lambda r: r.p50, default=None)


def automatic(group: list[Row], device: str) -> Row | None:
    """Our row for the backend that a user gets by default: the first in the package's order of preference for this size."""
    mine = {row.provider.removeprefix("ours/"): row for row in group if row.is_ours}
    if not mine or group[0].op not in contracts:  # an op without a choice of backends
        return next(iter(mine.values()), None)
    op, sizes = group[0].op, group[0].sizes
    dtype = getattr(torch, sizes["dtype"]) if "dtype" in sizes else torch.int64  # of ids
    counted = {"token_contrastive": ("N", "M"), "info_nce": ("B", "B"), "complementary_mask": ("B", "L")}.get(op)
    size = sizes[counted[0]] * sizes[counted[1]] if counted else 0
    return next((mine[name] for name in preference(op, device, dtype, size) if name in mine), None)


def new(device: torch.device, suite: str, seconds: float, measured: dict[str, float]) -> Results:
    """A file without rows, for a run that begins now."""
    root = Path(__file__).parents[1]
    return Results(describe(device), {name: _version(name) for name in PACKAGES}, commit(root), str(date.today()), suite,
                   seconds, measured)  # fmt: skip


def describe(device: torch.device) -> dict[str, Any]:
    """The machine that the numbers belong to."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else model
    isa = getattr(torch.ops.cmlm_fast, "_isa", None)
    return {"device": name, "type": device.type, "threads": torch.get_num_threads(), "instruction set": isa() if isa else None,
            "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}",
            "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None}  # fmt: skip


def commit(root: Path) -> str:
    """The last commit that changed what is timed, with "+" when files differ from it; "" without git."""
    timed = ("--", "cmlm_fast", "csrc")
    try:
        last = _git(root, "log", "-1", "--abbrev=10", "--format=%h", *timed)
        return last + "+" * bool(_git(root, "status", "--porcelain", "-uno", *timed))
    except FileNotFoundError:
        return ""


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _short(value: Any) -> Any:
    """Numbers to four significant digits: more is noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, list) else value
