"""`make gpu` without a GPU: the dry run, and what the driver does with steps that fail or do not end."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import DRY_PATIENCE, LIMIT, STEPS, Step
from benchmarks.gpu_results import head


def drive(monkeypatch, tmp_path, *options, steps=STEPS):
    """Exit code of the driver, and each step's outcome."""
    monkeypatch.setattr(gpu, "STEPS", steps)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), *options])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    file = tmp_path / "gpu.json"
    return end.value.code, {o["step"]: o["outcome"] for o in json.loads(file.read_text())} if file.exists() else {}


def python(name, code, seconds=60, needs_gpu=False):
    return Step(name, (sys.executable, "-c", code), seconds, gpu=needs_gpu)


def test_budgets_leave_the_run_below_nine_minutes():
    assert sum(step.seconds for step in STEPS if not (step.asked or step.beside)) <= LIMIT < 9 * 60
    for step, after in pairwise(STEPS):
        assert not step.beside or step.seconds <= after.seconds  # ends no later than the next one
    assert len({step.name for step in STEPS}) == len(STEPS)


def test_every_file_with_gpu_tests_is_run():
    marked = re.compile(r"^from sweep import .*\b(cases|DEVICES)\b|^\W*pytest\.mark\.gpu", re.MULTILINE)
    found = {f"tests/{path.name}" for path in Path(__file__).parent.glob("test_*.py") if marked.search(path.read_text())}
    assert found == {word for word in gpu.SWEEPS if word.endswith(".py")}


def test_dry_run_does_what_needs_no_gpu_and_prints_the_rest(monkeypatch, tmp_path, capsys):
    steps = tuple(step for step in STEPS if step.name != "build")  # which would rebuild the library in use
    code, outcomes = drive(monkeypatch, tmp_path, "--dry", steps=steps)
    assert code == 0
    steps = tuple(step for step in steps if not step.asked)
    assert outcomes == {step.name: "needs a GPU" if step.gpu else "ok" for step in steps}
    printed = capsys.readouterr().out
    assert all(f"{step.name} ({step.seconds} s): " in printed for step in steps) and "{out}" not in printed
    assert "Ops on cpu" in (tmp_path / "doctor.log").read_text()


def test_what_takes_long_runs_where_it_is_asked_for(monkeypatch, tmp_path):
    code, outcomes = drive(monkeypatch, tmp_path, "--dry", "--step", "racecheck", "--step", "memcheck")
    assert code == 0
    assert outcomes == {"memcheck": "needs a GPU", "racecheck": "needs a GPU"}


def test_a_failing_step_fails_the_run_and_the_later_ones_still_run(monkeypatch, tmp_path, capsys):
    steps = (
        python("fails", "print('broken here'); raise SystemExit(3)"),
        python("hangs", "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])", 1),
        Step("absent", ("no-such-program-here",), 5, gpu=False),
        python("works", "import os, pathlib; pathlib.Path(os.environ['CMLM_FAST_TRITON_CONFIGS']).with_name('works.txt')"
                        ".write_text('found: 42')"),
    )  # fmt: skip
    code, outcomes = drive(monkeypatch, tmp_path, "--dry", steps=steps)
    assert code == 1
    assert outcomes["fails"] == "failed (3)" and outcomes["hangs"] == f"stopped after its {DRY_PATIENCE} s"
    assert outcomes["absent"].startswith("failed (No such file") and outcomes["works"] == "ok"
    printed = capsys.readouterr().out
    assert "broken here" in printed and "found: 42" in printed


def test_a_step_beside_others_runs_while_they_do(monkeypatch, tmp_path):
    waits = "import pathlib, time\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.05)"
    steps = (
        replace(python("first", waits.format(str(tmp_path / "here"))), beside=True),
        python("second", f"import pathlib; pathlib.Path({str(tmp_path / 'here')!r}).touch()"),
        replace(python("alone", "raise SystemExit(5)"), beside=True),
    )
    code, outcomes = drive(monkeypatch, tmp_path, "--dry", steps=steps)
    assert code == 1 and outcomes == {"first": "ok", "second": "ok", "alone": "failed (5)"}


def test_without_a_gpu_and_without_dry_it_refuses(monkeypatch, tmp_path):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, outcomes = drive(monkeypatch, tmp_path)
    assert "expected a GPU" in code and not outcomes


def test_a_stopped_test_step_still_names_what_failed(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "DRY_PATIENCE", 1)
    suite = tmp_path / "test_suite.py"
    suite.write_text("import time\ndef test_broken():\n    assert 6 * 7 == 41\ndef test_long():\n    time.sleep(60)\n")
    options = next(step for step in STEPS if step.name == "tests").command[len(gpu.PYTHON) :][:3]
    command = (sys.executable, *options, "-p", "no:cacheprovider", "-n", "2", str(suite))
    code, outcomes = drive(monkeypatch, tmp_path, "--dry", steps=(Step("tests", command, 15, gpu=False),))
    assert code == 1 and outcomes["tests"].startswith("stopped after")
    log = (tmp_path / "tests.log").read_text()
    assert any("FAILED" in line and "test_broken" in line for line in log.splitlines())


def test_what_an_earlier_run_measured_is_not_given_this_commits_name(monkeypatch, tmp_path):
    (tmp_path / "ops.json").write_text(json.dumps({"device": "old", "commit": "0", "torch": "1", "ceilings": {}, "rows": []}))
    drive(monkeypatch, tmp_path, "--dry", steps=(python("other", ""),))
    assert not (tmp_path / "old.json").exists()
    drive(monkeypatch, tmp_path, "--dry", steps=(python("ops", ""),))
    assert not (tmp_path / "old.json").exists()
    (tmp_path / "train.json").write_text(json.dumps({"device": "old", "commit": "0", "torch": "1", "rate": 1, "rows": []}))
    found = json.dumps({"device": "new", "commit": head(), "torch": "1", "ceilings": {}, "rows": []})
    code = f"import pathlib; pathlib.Path({str(tmp_path)!r}, 'ops.json').write_text({found!r})"
    drive(monkeypatch, tmp_path, "--dry", steps=(python("ops", code),))
    assert "train" not in json.loads((tmp_path / "new.json").read_text())
