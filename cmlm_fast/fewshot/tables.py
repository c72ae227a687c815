"""Summarise the cells: mean ± standard deviation over draws, and the paired difference to a baseline with its interval.

The difference is taken draw by draw: both methods learn from the same labelled texts, with the same random numbers. Its
interval is the two-sided 95 % t interval of the mean, mean ± t(0.975, n − 1)·sd/√n; with one draw there is none. Row "all"
first averages each draw over the conditions (a data set and a number of shots), so its draws are independent as well.
"""

from __future__ import annotations

import csv
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..checkpoints import replacing
from .cells import CELLS, Cell, fingerprint, read_cells

logger = logging.getLogger(__name__)

_OF_A_METHOD = ("objective", "second", "whole_word", "contrast", "paraphrases")

#: A data set, the number of labelled texts per class, and a fingerprint of the texts, the start and the fine-tuning.
Condition = tuple[str, int, str]


class Row(NamedTuple):
    """One method under one condition, or under all of them; sd and difference are None if there are too few draws.

    difference, low, high, ahead and compared describe the accuracy relative to the baseline: mean, ends of the 95 % interval,
    the number of draws in which the method is ahead, and the number of draws that both have.
    """

    dataset: str
    shots: int | None
    setup: str
    method: str
    draws: int
    accuracy: float
    accuracy_sd: float | None
    macro_f1: float
    macro_f1_sd: float | None
    difference: float | None
    low: float | None
    high: float | None
    ahead: int
    compared: int
    post_train_seconds: float
    fine_tune_seconds: float
    encoder_tokens: float


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Ends of the 95 % t interval of the mean; None for fewer than two values.

    >>> [round(end, 3) for end in interval([0.1, 0.2, 0.3])]
    [-0.048, 0.448]
    """
    from scipy.stats import t

    if len(values) < 2:
        return None
    reach = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - reach), float(np.mean(values) + reach)


def rows_of(cells: Iterable[Cell], baseline: str = "ft") -> list[Row]:
    """A row for each condition and method, then, with several conditions, an "all" row for each method with a draw in all.

    A method run with several objectives gets a row for each, distinguished by its fingerprint; so does each post-trained
    method if schedules differ. There is no "all" if a data set and number of shots were run with several setups.
    """
    found = _by_condition(cells)
    rows = [_row(condition, name, [draws], [methods.get(baseline, {})], name == baseline)
            for condition, methods in found.items() for name, draws in methods.items()]  # fmt: skip
    if len(found) > 1 and len({condition[:2] for condition in found}) == len(found):
        for name in dict.fromkeys(name for methods in found.values() for name in methods):
            own, base = ([methods.get(one, {}) for methods in found.values()] for one in (name, baseline))
            if set.intersection(*map(set, own)):
                rows.append(_row(("all", 0, ""), name, own, base, name == baseline))
    return rows


def write_tables(folder: Path, cells: Sequence[Cell], baseline: str = "ft") -> list[Row]:
    """Write results.md, results.csv and results.png of the cells to `folder`."""
    from .picture import plot_differences

    rows = rows_of(cells, baseline)
    if all(row.method != baseline for row in rows):
        names = ", ".join(dict.fromkeys(row.method for row in rows))
        logger.warning("no differences: baseline %s is not among the methods of the cells, %s", baseline, names)
    machines = Counter(f"{cell['device']} with torch {cell['torch']}" for cell in cells if "device" in cell)
    with replacing(folder / "results.md") as path:
        path.write_text(markdown(rows, baseline) + _settings(cells) + _mixture(machines), encoding="utf-8")
    with replacing(folder / "results.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows)
    with replacing(folder / "results.png") as path:
        plot_differences(rows, baseline, path, with_several_setups(rows))
    return rows


def with_several_setups(rows: Iterable[Row]) -> set[str]:
    """The data sets run with more than one setup, whose setups must then be named."""
    setups = {(row.dataset, row.setup) for row in rows}
    return {dataset for dataset, count in Counter(dataset for dataset, _ in setups).items() if count > 1}


def _settings(cells: Sequence[Cell]) -> str:
    """How the setups in the headings and the methods with a # differ, if there are any."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for (dataset, _, setup), methods in _by_condition(cells).items():
        for name, draws in methods.items():
            cell = next(iter(draws.values()))
            groups.setdefault(f"setups of {dataset}", {})[f"{dataset}, setup {setup}"] = _flat(cell.get("setup", {}))
            if name != cell["method"]:
                groups.setdefault(name.partition(" #")[0], {})[name] = _flat({field: cell.get(field) for field in _OF_A_METHOD})
                groups.setdefault("schedules", {})[name] = _flat({"schedule": cell.get("schedule")})
    lines = []
    for named in groups.values():
        fields = dict.fromkeys(field for facts in named.values() for field in facts)
        differ = [field for field in fields if len({repr(facts.get(field)) for facts in named.values()}) > 1]
        for name, facts in named.items() if differ else ():
            lines.append(f"- {name}: " + ", ".join(f"{field} {facts.get(field)}" for field in differ))
    return "\n### How the settings differ\n\n" + "\n".join(lines) + "\n" if lines else ""


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted names."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _mixture(machines: Mapping[str, int]) -> str:
    if len(machines) < 2:
        return ""
    cells = ", ".join(f"{count} on {machine}" for machine, count in machines.items())
    return f"\nCells: {cells}. A difference may compare cells from two of these, whose random numbers are not paired.\n"


def tables_of(folder: Path, baseline: str = "ft") -> list[Row]:
    """`write_tables` for all cells of the folder's cells.jsonl."""
    cells = read_cells(folder / CELLS)
    if not cells:
        raise ValueError(f"expected output_dir to be a folder with a {CELLS} that holds cells, got {folder}")
    known = sorted({row.method for row in rows_of(cells, baseline)})
    if baseline not in known:
        raise ValueError(f"expected baseline to be among the methods of the cells, {', '.join(known)}, got {baseline}")
    return write_tables(folder, cells, baseline)


def markdown(rows: Sequence[Row], baseline: str) -> str:
    """One table per condition: accuracy, macro-F1, difference and time, in percent and seconds."""
    several = with_several_setups(rows)
    parts = [f"""Accuracy and macro-F1 in %, mean ± standard deviation over draws. Difference: accuracy against {baseline}
on the same draws, with the 95 % t interval of its mean. Seconds per draw: post-training + fine-tuning and scoring. Tokens:
what passed the encoder in post-training, both views."""]
    if overview := summary(rows, baseline):
        parts.append(f"\n### Differences in accuracy, `*`: the interval leaves out 0\n\n{overview}")
    last = None
    for row in rows:
        if row[:3] != last:
            last = row[:3]
            title = row.dataset if row.shots is None else f"{row.dataset}, {row.shots} labels per class"
            title = "Mean over all of the above" if row.shots is None else title
            title += f" (setup {row.setup})" if row.dataset in several else ""
            parts.append(f"\n### {title}\n\n| method | draws | accuracy | macro-F1 | difference | ahead | seconds | tokens |\n"
                         "|---|---|---|---|---|---|---|---|")  # fmt: skip
        parts.append(f"| {row.method} | {row.draws} | {_spread(row.accuracy, row.accuracy_sd)} | "
                     f"{_spread(row.macro_f1, row.macro_f1_sd)} | {_difference(row)} | "
                     f"{f'{row.ahead} of {row.compared}' if row.compared else ''} | {row.post_train_seconds:.0f} + "
                     f"{row.fine_tune_seconds:.0f} | {row.encoder_tokens / 1e6:.2f} M |")  # fmt: skip
    return "\n".join(parts) + "\n"


def summary(rows: Sequence[Row], baseline: str, methods: Sequence[str] = ()) -> str:
    """A row per condition, a column per method (default: all compared): accuracy of the baseline, then differences.

    Empty if there is only one condition, or if one was run with several setups.
    """
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        title = "mean over all" if row.shots is None else f"{row.dataset}, {row.shots}"
        if row.method in found.setdefault(title, {}):
            return ""
        found[title][row.method] = row
    columns = methods or tuple(dict.fromkeys(row.method for row in rows if row.difference is not None))
    if len(found) < 2 or not columns:
        return ""
    lines = ["| | " + " | ".join((baseline, *columns)) + " |", "|---" * (len(columns) + 2) + "|"]
    for title, of in found.items():
        start = f"{100 * of[baseline].accuracy:.1f}" if baseline in of else ""
        lines.append(f"| {title} | {start} | " + " | ".join(_marked(of.get(name)) for name in columns) + " |")
    return "\n".join(lines)


def _marked(row: Row | None) -> str:
    if row is None or row.difference is None:
        return ""
    apart = row.low is not None and row.high is not None and row.low * row.high > 0
    number, space, ends = _difference(row).partition(" ")
    return number + ("\\*" if apart else "") + space + ends


def _by_condition(cells: Iterable[Cell]) -> dict[Condition, dict[str, dict[int, Cell]]]:
    """condition -> method -> draw -> cell; data sets and shots sorted, setups and methods in order of appearance."""
    found: dict[Condition, dict[str, dict[int, Cell]]] = {}
    cells = list(cells)
    kinds: dict[tuple[str, str], set[str]] = {}
    for cell in cells:
        kinds.setdefault(_kind(cell), set()).add(cell["method_id"])
    schedules = {fingerprint(cell["schedule"]) for cell in cells if cell.get("schedule") is not None}
    for cell in cells:
        condition = (cell["dataset"], cell["shots"], cell["setup_id"])
        several = len(kinds[_kind(cell)]) > 1 or (cell.get("schedule") is not None and len(schedules) > 1)
        name = cell["method"] + (f" #{cell['method_id'][:6]}" if several else "")
        found.setdefault(condition, {}).setdefault(name, {})[cell["draw"]] = cell
    return dict(sorted(found.items(), key=lambda item: item[0][:2]))


def _kind(cell: Cell) -> tuple[str, str]:
    """The scope in which a method should be unique: all data sets, or one if the method uses its paraphrases."""
    return (cell["dataset"] if cell.get("paraphrases") else "", cell["method"])


def _row(condition: Condition, method: str, own: Sequence[Mapping[int, Cell]], base: Sequence[Mapping[int, Cell]],
         is_baseline: bool) -> Row:  # fmt: skip
    """A row over the draws (at least one) that all parts of `own` share; the difference is over those also in `base`."""
    draws = sorted(set.intersection(*(set(part) for part in own)))

    def mean(parts: Sequence[Mapping[int, Cell]], field: str) -> list[float]:
        return [float(np.mean([part[d][field] for part in parts])) for d in draws]

    def sd(values: Sequence[float]) -> float | None:
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    accuracy, f1 = mean(own, "accuracy"), mean(own, "macro_f1")
    shared = [d for d in draws if all(d in part for part in base)]
    apart = [float(np.mean([one[d]["accuracy"] - two[d]["accuracy"] for one, two in zip(own, base, strict=True)]))
             for d in shared] if not is_baseline else []  # fmt: skip
    low, high = interval(apart) or (None, None)
    return Row(
        condition[0], condition[1] or None, condition[2], method, len(draws), float(np.mean(accuracy)),
        sd(accuracy), float(np.mean(f1)), sd(f1), float(np.mean(apart)) if apart else None, low, high,
        sum(value > 1e-9 for value in apart), len(apart),  # equal means over conditions may differ in the last bit
        *(float(np.mean(mean(own, field))) for field in ("post_train_seconds", "fine_tune_seconds", "encoder_tokens")),
    )  # fmt: skip


def _spread(mean: float, sd: float | None) -> str:
    return f"{100 * mean:.1f}" + ("" if sd is None else f" ± {100 * sd:.1f}")


def _difference(row: Row) -> str:
    if row.difference is None:
        return ""
    text = _points(row.difference)
    return text if row.low is None or row.high is None else f"{text} [{_points(row.low)}, {_points(row.high)}]"


def _points(difference: float) -> str:
    return f"{round(100 * difference, 9) + 0.0:+.1f}"  # + 0.0: only a value below 0 may print as "-0.0"
