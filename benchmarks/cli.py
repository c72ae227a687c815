"""`cmlm-fast bench` and `python -m benchmarks`: run the suite, compare two results or two commits, report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, invoke_without_command=True,
                  context_settings={"help_option_names": ["-h", "--help"]})  # fmt: skip

_Ops = Annotated[list[str] | None, typer.Option("--op", help="only this op; may be repeated")]
_Shapes = Annotated[
    list[str] | None, typer.Option("--shape", help="only shapes (of --full, too) whose label contains this: D=768")
]


@app.callback()
def bench(
    context: typer.Context,
    op: _Ops = None,
    shape: _Shapes = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="only providers whose name contains this: ours, eager")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1")] = "cpu",
    full: Annotated[
        bool, typer.Option("--full", help="every shape, up to 16 M tokens and 8,192 × 65,536 scores; hours")
    ] = False,
    seconds: Annotated[
        float, typer.Option(min=0.0, help="for the timed rounds of a shape, at least 5; checks and compilation are extra")
    ] = 1.0,
    output: Annotated[
        Path | None,
        typer.Option(help="results, updated after each shape; default: out/bench.json, or out/bench-part.json for a part"),
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="keep other shapes of this commit that --output already holds")
    ] = False,
) -> None:
    """Time the ops of cmlm_fast against other implementations: minutes on a CPU. A row is printed only if its result is right.

    Without a command, the suite runs; `compare` and `report` read the results of earlier runs.
    """
    if context.invoked_subcommand is not None:
        return
    from . import run
    from .results import Results

    suite = "full" if full else "quick"
    where = checked_device(device)
    asked = chosen(op, shape, suite)
    plan = [(o, s) for o, s in asked if shape or not s.unfit(where)]
    if not plan:
        raise ValueError(f"bench: expected --shape, without which nothing runs here: {asked[0][1].unfit(where)}; got none")
    names = {p.name for o, _ in plan for p in o.providers}
    if provider and not any(part in name for part in provider for name in names):
        raise ValueError(f"bench: expected --provider to be contained in one of {'; '.join(sorted(names))}, got {provider}")
    if output is None:  # a partial run must not overwrite a full one, which took minutes
        output = Path("out/bench-part.json" if (op or shape or provider) and not update else "out/bench.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.is_dir():
        raise ValueError(f"bench: expected --output to be a file, got the folder {output}")
    older = Results.load(output) if update and output.exists() else None
    found = run.run(plan, where, suite, seconds, tuple(provider or ()), older, lambda now: now.save(output))
    if not found.rows:
        raise ValueError(f"bench: expected a provider that runs here: {'; '.join(run.absences(found.absent))}")
    console = Console(width=None if sys.stdout.isatty() else 190)
    console.print(run.table(found))
    for op_name, axis, name, exponent, points in found.slopes():
        console.print(f"{op_name}: {name} grows with {axis} to the {exponent:.2f} ({points} sizes)")
    for line in run.absences(found.absent):
        console.print(f"not run: {line}", markup=False)
    for o, s in asked:
        if (o, s) not in plan:
            console.print(f"not run: {o.name} {s.label} (--shape runs it): {s.unfit(where)}", markup=False)
    console.print(f"written to {output}")


def chosen(ops: list[str] | None, shapes: list[str] | None, suite: str) -> list[Any]:
    """The (op, shape) pairs asked for; `ValueError` if there are none."""
    from .ops import OPS

    names = [o.name for o in OPS]
    for name in ops or ():
        if name not in names:
            raise ValueError(f"bench: expected --op to be one of {', '.join(names)}, got {name!r}")
    if "" in (shapes or ()):
        raise ValueError("bench: expected --shape to be contained in a shape's label, got ''")
    wanted = [o for o in OPS if not ops or o.name in ops]
    plan = [(o, s) for o in wanted for s in o.chosen(suite, tuple(shapes or ()))]
    if not plan:
        labels, more = (list(dict.fromkeys(s.label for o in wanted for s in o.chosen(suite))) for suite in ("quick", "full"))
        rest = f" (or of {len(more) - len(labels)} labels that --full adds)" * (len(more) > len(labels))
        raise ValueError(f"bench: expected --shape to be contained in one of {'; '.join(labels)}{rest}, got {shapes}")
    return plan


def checked_device(name: str) -> Any:
    """The torch device; `ValueError` if it is not available."""
    import torch

    device = torch.device(name if name.split(":")[0] in ("cpu", "cuda") else "meta")
    if device.type == "meta" or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"bench: expected --device to be one that is here (cpu, or cuda with a GPU), got {name!r}")
    return device


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="results file, git ref, or . for the working tree: the one before")],
    b: Annotated[str, typer.Argument(help="the one after")] = ".",
    threshold: Annotated[
        float, typer.Option(min=0.0, help="fail if a ratio's whole interval lies above 1 + this")
    ] = 0.1,
    op: _Ops = None,
    shape: _Shapes = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="time for the pairs of a shape (git refs only)")] = 6.0,
    device: Annotated[str, typer.Option(help="cpu or cuda (git refs only)")] = "cpu",
) -> None:
    """Is B slower than A? Exit code 1 if any row is, beyond both the threshold and noise."""
    from . import run
    from .compare import compare_files, compare_refs
    from .results import Results

    files = [Path(x) for x in (a, b) if x.endswith(".json")]
    if len(files) == 1:
        raise ValueError(f"compare: expected two results files or two git refs, got {a} and {b}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    if files:
        changes = compare_files(Results.load(files[0]), Results.load(files[1]), threshold)
    else:
        checked_device(device)
        plan = [(o.name, s.label) for o, s in chosen(op, shape, "quick")]
        changes = compare_refs(a, b, plan, seconds, threshold, device, console.print)
    table = Table(title=f"{a} → {b}, threshold {threshold:.0%}")
    for head in ("op, shape", "A", "B", "B ÷ A", "95 % interval", ""):
        table.add_column(head, justify="left" if head in ("op, shape", "") else "right")
    for c in changes:
        table.add_row(c.name, run.seconds(c.a), run.seconds(c.b), f"{c.ratio:.3f}", f"{c.low:.3f} – {c.high:.3f}", c.verdict,
                      style={"slower": "red", "faster": "green"}.get(c.verdict))  # fmt: skip
    console.print(table)
    if slower := [c.name for c in changes if c.verdict == "slower"]:
        console.print(f"slower: {'; '.join(slower)}")
        raise typer.Exit(1)


@app.command()
def report(
    file: Annotated[Path, typer.Argument(help="results of a run")] = Path("benchmarks/results/cpu.json"),
    output: Annotated[Path, typer.Option(help="report.md, its pictures and report.html go here")] = Path("out/bench"),
    docs: Annotated[
        bool, typer.Option("--docs", help="also bring docs/benchmarks.md and the README's table up to date")
    ] = False,
) -> None:
    """Write the tables and pictures of a run: Markdown with PNG files, and one HTML page that holds everything."""
    from . import report as reports
    from . import verdicts
    from .results import Results

    found = Results.load(file)
    for path in reports.write(found, output):
        print(path)
    if docs:
        for path in verdicts.write_docs(found):
            print(path)
