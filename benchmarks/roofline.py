"""Predicted floors of the Triton kernels on GPUs that need not be here, from operations and bytes.

    python -m benchmarks.roofline [--write]

A pass takes at least operations / matrix rate and at least bytes / memory bandwidth; an op at least the sum of its passes'
larger terms. Data sheets give the rates (dense bfloat16, no sparsity), so floors are below what a chip sustains: a matrix
product through a vendor's library reaches 70 to 85 % of them. `--write` puts the table into docs/roofline.md, beside
columns for what is measured, which `make gpu` fills in its summary.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).parent.parent / "docs" / "roofline.md"

#: Dense bfloat16 operations and bytes a second, by data sheet (SXM modules).
GPUS = {
    "A100": (312e12, 2.039e12),
    "H100": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "B200": (2250e12, 8.0e12),
}

PANEL = (4096, 2048)  # rows and keys of weights in memory at once (cmlm_fast/kernels/configs.json)
TILE = 128


@dataclass(frozen=True)
class Pass:
    """One kernel over all panels: what it must compute and move through device memory."""

    name: str
    operations: float
    bytes: float

    def floor(self, gpu: str) -> float:
        """Seconds."""
        rate, bandwidth = GPUS[gpu]
        return max(self.operations / rate, self.bytes / bandwidth)


@dataclass(frozen=True)
class Shape:
    """One row of the table.

    Attributes:
        op, label: what is computed, forward and backward.
        passes: its kernels.
        useful: operations that the job needs however it is done: what a rate is counted with.
        goal: what is wanted on a Hopper GPU.
    """

    op: str
    label: str
    passes: tuple[Pass, ...]
    useful: float
    goal: str

    def floor(self, gpu: str) -> float:
        """Seconds."""
        return sum(part.floor(gpu) for part in self.passes)


def contrast(n: int, m: int, d: int, keys: int, self_products: bool = False) -> tuple[Pass, ...]:
    """Passes of n rows against m keys of which each row meets `keys`; bfloat16. Statistics read both operands once a panel
    of L2; weights likewise and write one panel at a time; products read it twice; sums of x̂'s gradient are read and
    written once a panel of keys."""
    scores = n * keys
    row_panels, key_panels = -(-n // PANEL[0]), -(-m // PANEL[1])
    operands = 2 * d * (n * min(key_panels, -(-keys // PANEL[1]) + 1) + m * min(row_panels, -(-scores // (m * PANEL[0])) + 1))
    sides = 1 if self_products else 2
    sums = 8 * n * d * min(key_panels, -(-keys // PANEL[1])) + (0 if self_products else 8 * m * d)
    return (
        Pass("statistics", 2 * scores * d, operands + 12 * scores / TILE),
        Pass("weights", 2 * scores * d, operands + 2 * scores),
        Pass("products", 2 * sides * scores * d, 2 * sides * scores + operands + sums),
        Pass("rows", 0, 2 * d * (n + m) * 4 + 4 * d * (n + m)),
    )


def shapes() -> Iterator[Shape]:
    """The shapes that the goals speak of."""
    n, m, d = 8192, 65536, 768
    yield Shape("token_contrastive", f"scope batch, N={n} M={m} D={d}", contrast(n, m, d, m), 6 * n * m * d,
                "60 % of the measured matrix rate, counting 6·N·M·D")  # fmt: skip
    n = m = 8192
    yield Shape("token_contrastive", f"scope sequence, N={n} M={m} L=128 D={d}", contrast(n, m, d, 2 * TILE), 6 * n * 128 * d,
                "5 × eager")  # fmt: skip
    for batch in (4096, 32768):
        yield Shape("info_nce", f"cross, B={batch} D={d}", contrast(batch, batch, d, batch), 6 * batch**2 * d,
                    "1.3 × the fastest other")  # fmt: skip
        rows = 2 * batch
        yield Shape("info_nce", f"nt_xent, B={batch} D={d}", contrast(rows, rows, d, rows, True), 4 * rows**2 * d, "")
    for tokens in (8192, 2**24):
        yield Shape("complementary_mask", f"{tokens} tokens, int64", (Pass("mask", 0, 25 * tokens),), 0,
                    "60 % of copy bandwidth" if tokens > 8192 else "one launch, < 10 µs")  # fmt: skip


def time(seconds: float) -> str:
    """Three digits with a unit."""
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def table() -> list[str]:
    """Markdown lines, a row for each shape."""
    head = ["op", "shape", "operations", "bytes", *(f"{gpu} floor" for gpu in GPUS), "goal on Hopper", "measured H100",
            "measured H200"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for shape in shapes():
        operations, moved = sum(p.operations for p in shape.passes), sum(p.bytes for p in shape.passes)
        cells = [shape.op, shape.label, f"{operations:.2e}" if operations else "–", f"{moved:.2e}",
                 *(time(shape.floor(gpu)) for gpu in GPUS), shape.goal, "", ""]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def document() -> str:
    """docs/roofline.md."""
    rates = ", ".join(f"{gpu} {rate / 1e12:g} TFLOP/s and {bandwidth / 1e12:g} TB/s" for gpu, (rate, bandwidth) in GPUS.items())
    return "\n".join([
        "# Floors of the Triton kernels",
        "",
        "Made by `python -m benchmarks.roofline --write`. Predictions from operations and bytes alone, forward and backward,",
        "bfloat16: no run can be faster. The measured columns are empty until `make gpu` has run on such a GPU.",
        "",
        f"Rates by data sheet: {rates}.",
        "",
        *table(),
        "",
    ])  # fmt: skip


def main() -> None:
    """Print the table, or write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name}")
    if parser.parse_args().write:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(document(), encoding="utf-8")
    else:
        print(document())


if __name__ == "__main__":
    main()
