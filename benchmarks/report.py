"""A run in pictures and tables: report.md with PNG files beside it, and report.html, one page that holds all of it."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from . import run
from .pictures import PICTURES
from .results import Results, Row


def write(found: Results, folder: Path) -> list[Path]:
    """Write the report into the folder; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {title: draw(found, folder / f"{draw.__name__}.png") for title, draw in PICTURES.items()}
    pictures = {title: path for title, path in drawn.items() if path is not None}
    markdown, page = folder / "report.md", folder / "report.html"
    parts = [f"# {_title(found)}", _about(found)]
    for title, path in pictures.items():
        parts += [f"## {title}", f"![{title}]({path.name})"]
    if slopes := slope_rows(found):
        parts += ["## How cost grows, as exponents", _table(("op", "axis", "provider", "exponent", "sizes"), slopes)]
    parts.append("## All rows")
    for (op, shape), group in found.groups().items():
        parts += [f"### {op}: {shape}", _table(run.HEADS, [run.cells(row, group) for row in group])]
    if found.absent:
        parts += ["## Not run, and why", "\n".join(f"- {line}" for line in run.absences(found.absent))]
    markdown.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    page.write_text(_page(found, pictures), encoding="utf-8")
    return [markdown, page, *pictures.values()]


def slope_rows(found: Results) -> list[tuple[str, ...]]:
    return [(op, axis, name, f"{exponent:.2f}", str(n)) for op, axis, name, exponent, n in found.slopes()]


def _title(found: Results) -> str:
    return f"cmlm_fast on {found.machine['device']}"


def _about(found: Results) -> str:
    m = found.machine
    tops = ", ".join(f"{name.split()[0]} {value:.3g} {name.split()[1]}" for name, value in found.ceilings.items())
    versions = ", ".join(f"{name} {number}" for name, number in found.versions.items() if number)
    where = (
        f"{m['threads']} threads, {m['instruction set']}, Python {m['python']}, {m['system']}, load {m['load']} before"
    )
    return (
        f"{found.date}, commit {found.commit}, {where}. {versions}. Measured in this run: {tops}. A ratio above 1 means faster "
        "than the best other. The ceiling of a row is its matrix products alone, or a copy of as many bytes, timed in the same "
        "rounds."
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1c2733}
h1{font-size:1.6rem}h2{margin-top:2.2rem;border-bottom:1px solid #dde3e9}img{max-width:100%;height:auto}
table{border-collapse:collapse;margin:.4rem 0 1rem;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:.22rem .7rem;text-align:right;border-bottom:1px solid #e7ebef;white-space:nowrap}
th:first-child,td:first-child{text-align:left}tr.ours{background:#fdeeee}tr.best td{font-weight:600}
summary{cursor:pointer;font-weight:600;margin:.5rem 0}.about{color:#51606e}.wide{overflow-x:auto}"""


def _page(found: Results, pictures: dict[str, Path]) -> str:
    """The HTML page; pictures are inside it, and it asks the network for nothing."""
    parts = [f"<h1>{html.escape(_title(found))}</h1><p class=about>{html.escape(_about(found))}</p>"]
    for title, path in pictures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(
            f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
        )
    if slopes := slope_rows(found):
        parts += [
            "<h2>How cost grows, as exponents</h2>",
            _html_table(("op", "axis", "provider", "exponent", "sizes"), slopes),
        ]
    parts.append("<h2>All rows</h2>")
    by_op: dict[str, list[tuple[str, list[Row]]]] = {}
    for (op, shape), group in found.groups().items():
        by_op.setdefault(op, []).append((shape, group))
    for op, shapes in by_op.items():
        parts.append(f"<details open><summary>{html.escape(op)}</summary>")
        for shape, group in shapes:
            fastest = min(group, key=lambda r: r.p50)
            classes = [" ".join(["ours"] * row.is_ours + ["best"] * (row is fastest)) for row in group]
            parts += [
                f"<p>{html.escape(shape)}</p>",
                _html_table(run.HEADS, [run.cells(row, group) for row in group], classes),
            ]
        parts.append("</details>")
    if found.absent:
        items = "".join(f"<li>{html.escape(line)}</li>" for line in run.absences(found.absent))
        parts.append(f"<h2>Not run, and why</h2><ul>{items}</ul>")
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{html.escape(_title(found))}</title>"
    return f"<!doctype html><html lang=en>{head}<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    lines = [
        f'<tr class="{classes[i] if classes else ""}">{"".join(f"<td>{html.escape(text)}</td>" for text in row)}</tr>'
        for i, row in enumerate(rows)
    ]
    return f"<div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div>"
