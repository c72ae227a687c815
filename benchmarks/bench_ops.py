"""Speed of the ops on this machine, beside what a user would run instead, in one table and one JSON file.

    python -m benchmarks.bench_ops [--case PART-OF-A-NAME ...] [--seconds S] [--output benchmarks/results/cpu.json]

Each row times its providers interleaved and gives the distance to a ceiling timed in the same rounds. With an --output
that is there already, the rows measured replace theirs and the others stay.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .cases import CASES, Case
from .timing import interleaved, peak_memory


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """One row: milliseconds of each provider, ours against the fastest other and against the ceiling, memory."""
    torch.manual_seed(0)
    bench = case.build()
    calls = {**bench.providers, **({"ceiling": bench.ceiling} if bench.ceiling else {})}
    times = interleaved(calls, seconds)
    ours, best = times["ours"], min((p for p in bench.providers if p != "ours"), key=times.__getitem__)
    row: dict[str, Any] = {
        "op": case.op,
        "case": case.label,
        "ms": {provider: round(t * 1e3, 4) for provider, t in times.items()},
        "best other": best,
        "speedup": round(times[best] / ours, 3),
    }
    if bench.ceiling:
        row["times the ceiling"] = round(ours / times["ceiling"], 3)
    if bench.matrix_bytes:
        extra = max(peak_memory(bench.providers["ours"]) - bench.output_bytes, 0)
        row |= {"extra bytes": extra, "extra share of matrix": round(extra / bench.matrix_bytes, 4)}
    return row


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "device": model,
        "threads": torch.get_num_threads(),
        "instruction set": torch.ops.cmlm_fast._isa(),
        "python": platform.python_version(),
        "date": str(date.today()),
        "versions": {name: installed(name) for name in ("cmlm-fast", "torch", "transformers", "sentence-transformers",
                                                        "pytorch-metric-learning")},
    }  # fmt: skip


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def save(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the rows, in the order of CASES, over those of earlier runs."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    by_case = {(row["op"], row["case"]): row for row in [*old, *rows]}
    kept = [by_case[key] for case in CASES if (key := (case.op, case.label)) in by_case]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "rows": kept}, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    where = machine()
    result = Table(title=f"{where['device']}, {where['threads']} threads, torch {torch.__version__}")
    for column in ("op", "case", "ours ms", "best other ms", "speed-up", "× ceiling", "memory ÷ matrix"):
        result.add_column(column, justify="left" if column in ("op", "case", "best other ms") else "right")
    for row in rows:
        other = row["best other"]
        share = row.get("extra share of matrix")
        result.add_row(row["op"], row["case"], f"{row['ms']['ours']:.3f}", f"{row['ms'][other]:.3f} {other}",
                       f"{row['speedup']:.2f} x", f"{row.get('times the ceiling', '')}",
                       "" if share is None else f"{share:.4f}")  # fmt: skip
    return result


def main() -> None:
    """Measure the chosen cases, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", metavar="PART", help="only cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each row")
    parser.add_argument("--output", type=Path, default=Path("out/bench_ops.json"))
    options = parser.parse_args()
    rows = []
    for case in CASES:
        if options.case and not any(part in case.id for part in options.case):
            continue
        rows.append(measure(case, options.seconds))
        print(json.dumps(rows[-1]), flush=True)
        save(rows, options.output)
    Console(width=150).print(table(rows))


if __name__ == "__main__":
    main()
