"""The pictures of a report. Each takes the results and a path, and returns the path, or None if there is nothing to show."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cmlm_fast.report import new_figure

from . import run
from .results import Results, Row, automatic, best_other

OURS, OTHER = "#d62728", "#8a94a0"
#: A provider has the same colour in every picture; ours are drawn thick.
COLOURS = {
    "ours/cpp": OURS,
    "ours/cuda": OURS,
    "ours/python": OURS,
    "ours/triton": "#ff7f0e",
    "ours/reference": "#e7969c",
    "eager": "#7f7f7f",
    "torch.compile": "#1f77b4",
    "F.linear_cross_entropy": "#17becf",
    "sentence-transformers": "#2ca02c",
    "info-nce-pytorch": "#9467bd",
    "pytorch-metric-learning": "#8c564b",
    "cut-cross-entropy": "#bcbd22",
    "torch_mask_tokens": "#1f77b4",
    "torch_mask_tokens, told": "#17becf",
}


def _figure(columns: int, width: float, height: float, rows: int = 1) -> tuple[Any, list[Any]]:
    figure = new_figure(rows, columns, width, height)
    for panel in figure.axes:
        panel.grid(alpha=0.25, which="both", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(figure.axes)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    return path


def _thick(providers: Iterable[str]) -> set[str]:
    """Which of one op's providers are drawn as ours: our kernels, or the reference if there are none."""
    mine = {name for name in providers if name.startswith("ours/")}
    return mine - {"ours/reference"} or mine


def _look(provider: str, thick: bool) -> dict[str, Any]:
    colour = OURS if thick and provider == "ours/reference" else COLOURS.get(provider, "#555555")
    mark, width, order = ("o", 2.6, 3) if thick else (".", 1.3, 2)
    return {"color": colour, "linewidth": width, "zorder": order, "marker": mark, "markersize": 6}


def sweeps(found: Results, path: Path) -> Path | None:
    """Time over size, both logarithmic; the band is p20 to p80."""
    groups: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in found.rows:
        if row.sweep:
            groups.setdefault((row.op, row.sweep), {}).setdefault(row.provider, []).append(row)
    if not groups:
        return None
    exponents = {(op, axis, name): exponent for op, axis, name, exponent, _ in found.slopes()}
    figure, panels = _figure(2, 6.4, 4.4, -(-len(groups) // 2))
    for panel, ((op, axis), lines) in zip(panels, groups.items(), strict=False):
        for provider, rows in lines.items():
            rows = sorted(rows, key=lambda r: r.sizes[axis])
            look = _look(provider, provider in _thick(lines))
            x = [r.sizes[axis] for r in rows]
            exponent = exponents.get((op, axis, provider))
            label = provider + ("" if exponent is None else f"  ∝ {axis}^{exponent:.2f}")
            panel.plot(x, [r.p50 * 1e3 for r in rows], label=label, **look)
            panel.fill_between(
                x, [r.p20 * 1e3 for r in rows], [r.p80 * 1e3 for r in rows], color=look["color"], alpha=0.15
            )
        fixed = {name: value for name, value in rows[0].sizes.items() if name != axis and value not in (False, 0, True)}
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms per call",
                  title=f"{op}\n{', '.join(f'{k} {v}' for k, v in fixed.items())}")  # fmt: skip
        ticks = sorted({r.sizes[axis] for rs in lines.values() for r in rs})
        panel.set_xticks(ticks, [f"{t:,}" for t in ticks])
        panel.minorticks_off()
        panel.legend(fontsize=8, frameon=False)
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    return _save(figure, path)


def roofline(found: Results, path: Path) -> Path | None:
    """Rate over operations per byte, below the machine's limits; then each row's share of its own ceiling."""
    kind = found.machine["type"]
    groups = [(op, shape, ours, others) for (op, shape), rows in found.groups().items()
              if (ours := automatic(rows, kind)) and (others := [r for r in rows if not r.is_ours])]  # fmt: skip
    dense = [(ours, min(others, key=lambda r: r.p50)) for _, _, ours, others in groups if ours.unit == "TFLOP/s"]
    if not dense:
        return None
    figure, panels = _figure(2, 7.4, max(5.0, 0.27 * len(groups)))
    copy = found.ceilings["copy GB/s"]
    low = min(r.work / r.traffic for pair in dense for r in pair) / 3
    high = max(r.work / r.traffic for pair in dense for r in pair) * 3
    for name, style in (("float32", "-"), ("bfloat16", "--")):
        top = found.ceilings[f"{name} TFLOP/s"]
        xs = [low, max(low, top * 1e3 / copy), high]
        panels[0].plot(
            xs,
            [min(top, x * copy / 1e3) for x in xs],
            style,
            color="black",
            label=f"{name} products, {top:.2g} TFLOP/s",
        )
    colours = {op: f"C{i}" for i, op in enumerate(dict.fromkeys(ours.op for ours, _ in dense))}
    for ours, other in dense:
        x, colour = ours.work / ours.traffic, colours[ours.op]
        kind = ours.sizes.get("dtype", "float32")
        fill = colour if kind == "float32" else "none"
        panels[0].plot([x, x], [other.rate, ours.rate], color=colour, linewidth=0.8, alpha=0.5)
        panels[0].plot(x, ours.rate, "o", color=colour, markerfacecolor=fill, markersize=8)
        panels[0].plot(x, other.rate, "x", color=colour, markersize=6)
    for op, colour in colours.items():
        panels[0].plot([], [], "o", color=colour, label=op)
    panels[0].plot([], [], "o", color="gray", label="ours, float32")
    panels[0].plot([], [], "o", color="gray", markerfacecolor="none", label="ours, bfloat16")
    panels[0].plot([], [], "x", color="gray", label="fastest other")
    panels[0].set(xscale="log", yscale="log", xlabel="operations a byte of inputs and outputs", ylabel="TFLOP/s",
                  title="Roofline: the least work of the task over its time")  # fmt: skip
    panels[0].legend(fontsize=8, frameon=False, loc="lower right")
    shown = [
        (f"{op}  {shape}", ours, min(others, key=lambda r: r.p50))
        for op, shape, ours, others in groups
        if ours.ceiling_share
    ]
    for y, (_, ours, other) in enumerate(reversed(shown)):
        panels[1].barh(y + 0.18, ours.ceiling_share, 0.36, color=OURS, label="ours" if y == 0 else None)
        panels[1].barh(y - 0.18, other.ceiling_share or 0, 0.36, color=OTHER, label="fastest other" if y == 0 else None)
    panels[1].axvline(1, color="black", linewidth=1)
    panels[1].set_yticks(range(len(shown)), [label for label, *_ in reversed(shown)], fontsize=7)
    panels[1].set(title="Share of the row's ceiling: products alone, or a copy", xlabel="share", xlim=(0, None))
    panels[1].legend(fontsize=8, frameon=False)
    return _save(figure, path)


def memory(found: Results, path: Path) -> Path | None:
    """Bytes that one call holds beyond its inputs: one panel per op, at its largest shape, with one bar per provider."""
    largest: dict[str, list[Row]] = {}
    for (op, _), group in found.groups().items():
        rows = [r for r in group if r.peak_bytes is not None and r.unit != "Mtoken/s"]
        if len(rows) > 1 and rows[0].work >= (largest[op][0].work if op in largest else 0):
            largest[op] = sorted(rows, key=lambda r: -(r.peak_bytes or 0))
    if not largest:
        return None
    figure, panels = _figure(3, 4.8, 3.3, -(-len(largest) // 3))
    for panel, (op, rows) in zip(panels, largest.items(), strict=False):
        mine = _thick(r.provider for r in rows)
        colours = [OURS if r.provider in mine else OTHER for r in rows]
        bars = panel.barh([r.provider for r in rows], [(r.peak_bytes or 0) / 1e6 for r in rows], color=colours)
        panel.bar_label(bars, [run.memory(r.peak_bytes) for r in rows], fontsize=8, padding=3)
        panel.set_title(f"{op}\n{rows[0].shape}", fontsize=9)
        panel.set_xlabel("MB")
        panel.tick_params(axis="y", labelsize=8)
        panel.margins(x=0.25)
        panel.grid(visible=False, axis="y", which="both")
    for panel in panels[len(largest) :]:
        panel.set_visible(False)
    return _save(figure, path)


def ratios(found: Results, path: Path) -> Path | None:
    """How many times faster ours is than the fastest other, one bar per shape."""
    shown = []
    for (op, shape), group in found.groups().items():
        ours = automatic(group, found.machine["type"])
        other = ours and best_other(ours, group)
        if ours and other:
            shown.append((f"{op}  {shape}", other.p50 / ours.p50, other.provider))
    if not shown:
        return None
    figure, (panel,) = _figure(1, 11, max(3.0, 0.3 * len(shown) + 1))
    shown.reverse()
    values = [ratio for _, ratio, _ in shown]
    panel.barh(range(len(shown)), [r - 1 for r in values], left=1, color=[OURS if r >= 1 else OTHER for r in values])
    for y, (_, ratio, other) in enumerate(shown):
        panel.text(max(ratio, 1) * 1.04, y, f"{ratio:.2f} ×  {other}", va="center", fontsize=8)
    panel.axvline(1, color="black", linewidth=1)
    panel.set_yticks(range(len(shown)), [label for label, *_ in shown], fontsize=8)
    panel.set(xscale="log", xlim=(min(*values, 1) * 0.8, max(*values, 1) * 8))
    panel.set_xlabel("time of the fastest other ÷ time of ours (right of 1: ours is faster)")
    panel.margins(y=0.02)
    panel.grid(visible=False, axis="y", which="both")
    return _save(figure, path)


PICTURES: dict[str, Callable[[Results, Path], Path | None]] = {
    "Ours beside the fastest other": ratios,
    "How cost grows": sweeps,
    "How near the machine's limits": roofline,
    "Peak memory of one call": memory,
}
