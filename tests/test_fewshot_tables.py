"""The tables of few-shot cells: paired differences and their intervals, what is told apart, and the committed ones."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cmlm_fast.cli import app
from cmlm_fast.fewshot import picture
from cmlm_fast.fewshot.cells import append_cell, read_cells
from cmlm_fast.fewshot.tables import interval, markdown, rows_of, tables_of, write_tables


def made_up(accuracy, method, d, dataset="a", shots=4):
    return {"dataset": dataset, "method": method, "shots": shots, "draw": d, "accuracy": accuracy, "macro_f1": accuracy / 2,
            "fine_tune_seconds": 1.0, "post_train_seconds": 2.0, "encoder_tokens": 3, "setup_id": "s",
            "method_id": method, "device": "cpu", "torch": "2.13.0"}  # fmt: skip


def test_differences_are_paired_and_have_their_interval():
    from scipy.stats import ttest_rel

    random = np.random.default_rng(0)
    ft, cmlm = random.random(5), random.random(5)
    cells = [made_up(x, name, d) for name, values in (("ft", ft), ("cmlm", cmlm)) for d, x in enumerate(values)]
    base, row = rows_of(cells)
    assert base.difference is None and row.accuracy == pytest.approx(cmlm.mean())
    assert row.accuracy_sd == pytest.approx(cmlm.std(ddof=1)) and row.macro_f1 == pytest.approx(cmlm.mean() / 2)
    expected = ttest_rel(cmlm, ft).confidence_interval(0.95)
    assert (row.low, row.high) == pytest.approx(tuple(expected)) and row.difference == pytest.approx((cmlm - ft).mean())
    assert (row.ahead, row.compared) == ((cmlm > ft).sum(), 5) and interval([0.1]) is None
    # A second condition: the mean over both is taken draw by draw, over the draws that both have.
    cells += [made_up(x + 0.1, name, d, "b") for name, values in (("ft", ft), ("cmlm", cmlm)) for d, x in enumerate(values[:3])]
    last = rows_of(cells)[-1]
    assert (last.dataset, last.method, last.draws) == ("all", "cmlm", 3)
    assert last.accuracy == pytest.approx(cmlm[:3].mean() + 0.05) and last.difference == pytest.approx((cmlm - ft)[:3].mean())
    noise = [made_up(x, name, 0, data) for data, pair in (("a", (0.1, 0.3)), ("b", (0.3, 0.1)))
             for name, x in zip(("ft", "cmlm"), pair, strict=True)]  # fmt: skip
    assert rows_of(noise)[-1].ahead == 0 and "| -0.0 |" not in markdown(rows_of(noise), "ft")
    # The same name with another objective gets its own row.
    names = [row.method for row in rows_of([*cells[:10], {**made_up(0.9, "cmlm", 0), "method_id": "other"}])]
    assert names == ["ft", "cmlm #cmlm", "cmlm #other"]
    # Different schedules side by side are told apart; a condition with two setups enters no overall mean.
    tapt, cmlm = ({**made_up(0.9, name, 0), "schedule": {"epochs": n}} for n, name in enumerate(("tapt", "cmlm")))
    assert [row.method for row in rows_of([cells[0], tapt, cmlm])] == ["ft", "tapt #tapt", "cmlm #cmlm"]
    assert [row.dataset for row in rows_of([cells[0], {**cells[0], "setup_id": "t"}, cells[10]])] == ["a", "a", "b"]


def test_a_method_without_a_draw_that_all_conditions_have_is_in_no_mean_over_all():
    cells = [made_up(0.5, "ft", d, name) for name in "ab" for d in range(2)]
    rows = rows_of([*cells, made_up(0.6, "cmlm", 0), made_up(0.7, "cmlm", 1, "b")])
    assert [(row.method, row.accuracy) for row in rows if row.dataset == "all"] == [("ft", 0.5)]
    assert "nan" not in markdown(rows, "ft")


def test_the_picture_draws_points_in_percent_with_their_intervals(tmp_path, monkeypatch):
    figures, new = [], picture.new_figure
    monkeypatch.setattr(picture, "new_figure", lambda *args, **options: figures.append(new(*args, **options)) or figures[-1])
    scores = {"ft": (0.5, 0.6, 0.7), "tapt": (0.54, 0.63, 0.75), "cmlm": (0.4, 0.5, 0.6)}
    rows = rows_of([made_up(score, name, d) for name, three in scores.items() for d, score in enumerate(three)], "ft")
    picture.plot_differences(rows, "ft", tmp_path / "out.png")
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["tapt", "cmlm"]
    for place, (points, (low, high)) in enumerate(zip((4.0, -10.0), ((1.52, 6.48), (-10.0, -10.0)), strict=True)):
        point, _, (bar,) = axes.containers[place]
        assert point.get_xdata()[0] == pytest.approx(points) and point.get_ydata()[0] == place
        assert bar.get_segments()[0][:, 0].tolist() == pytest.approx([low, high], abs=0.01)


def test_no_difference_is_no_star_and_the_printed_table_names_the_baseline(tmp_path):
    cells = [made_up(0.5, name, d, data) for name in ("ft", "tapt") for d in range(3) for data in "ab"]
    assert "\\*" not in markdown(rows_of(cells), "ft")
    for number, one in enumerate(cells):
        append_cell(tmp_path / "cells.jsonl", {"key": str(number), **one})
    printed = CliRunner().invoke(app, ["few-shot-table", str(tmp_path), "--baseline", "tapt"]).output
    assert "against tapt" in printed and printed.rstrip() in (tmp_path / "results.md").read_text()


def test_a_picture_that_cannot_be_drawn_leaves_the_earlier_one_and_no_draft(tmp_path, monkeypatch):
    def half(rows, baseline, path, with_setup):
        path.write_text("half")
        raise OSError("no space")

    (tmp_path / "results.png").write_text("earlier")
    monkeypatch.setattr(picture, "plot_differences", half)
    with pytest.raises(OSError, match="no space"):
        write_tables(tmp_path, [made_up(0.5, "ft", 0)], "ft")
    assert {path.name for path in tmp_path.iterdir()} == {"results.md", "results.csv", "results.png"}
    assert (tmp_path / "results.png").read_text() == "earlier"


def test_a_baseline_that_was_not_run_is_told(tmp_path, caplog):
    write_tables(tmp_path, [made_up(0.5, "ft", 0), made_up(0.6, "cmlm", 0)], "tapt")
    assert "no differences: baseline tapt is not among the methods of the cells, ft, cmlm" in caplog.text


def test_the_tables_say_where_cells_of_several_machines_are_mixed(tmp_path):
    cells = [made_up(0.5, "ft", 0), made_up(0.6, "cmlm", 0)]
    write_tables(tmp_path, cells)
    assert "A difference may be" not in (tmp_path / "results.md").read_text(encoding="utf-8")
    write_tables(tmp_path, [cells[0], {**cells[1], "device": "NVIDIA H100"}])
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "Cells: 1 on cpu with torch 2.13.0, 1 on NVIDIA H100 with torch 2.13.0." in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.md", "results.png"]


def test_the_tables_say_in_what_settings_differ(tmp_path):
    def cell(name, rate=2e-4, epochs=2, mask=0.3, model="start"):
        setup = {"model": model, "fine_tuning": {"learning_rate": rate, "epochs": 10.0}, "max_length": 128}
        post = {} if name == "ft" else {"objective": {"rate": mask, "scope": "batch"}, "schedule": {"epochs": epochs}}
        ids = {"setup_id": str(rate), "method_id": f"{mask}{epochs}" if post else "ft"}
        return {**made_up(0.5, name, 0), **ids, "setup": setup, **post}

    write_tables(tmp_path, [cell("ft"), cell("cmlm"), cell("tapt", mask=0.15)])
    assert "settings" not in (tmp_path / "results.md").read_text(encoding="utf-8")
    write_tables(tmp_path, [cell("ft"), cell("ft", rate=2e-5, model="other"), cell("cmlm"), cell("cmlm", mask=0.4),
                            cell("tapt", epochs=4, mask=0.15)])  # fmt: skip
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert text.endswith("""### How the settings differ

- a, setup 0.0002: model start, fine_tuning.learning_rate 0.0002
- a, setup 2e-05: model other, fine_tuning.learning_rate 2e-05
- cmlm #0.32: objective.rate 0.3
- cmlm #0.42: objective.rate 0.4
- cmlm #0.32: schedule.epochs 2
- cmlm #0.42: schedule.epochs 2
- tapt #0.154: schedule.epochs 4
""")


def test_every_heading_of_a_data_set_with_several_setups_carries_its_own(tmp_path):
    first, other = {"setup_id": "s"}, {"setup_id": "a"}
    cells = [made_up(0.5, "ft", 0) | first, made_up(0.5, "ft", 0) | other, made_up(0.5, "ft", 0, shots=8) | other,
             made_up(0.5, "ft", 0, "b") | {"setup_id": "b"}]  # fmt: skip
    assert [row.setup for row in rows_of(cells)] == ["s", "a", "a", "b"]  # in the order they were run
    write_tables(tmp_path, cells)
    headings = [line for line in (tmp_path / "results.md").read_text(encoding="utf-8").splitlines() if line.startswith("### ")]
    assert headings == ["### a, 4 labels per class (setup s)", "### a, 4 labels per class (setup a)",
                        "### a, 8 labels per class (setup a)", "### b, 4 labels per class"]  # fmt: skip


@pytest.mark.parametrize(("cut", "kept"), [(1, ["1", "3"]), (0, ["1", "2", "3"])])
def test_a_torn_line_costs_that_line_alone(cut, kept, tmp_path, caplog):
    path, (one, two, three) = tmp_path / "cells.jsonl", ({"key": key, **made_up(0.5, "ft", 0)} for key in "123")
    append_cell(path, one)
    with path.open("a") as file:
        file.write(json.dumps(two)[: -cut or None])
    assert [cell["key"] for cell in read_cells(path)] == kept[:-1]
    assert ("line 2 is not a cell" in caplog.text) == (len(kept) == 2)
    append_cell(path, three)
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == kept  # for any reader


def test_a_line_that_is_no_cell_is_skipped_and_named(tmp_path, caplog):
    path = tmp_path / "cells.jsonl"
    append_cell(path, {"key": "1", **made_up(0.5, "ft", 0)})
    with path.open("a") as file:
        file.write('{"a": 1}\n5\nnull\n')
    assert [row.method for row in tables_of(tmp_path)] == ["ft"]
    assert all(f"line {number} is not a cell and was skipped" in caplog.text for number in (2, 3, 4))


def test_a_full_disk_leaves_whole_lines(tmp_path):
    path = tmp_path / "cells.jsonl"
    append_cell(path, {"key": "1"})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            append_cell(path, {"key": "2"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["1"]


RESULTS = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("fewshot*/cells.jsonl"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_committed_tables_are_made_of_the_committed_cells(path, tmp_path):
    write_tables(tmp_path, read_cells(path))
    for name in ("results.md", "results.csv"):
        assert (path.parent / name).read_text(encoding="utf-8") == (tmp_path / name).read_text(encoding="utf-8")
