"""docs/benchmarks.md and the README's table, made from a results file; a test holds both to benchmarks/results/cpu.json."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean

from . import pictures, run
from .ops import OPS
from .results import FOLDER, Results, Row, automatic, best_other

ROOT = Path(__file__).parents[1]
PAGE, README, COMMITTED = ROOT / "docs" / "benchmarks.md", ROOT / "README.md", FOLDER / "cpu.json"
BEGIN, END = "<!-- benchmarks: made by `cmlm-fast bench report --docs` -->", "<!-- /benchmarks -->"
EVEN = 1.05  # a ratio within 5 % of 1 is a tie: that is what two runs of one program differ by here

PAGE_PICTURES = (pictures.ratios, pictures.sweeps)

#: Rows of the README: op and how the shape's label begins.
SHOWN = (
    ("complementary_mask", "64x128 exact"),
    ("complementary_mask", "2048x512 exact"),
    ("token_contrastive", "bert-base N=614 M=4096 D=768 float32"),
    ("token_contrastive", "bert-base N=614 M=4096 D=768 bfloat16"),
    ("token_contrastive", "N=1024 M=8192 D=128 float32 same token excluded"),
    ("token_contrastive", "sequence scope N=1024 M=4096 D=384 bfloat16"),
    ("info_nce", "B=64 D=384 float32 cross"),
    ("info_nce", "B=2048 D=384 float32 cross"),
    ("info_nce", "B=128 D=384 float32 nt_xent"),
    ("varlen_attention", "bert-base 32 sequences of 32 to 128 H=12 D=64 float32"),
    ("train_step", ""),
)


def duels(found: Results, op: str) -> Iterator[tuple[str, Row, Row]]:
    """(shape, ours as the package chooses it, the fastest other) of each shape of an op that has both."""
    for (name, shape), group in found.groups().items():
        ours = automatic(group, found.machine["type"]) if name == op else None
        other = ours and best_other(ours, group)
        if ours and other:
            yield shape, ours, other


def verdict(ours: Row, other: Row) -> str:
    """wins, ties or loses, and by how much."""
    ratio = other.p50 / ours.p50
    word = "wins" if ratio > EVEN else "loses" if ratio < 1 / EVEN else "ties"
    return f"{word}, {ratio:.2f} ×"


def limit(ours: Row, other: Row, words: str) -> str:
    """What holds ours back: the ceiling, the call itself, or what the op says of it."""
    share = ours.ceiling_share
    if share is not None and share >= 0.7 and other.p50 * EVEN >= ours.p50:
        kind = {"GB/s": "memory bandwidth", "Mtoken/s": "the tokenizer itself"}.get(ours.unit, "the matrix products")
        return f"{kind}, {share:.0%} of the ceiling"
    place = "" if share is None else f"{share:.0%} of the ceiling: "
    return place + ("the call itself, a fixed cost" if ours.p50 < 1e-4 else words)


def page(found: Results) -> str:
    """docs/benchmarks.md."""
    m = found.machine
    tops = ", ".join(f"{name.split()[0]} {value:.3g} {name.split()[1]}" for name, value in found.ceilings.items())
    parts = [
        "# Where ours wins, and where it does not",
        "Made by `cmlm-fast bench report --docs` from [benchmarks/results/cpu.json](../benchmarks/results/cpu.json); a test "
        "holds it to that file. *Ours* is the backend that the package chooses by itself, *other* the fastest provider that is "
        f"not ours, both timed in turns in one run, after their answers were checked. A tie is within {EVEN - 1:.0%}.",
        f"{m['device']}, {m['threads']} threads, {m['instruction set']}, torch {found.versions['torch']}, {found.date}, commit "
        f"{found.commit}. Measured in the run: {tops}. A ceiling is a row's products by `torch.matmul`, or a copy of "
        "its bytes: more than 100 % is a faster library's product, or data that the caches still held. GPUs have "
        "[a page of their own](tuning.md).",
        "![Ours beside the fastest other](benchmarks-ratios.png)",
    ]
    for op in OPS:
        rows = list(duels(found, op.name))
        if not rows:
            continue
        ratios = [other.p50 / ours.p50 for _, ours, other in rows]
        wins = sum(r > EVEN for r in ratios)
        parts += [
            f"## {op.name}",
            f"{op.summary[0].upper()}{op.summary[1:]}. Ours wins {wins} of {len(rows)} sizes; over all of them it is "
            f"{min(ratios):.2f} to {max(ratios):.2f} times as fast, geometric mean {geometric_mean(ratios):.2f} ×.",
            "| size | ours | other | verdict | what limits ours |\n|---|---|---|---|---|\n"
            + "\n".join(
                f"| {shape} | {run.seconds(ours.p50)} {ours.provider} | {run.seconds(other.p50)} {other.provider} | "
                f"{verdict(ours, other)} | {limit(ours, other, op.limit)} |"
                for shape, ours, other in rows
            ),
        ]
    slopes = [(op, axis, who, exponent) for op, axis, who, exponent, _ in found.slopes()]
    if slopes:
        lines = "\n".join(f"| {op} | {axis} | {who} | {exponent:.2f} |" for op, axis, who, exponent in slopes)
        parts += [
            "## How cost grows",
            "![Time over size](benchmarks-sweeps.png)",
            "Exponent of the time in one size, the others fixed: 1 is linear, 2 quadratic; less where a fixed cost counts."
            f"\n\n| op | size | provider | exponent |\n|---|---|---|---|\n{lines}",
        ]
    if found.absent:
        parts += ["## Not run, and why", "\n".join(f"- {line}" for line in run.absences(found.absent))]
    return "\n\n".join(parts) + "\n"


def readme_table(found: Results) -> str:
    """The README's table, between its two marks."""
    groups = found.groups()
    lines = ["| op | size | ours | fastest other | peak memory, ours and theirs |", "|---|---|---|---|---|"]
    before = ""
    for op, part in SHOWN:
        label = next((shape for name, shape in groups if name == op and shape.startswith(part)), None)
        if label is None:  # this run did not time it
            continue
        ours = automatic(groups[op, label], found.machine["type"])
        other = ours and best_other(ours, groups[op, label])
        if not ours or not other:
            continue
        name = "" if op == before else f"`{op}`"
        peaks = f"{run.memory(ours.peak_bytes)}, {run.memory(other.peak_bytes)}" if ours.peak_bytes is not None else ""
        lines.append(
            f"| {name} | {label} | {run.seconds(ours.p50)} | {run.seconds(other.p50)} {other.provider} | {peaks} |"
        )
        before = op
    return "\n".join([BEGIN, *lines, END])


def readme(text: str, found: Results) -> str:
    """The README with its table made anew."""
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.S)
    if not pattern.search(text):
        raise ValueError(f"report: expected README.md to hold {BEGIN} and {END}, got neither")
    return pattern.sub(lambda _: readme_table(found), text)


def write_docs(found: Results) -> list[Path]:
    """Bring docs/benchmarks.md, its pictures and the README up to date."""
    PAGE.parent.mkdir(exist_ok=True)
    for draw in PAGE_PICTURES:
        draw(found, PAGE.parent / f"benchmarks-{draw.__name__}.png")
    PAGE.write_text(page(found), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8"), found), encoding="utf-8")
    return [PAGE, README]
