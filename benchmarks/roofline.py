"""The best that a GPU can do with the Triton kernels, from their operations and bytes; no GPU is needed.

    python -m benchmarks.roofline [--write]

A launch takes at least operations / matrix rate and at least bytes / memory bandwidth; an op takes at least the sum over its
launches. Bytes are a launch's operands, each read once from memory, and what it writes; a panel of weights stays in L2 between
the launch that makes it and the one that uses it (cmlm_fast/kernels/_pairs.py). Rates are the data sheets', which nothing
reaches, so a floor is not a forecast. `--write` puts the table into benchmarks/results/static/roofline.md.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch

from cmlm_fast._library import op
from cmlm_fast.kernels._configs import Config, config, shape_class

DOCUMENT = Path(__file__).parent / "results" / "static" / "roofline.md"


@dataclass(frozen=True)
class Chip:
    """A GPU by its data sheet: dense bfloat16 operations per second, bytes per second, key of its configurations, source."""

    rate: float
    bandwidth: float
    config: str
    source: str


CHIPS = {
    "A100": Chip(312e12, 2.039e12, "sm_80", "NVIDIA A100 Tensor Core GPU datasheet, A100 80GB SXM"),
    "H100": Chip(989e12, 3.35e12, "sm_90", "NVIDIA H100 Tensor Core GPU datasheet, H100 SXM (half of the 1,979 with sparsity)"),
    "H200": Chip(989e12, 4.8e12, "sm_90", "NVIDIA H200 Tensor Core GPU datasheet, H200 SXM (half of the 1,979 with sparsity)"),
    "B200": Chip(2250e12, 8.0e12, "sm_100", "NVIDIA Blackwell Architecture Technical Brief, HGX B200"),
}


@dataclass(frozen=True)
class Shape:
    """One row of the table; bench_gpu measures it.

    Attributes:
        op: its name.
        n, m, d: rows, keys, width; for masks, n is the number of tokens; for info_nce, n = B.
        keys: candidates per row (m, or the length of its sequence).
        scheme: info_nce's; for masks, the sampling.
        goal: the target on an H100 or H200.
    """

    op: str
    n: int
    m: int = 0
    d: int = 0
    keys: int = 0
    scheme: str = ""
    goal: str = ""

    @property
    def label(self) -> str:
        """The shape in words."""
        if self.op == "complementary_mask":
            return f"{self.n:,} tokens, {self.scheme}"
        if self.op == "info_nce":
            return f"{self.scheme}, B={self.n} D={self.d}"
        scope = "batch" if self.keys == self.m else f"sequence, L={self.keys}"
        return f"scope {scope}, N={self.n} M={self.m} D={self.d}"

    @property
    def name(self) -> str:
        """The key by which results are kept."""
        return f"{self.op} {self.label}"

    @property
    def counted(self) -> float:
        """Operations that a rate counts: what any algorithm that keeps the scores needs, three products of the rows."""
        if self.op == "complementary_mask":
            return 0.0
        if self.scheme == "nt_xent":  # symmetric scores: two products
            return 4.0 * (2 * self.n) ** 2 * self.d
        return 6.0 * self.n * self.keys * self.d


SHAPES = (
    Shape("token_contrastive", 8192, 65536, 768, 65536, goal="60 % of the measured matrix rate, counting 6·N·M·D"),
    Shape("token_contrastive", 8192, 8192, 768, 8192),
    Shape("token_contrastive", 8192, 8192, 768, 128, goal="5 × eager"),
    Shape("info_nce", 64, 64, 768, 64, "cross", "one launch"),
    Shape("info_nce", 256, 256, 768, 256, "cross"),
    Shape("info_nce", 4096, 4096, 768, 4096, "cross"),
    Shape("info_nce", 32768, 32768, 768, 32768, "cross", "1.3 × the fastest other"),
    Shape("info_nce", 32768, 32768, 768, 32768, "nt_xent"),
    Shape("complementary_mask", 64 * 128, scheme="bernoulli", goal="one launch, < 10 µs"),
    Shape("complementary_mask", 2**24, scheme="bernoulli", goal="60 % of the measured copy bandwidth"),
    Shape("complementary_mask", 2**24, scheme="exact"),
)


@dataclass(frozen=True)
class Launch:
    """Launches of one kernel with the same cost."""

    kernel: str
    operations: float
    bytes: float
    count: int = 1

    def floor(self, chip: Chip) -> float:
        """Least seconds of all of them."""
        return self.count * max(self.operations / chip.rate, self.bytes / chip.bandwidth)


def contrast(n: int, m: int, d: int, keys: int, c: Config, same: bool, both: bool) -> Iterator[Launch]:
    """Forward and backward of n bfloat16 rows against m keys, of which `keys` are a row's candidates.

    `same`: rows and keys are one matrix; `both`: the softmax also runs over columns.
    """
    share = keys / m  # of the tiles that are not skipped
    rows, columns = min(c.statistics_panel[0], n), min(c.statistics_panel[1], m)
    panels = ceil(n / rows) * ceil(m / columns)
    partial = 12 * rows * columns * share / c.scores.cols
    yield Launch("inverse_norms", 0, 2 * d * (n if same else (n + m) / 2), 1 if same else 2)
    written = partial + (12 * rows * columns / c.scores.rows if both else 0)
    yield Launch("statistics", 2 * rows * columns * d * share, 2 * d * (rows + columns) + written, panels)
    yield Launch("merge", 0, written / (2 if both else 1), panels * (2 if both else 1))
    rows, columns = min(c.panel[0], n), min(c.panel[1], m)
    down, across = ceil(n / rows), ceil(m / columns)
    met = max(1, keys / columns) / across  # share of a panel's rows that have candidates in it
    yield Launch("weights", 2 * rows * columns * d * share, 2 * d * (rows + columns) * met, down * across)
    sides = 1 if same else 2
    sums = 8 * rows * d * met  # float32, read and written again by each panel of keys
    yield Launch("products", 2 * sides * rows * columns * d * share, sums, down * across)
    yield Launch("project", 0, (4 * m if same else 4 * n + 4 * m) * d / (1 if same else 1 + across), 1 if same else 1 + across)


def launches(shape: Shape, chip: Chip) -> list[Launch]:
    """The kernels of one call that cost time: forward and backward, bfloat16 rows (int64 ids)."""
    if shape.op == "complementary_mask":
        return [Launch(shape.scheme, 0, 25 * shape.n)]
    same = shape.scheme == "nt_xent"
    times = 2 if same else 1
    if shape.op == "info_nce":
        from cmlm_fast.kernels.info_nce import SMALL

        most, _, strip = SMALL[torch.bfloat16]
        rows = times * shape.n
        if rows <= most:  # each strip of the gradients computes the scores
            product = 2 * rows * rows * shape.d
            return [Launch("info_nce_small", product * (ceil(shape.d / strip) + (1 if same else 2)), 8 * shape.n * shape.d)]
    c = config(chip.config, torch.bfloat16, shape_class(shape.d))
    return list(contrast(times * shape.n, times * shape.m, shape.d, times * shape.keys, c, same,
                         shape.scheme == "cross"))  # fmt: skip


def arguments(shape: Shape, device: str = "cpu") -> tuple[Any, ...]:
    """The op's arguments.

    Random rows, each with its own positive; ids below 30,522 in sequences of 128 (512 for masks of 16 M tokens).
    """
    torch.manual_seed(0)
    if shape.op == "complementary_mask":
        length = 128 if shape.n < 2**20 else 512
        ids = torch.randint(5, 30_522, (shape.n,), device=device)
        cu = torch.arange(0, shape.n + 1, length, dtype=torch.int32, device=device)
        special = torch.tensor([0, 2, 3, 4], device=device)
        return (ids, cu, special, None, None, None, 4, 30_522, 0.15, 0.15 / 0.85, shape.scheme == "exact", 0.8, 0.1, 0, 0)
    x, y = (torch.randn(size, shape.d, device=device).bfloat16() for size in (shape.n, shape.m))
    tau = torch.tensor(0.05, device=device)
    if shape.op == "info_nce":
        return x, y, tau, None, shape.scheme, True, True, "mean", True, True
    target, start, end = torch.arange(shape.n, device=device) % shape.m, None, None
    if shape.keys < shape.m:
        start = (target // shape.keys * shape.keys).int()
        end = start + shape.keys
    return x, y, target, tau, start, end, None, None, True, "mean", True, True


def launched(shape: Shape, chip: Chip) -> dict[str, int]:
    """How often the launchers launch each kernel, found by running them on a driver that does not launch."""
    import triton.runtime.driver
    from triton.runtime.jit import JITFunction

    import cmlm_fast.kernels as kernels

    from .triton_static import Compiler

    triton.runtime.driver.set_active(Compiler(chip.config))
    kernels._chip.cache_clear()
    found: dict[str, int] = {}
    plain = JITFunction.run

    def count(self: Any, *_: Any, **__: Any) -> None:
        found[self.__name__] = found.get(self.__name__, 0) + 1

    JITFunction.run = count
    try:
        op(shape.op, "_triton")(*arguments(shape))
    finally:
        JITFunction.run = plain
    return found


def floor(shape: Shape, chip: Chip) -> float:
    """Least seconds of one call."""
    return sum(launch.floor(chip) for launch in launches(shape, chip))


def duration(seconds: float) -> str:
    """A time to three digits, with its unit."""
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def table(measured: dict[str, float] | None = None) -> list[str]:
    """The table in Markdown, one row per shape; `measured` maps "op label" to milliseconds of a bench_gpu run."""
    head = ["op", "shape", "operations counted", "done", "bytes", "launches", *(f"{chip} floor" for chip in CHIPS),
            "goal on H100, H200", *(["measured"] if measured else [])]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for shape in SHAPES:
        of = launches(shape, CHIPS["H100"])
        done, moved = sum(x.count * x.operations for x in of), sum(x.count * x.bytes for x in of)
        found = (measured or {}).get(shape.name)
        cells = [shape.op, shape.label, *(f"{x:.3g}" if x else "" for x in (shape.counted, done, moved)),
                 str(sum(launched(shape, CHIPS["H100"]).values())), *(duration(floor(shape, chip)) for chip in CHIPS.values()),
                 shape.goal, *([duration(found / 1e3) if found else ""] if measured else [])]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


TEXT = """# Floors of the Triton kernels

Made by `python -m benchmarks.roofline --write` from operations and bytes, for forward and backward, bfloat16 rows and int64
ids. A floor is the time that no run of these kernels can beat at the data sheets' rates, not counting launches. Each launch
is assumed to fetch its operands from memory, although small ones may still be in L2. docs/tuning.md has measurements on an
H100.

The counted operations are three products of the rows (two for nt_xent, whose scores are symmetric). The kernels do more,
since they compute the scores twice: for token_contrastive, {done:.3g} times the counted operations. So its goal, 60 % of the
matrix rate counting 6·N·M·D, requires the kernels to reach {asked:.0%} of that rate. Operations done, bytes and launches (of
Triton kernels alone) are those of the H100's configuration. In a call with tens of launches and little work, the launches
dominate: each is a Python call on the host, unless a CUDA graph holds them.

{table}

Rates, dense bfloat16:

{rates}
"""


def document() -> str:
    """The text of benchmarks/results/static/roofline.md."""
    first = SHAPES[0]
    done = sum(launch.count * launch.operations for launch in launches(first, CHIPS["H100"])) / first.counted
    rates = [f"- {name}: {chip.rate / 1e12:,.0f} TFLOP/s, {chip.bandwidth / 1e12:.3g} TB/s. {chip.source}."
             for name, chip in CHIPS.items()]  # fmt: skip
    return TEXT.format(done=done, asked=0.6 * done, table="\n".join(table()), rates="\n".join(rates))


def main() -> None:
    """Print or write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name}")
    options = parser.parse_args()
    os.environ["CMLM_FAST_TRITON_CONFIGS"] = ""  # the shipped entries
    if options.write:
        DOCUMENT.write_text(document(), encoding="utf-8")
    else:
        print(document())


if __name__ == "__main__":
    main()
