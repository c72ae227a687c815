"""The report of a run: tables on the terminal, curves in a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

#: Panels of the curves: title, axis label, and the logged values to draw, if there are any.
_PANELS = (
    ("Loss", "loss (nats)", ("loss", "mlm", "token", "sequence")),
    ("Retrieval and prediction", "share correct", ("masked_accuracy", "token_retrieval", "sequence_retrieval")),
    ("Similarity of the two views", "cosine", ("positive_similarity", "negative_similarity")),
)


def print_table(console: Console, title: str, rows: Mapping[str, object], headings: Sequence[str] = ()) -> None:
    """Print one table: a name per row, and its value or (for a tuple) its values, right-aligned.

    Example:
        >>> print_table(Console(quiet=True), "Run", {"texts": 8530, "perplexity": (31.2, 12.9)}, ("", "before", "after"))
    """
    columns = max((len(value) for value in rows.values() if isinstance(value, tuple)), default=1)
    table = Table(title=title, title_justify="left", show_header=bool(headings))
    table.add_column(headings[0] if headings else "")
    for i in range(columns):
        table.add_column(headings[i + 1] if headings else "", justify="right")
    for name, value in rows.items():
        # As Text, since brackets in a folder's name are not markup.
        table.add_row(Text(name), *(Text(show(part)) for part in (value if isinstance(value, tuple) else (value,))))
    console.print(table)


def show(value: object) -> str:
    """Format a value for the tables: thousands separators, four significant digits, a dash if not measured.

    >>> show(8530), show(8530.4), show(0.123456), show(None)
    ('8,530', '8,530', '0.1235', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def plot_curves(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the logged values over optimizer steps: lines for training, dots for the held-out texts (eval_*)."""
    figure = new_figure(1, len(_PANELS))
    for axes, (title, label, names) in zip(figure.axes, _PANELS, strict=True):
        for number, name in enumerate(names):
            colour = f"C{number}"
            for prefix, style, text in (("", "-", name), ("eval_", "o--", f"{name}, held out")):
                points = [(r["step"], r[prefix + name]) for r in records if r.get(prefix + name) is not None]
                if points:
                    look = {"color": colour, "markersize": 5, "label": text.replace("_", " ")}
                    axes.plot(*zip(*points, strict=True), style if len(points) > 1 else "o", **look)
        axes.set(title=title, xlabel="optimizer step", ylabel=label)
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))  # clear of the curves
        else:
            axes.text(0.5, 0.5, "not logged in this run", ha="center", va="center", transform=axes.transAxes)
    figure.savefig(path, dpi=120)


def new_figure(rows: int, columns: int, width: float = 4.6, height: float = 4.0) -> Any:
    """A figure of rows × columns axes, sizes in inches. Avoids pyplot, whose window system belongs to the user."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    figure.subplots(rows, columns)
    return figure


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print the summary of a post-training run as two tables."""
    console = Console()
    texts, sequences = summary["texts"], summary["sequences"]
    facts = {
        "texts read": texts["rows"], "empty": texts["empty"], "duplicates": texts["duplicates"],
        "sequences trained on": sequences["train"], "sequences held out": sequences["held_out"],
        "optimizer steps": summary["steps"], "seconds": float(summary["train_seconds"]),
        "written to": summary["options"]["output_dir"],
    }  # fmt: skip
    print_table(console, "Post-training", facts)
    if scores := summary["held_out_before_after"]:
        rows = {name.replace("_", " "): tuple(pair) for name, pair in scores.items()}
        print_table(console, "Held-out text", rows, ("", "before", "after"))


def plot_demo(summary: Mapping[str, Any], result: Mapping[str, Any], path: Path) -> None:
    """Plot the demo's table: three scores on held-out text, and the few-shot accuracies, before and after."""
    figure = new_figure(1, 4, width=3.2)
    scores = result["held_out_before_after"]
    panels = (("MLM perplexity", "perplexity"), ("Masked-token retrieval", "token_retrieval"),
              ("Sequence retrieval", "sequence_retrieval"))  # fmt: skip
    for axes, (title, name) in zip(figure.axes, panels, strict=False):
        bars = axes.bar(("before", "after"), scores[name], color=("C7", "C0"))
        axes.bar_label(bars, fmt=show)
        axes.margins(y=0.12)  # room for the numbers
        axes.set(title=title, yscale="log" if name == "perplexity" else "linear")
    axes = figure.axes[-1]
    accuracy = result["few_shot"]["accuracy"]
    for before, after in zip(*accuracy.values(), strict=True):
        axes.plot((0, 1), (before, after), "o-", color="C0", alpha=0.6)
    axes.set(title=f"Accuracy, {result['shots']} labels per class\n(a line each draw)", xticks=(0, 1), xlim=(-0.3, 1.3))
    axes.set_xticklabels(list(accuracy))
    figure.suptitle(f"{summary['steps']} steps of post-training, {summary['train_seconds']:.0f} s")
    figure.savefig(path, dpi=120)
