"""One run of the suite: check answers, time calls, measure memory; a progress bar meanwhile and a table at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import results
from .memory import peak_bytes
from .ops import OPS
from .registry import Op, Problem, Shape, Wrong
from .results import Absent, Results, Row
from .timing import ceilings, interleaved, quantiles

#: A shape's position in the registry, and hence in a file: a run that adds to a file keeps its order.
ORDER = {key: i for i, key in enumerate((op.name, shape.label) for op in OPS for shape in op.shapes)}
UNITS = {"flop": (1e12, "TFLOP/s"), "byte": (1e9, "GB/s"), "token": (1e6, "Mtoken/s"), "sequence": (1.0, "sequences/s")}


def run(
    plan: Sequence[tuple[Op, Shape]],
    device: torch.device,
    suite: str,
    seconds: float,
    providers: Sequence[str] = (),
    older: Results | None = None,
    save: Callable[[Results], None] = lambda found: None,
) -> Results:
    """Run every shape of the plan with every provider (or those whose name has one of the given parts); save after each shape.

    Shapes of `older` that are not in the plan stay.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    with bar:
        task = bar.add_task("ceilings of this machine", total=len(plan))
        found = results.new(device, suite, seconds, ceilings(device))
        if older is not None:
            found = older.continued(found)
        for op, shape in plan:
            bar.update(task, description=f"{op.name} {shape.label}")
            start = time.perf_counter()
            found.put((op.name, shape.label), *measure(op, shape, device, seconds, providers))
            found.rows.sort(key=lambda r: ORDER.get((r.op, r.shape), -1))
            found.absent.sort(key=lambda a: ORDER.get((a.op, a.shape), -1))
            save(found)
            bar.advance(task)
            if not console.is_terminal:
                console.print(
                    f"{op.name} {shape.label}: {time.perf_counter() - start:.1f} s", highlight=False, soft_wrap=True
                )
    return found


def measure(op: Op, shape: Shape, device: torch.device, seconds: float,
            providers: Sequence[str] = ()) -> tuple[list[Row], list[Absent]]:  # fmt: skip
    """The rows of one shape. A provider that fails or answers wrongly is absent, with the reason; one of ours raises."""
    torch.manual_seed(0)
    wanted = [p for p in op.providers if not providers or any(part in p.name for part in providers)]
    if op.cpu_only and device.type != "cpu":
        return [], [Absent(op.name, shape.label, provider.name, op.cpu_only) for provider in wanted]
    try:
        problem = op.build(device, **shape.sizes)
    except ModuleNotFoundError as error:
        return [], [Absent(op.name, shape.label, provider.name, str(error)) for provider in wanted]
    calls: dict[str, Any] = {}
    errors: dict[str, tuple[float | None, float | None]] = {}
    absent = []
    for provider in wanted:
        reason = provider.absence(problem)
        if not reason:
            try:
                call = provider.make(problem)
                errors[provider.name] = problem.check(provider.name, call()) or (None, None)
                calls[provider.name] = call
            except Exception as error:  # a peer may fail in its own way, and that is a result
                if provider.name.startswith("ours/"):
                    raise
                reason = str(error) if isinstance(error, Wrong) else _first_line(error)
        if reason:
            absent.append(Absent(op.name, shape.label, provider.name, reason))
    if not calls:
        return [], absent
    timed = {**calls, **({"": problem.ceiling} if problem.ceiling else {})}
    samples = interleaved(timed, device, seconds)
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    top = quantiles(samples.pop(""))[1] if problem.ceiling else None
    return [row(op, shape, problem, name, samples[name], top, peaks[name], *errors[name]) for name in calls], absent


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def row(op: Op, shape: Shape, problem: Problem, name: str, samples: list[float], ceiling: float | None, peak: int | None,
        error: float | None, eager_error: float | None) -> Row:  # fmt: skip
    """One row from what was measured."""
    p20, p50, p80 = quantiles(samples)
    amount, kind = problem.work
    scale, unit = UNITS[kind]
    kept = samples[:: -(-len(samples) // results.KEPT)]
    share = None if ceiling is None else ceiling / p50
    return Row(
        op.name,
        shape.label,
        name,
        dict(problem.sizes),
        *(p20, p50, p80, kept),
        rate=amount / p50 / scale,
        unit=unit,
        ceiling_share=share,
        peak_bytes=peak,
        error=error,
        eager_error=eager_error,
        work=amount,
        traffic=problem.traffic,
        sweep=shape.sweep,
    )


HEADS = ("provider", "p50", "p20 – p80", "speed ÷ best other's", "rate", "of ceiling", "peak memory", "error (eager's)")


def cells(row: Row, group: list[Row]) -> tuple[str, ...]:
    """A row as every table prints it, under `HEADS`."""
    other = results.best_other(row, group)
    ratio = "" if other is None else f"{other.p50 / row.p50:.3g} ×"
    share = "" if row.ceiling_share is None else f"{row.ceiling_share:.{int(row.ceiling_share < 0.01)}%}"
    spread, rate = f"{seconds(row.p20)} – {seconds(row.p80)}", f"{row.rate:.3g} {row.unit}"
    return row.provider, seconds(row.p50), spread, ratio, rate, share, memory(row.peak_bytes), errors(row)


def table(found: Results) -> Table:
    """The rows as a table for the terminal; the fastest of a shape is bold."""
    where = found.machine
    title = f"{where['device']}, {where['threads']} threads, torch {found.versions['torch']}, code of commit {found.commit}"
    made = Table(title=title)
    for head in ("op, shape", *HEADS):
        made.add_column(
            head, justify="left" if head in ("op, shape", "provider") else "right", no_wrap=head != "op, shape"
        )
    for (op, shape), group in found.groups().items():
        fastest = min(group, key=lambda r: r.p50)
        for i, one in enumerate(group):
            name, style = f"{op} {shape}" if i == 0 else "", "bold" if one is fastest else None
            made.add_row(name, *cells(one, group), style=style, end_section=i == len(group) - 1)
    return made


def absences(absent: Iterable[Absent]) -> list[str]:
    """One line per provider, op and reason."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for a in absent:
        reason = "does not fit into memory" if a.reason.startswith("would hold") else a.reason
        lines.setdefault((a.provider, a.op, reason), []).append(a.shape)
    return [f"{provider}, {op}, {len(shapes)} shape{'s' * (len(shapes) > 1)}: {reason}"
            for (provider, op, reason), shapes in lines.items()]  # fmt: skip


def seconds(value: float) -> str:
    """A time with its unit: 62 µs, 4.13 ms, 1.3 s.

    >>> seconds(6.2e-5), seconds(0.00413), seconds(1.3)
    ('62 µs', '4.13 ms', '1.3 s')
    """
    unit, scale = next(((u, x) for u, x in (("s", 1.0), ("ms", 1e-3)) if value >= x), ("µs", 1e-6))
    return f"{value / scale:.3g} {unit}" if value / scale < 999.5 else f"{value / scale:.0f} {unit}"


def memory(value: int | None) -> str:
    """Bytes with their unit."""
    return "" if value is None else f"{value / 1e6:.3g} MB" if value < 1e9 else f"{value / 1e9:.3g} GB"


def errors(r: Row) -> str:
    """The error against float64, and eager's."""
    if r.error is None:
        return "bits equal" if r.is_ours and r.op == "complementary_mask" else ""
    return f"{r.error:.1e}" + ("" if r.eager_error is None else f" ({r.eager_error:.1e})")
