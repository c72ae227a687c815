"""Plot the tables: each method's difference to the baseline, one panel per condition."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..report import new_figure

if TYPE_CHECKING:
    from .tables import Row

_COLUMNS = 4


def plot_differences(rows: Sequence[Row], baseline: str, path: Path, with_setup: Collection[str] = ()) -> None:
    """Draw points with 95 % intervals; a method without a difference to the baseline gets none.

    Titles of the data sets in `with_setup` show the first digits of the setup's fingerprint.
    """
    compared = [row for row in rows if row.difference is not None] or rows
    panels = list(dict.fromkeys(row[:3] for row in compared))
    methods = [name for name in dict.fromkeys(row.method for row in rows) if name != baseline]
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    longest = max(map(len, methods), default=0)
    figure = new_figure(lines, columns, width=3.0 + 0.06 * longest, height=1.4 + 0.28 * max(1, len(methods)))
    for axes, panel in zip(figure.axes, panels, strict=False):
        found = {row.method: row for row in rows if row[:3] == panel}
        for place, name in enumerate(methods):
            row = found.get(name)
            if row is not None and row.difference is not None:
                ends = None if row.low is None else [[100 * (row.difference - row.low)]] * 2
                axes.errorbar(100 * row.difference, place, xerr=ends, fmt="o", color="C0", capsize=3)
        dataset, shots, setup = panel
        base = found.get(baseline)
        start = "" if base is None else f"\n{baseline} {100 * base.accuracy:.1f} %"
        title = "mean over all" if shots is None else f"{dataset}, {shots} per class"
        axes.set_title(title + (f" ({setup[:4]})" if dataset in with_setup else "") + start, fontsize=9)
        axes.axvline(0.0, color="C7", linewidth=1)
        axes.set(yticks=range(len(methods)), ylim=(max(1, len(methods)) - 0.5, -0.5))
        axes.set_yticklabels(methods, fontsize=8)
        axes.set_xlabel(f"accuracy − {baseline}, points", fontsize=8)
        axes.grid(alpha=0.3)
    for axes in figure.axes[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=120)
