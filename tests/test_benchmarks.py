"""The benchmark suite: every body once, what it refuses, what compare catches, and docs that say what the results file says."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import compare, report, run, verdicts
from benchmarks.cli import app, chosen
from benchmarks.ops import OPS
from benchmarks.registry import Provider, Wrong
from benchmarks.results import Absent, Results, automatic, commit
from benchmarks.timing import ceilings
from cmlm_fast.backends import preference
from cmlm_fast.cli import app as cmlm_fast
from cmlm_fast.cli import benchmark_suite

CPU = torch.device("cpu")
COMMITTED = Results.load(verdicts.COMMITTED)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_body_is_right_at_its_smallest_size(op):
    """A wrong answer of ours raises; a peer that answers wrongly or fails is absent, with the reason.

    Triton's kernels, interpreted here, have tests of their own.
    """
    bodies = [provider.name for provider in op.providers if provider.name != "ours/triton"]
    rows, absent = [], []
    for number, shape in enumerate(op.chosen("smoke")):
        if number == 1:  # each compilation takes seconds and involves nothing of ours
            bodies = [name for name in bodies if name != "torch.compile"]
        for found, more in zip((rows, absent), run.measure(op, shape, CPU, 0.0, bodies), strict=True):
            found += more
    assert any(row.is_ours for row in rows) and any(not row.is_ours for row in rows)
    expected = ["GPU", "gpu", "cuda tensors", "without CUDA", "_C_cuda.so was not built", "kernel", "candidate", "NT-Xent",
                "whole words"]  # fmt: skip
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        expected.append("PyTorch has it from")
    assert [a for a in absent if not any(word in a.reason for word in expected)] == []
    for row in rows:
        assert 0 < row.p20 <= row.p50 <= row.p80 and row.rate > 0


def test_labels_name_one_shape_each():
    for op in OPS:
        labels = [shape.label for shape in op.shapes if shape.suite != "smoke"]
        assert len(labels) == len(set(labels))


def test_every_shape_of_the_full_suite_can_be_built():
    op = next(op for op in OPS if op.name == "token_contrastive")
    for n, m in {(shape.sizes["N"] // 64, shape.sizes["M"] // 64) for shape in op.chosen("full")}:
        problem = op.build(CPU, n, m, 8)
        problem.check("ours/auto", op.auto(problem)())


def test_an_answer_of_ours_without_a_gradient_is_wrong():
    op = next(op for op in OPS if op.name == "info_nce")
    problem = op.build(CPU, **op.chosen("smoke")[0].sizes)
    loss, first, _ = op.auto(problem)()
    with pytest.raises(Wrong, match="ours/auto: a gradient is missing"):
        problem.check("ours/auto", [loss, first, None])


def test_the_row_that_a_user_gets_is_chosen_by_size():
    row = next(row for row in COMMITTED.rows if row.op == "complementary_mask")
    group = [replace(row, provider=f"ours/{name}", sizes={"B": 32_768, "L": 512}) for name in ("cuda", "triton")]
    assert automatic(group, "cuda").provider == "ours/" + preference("complementary_mask", "cuda", torch.int64, 2**24)[0]
    assert automatic(group, "cuda") != automatic([replace(row, sizes={"B": 2, "L": 512}) for row in group], "cuda")


def test_the_working_tree_is_built_where_its_sources_are_newer(tmp_path, monkeypatch):
    asked = []
    tree = tmp_path / "tree"
    for name in ("cmlm_fast/_C.so", "csrc/a.cpp"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    os.utime(tree / "csrc" / "a.cpp", (0, 0))
    monkeypatch.setattr(compare, "ROOT", tree)
    done = SimpleNamespace(returncode=0)
    monkeypatch.setattr(compare.subprocess, "run", lambda command, **more: (asked.append(command), done)[1])
    compare.side(".", tmp_path / "a", "cpu", lambda line: None)
    assert not asked
    os.utime(tree / "cmlm_fast" / "_C.so", (0, 0))
    compare.side(".", tmp_path / "b", "cpu", lambda line: None)
    assert "build_ext" in asked[0]


def test_ceilings_are_measured():
    assert all(value > 0 for value in ceilings(CPU, 0.0).values())


def test_the_automatic_choice_is_right_on_every_op():
    for op in OPS:
        if op.name != "train_step":  # takes seconds, and our only provider is the choice
            problem = op.build(CPU, **op.chosen("smoke")[0].sizes)
            problem.check("ours/auto", op.auto(problem)())  # raises Wrong


def test_a_provider_that_is_wrong_gets_no_row():
    op = next(op for op in OPS if op.name == "info_nce")
    right = next(p for p in op.providers if p.name == "eager")

    def off(problem):
        call = right.make(problem)
        return lambda: [x * 1.01 for x in call()]

    shape = op.chosen("smoke")[0]
    rows, absent = run.measure(replace(op, providers=(right, Provider("off by 1 %", off))), shape, CPU, 0.0)
    assert [row.provider for row in rows] == ["eager"]
    assert "off by 1 %: error 0.01 against float64" in absent[0].reason
    with pytest.raises(Exception, match=r"ours/off: error 0\.01"):
        run.measure(replace(op, providers=(Provider("ours/off", off),)), shape, CPU, 0.0)


def test_results_come_back_from_their_file_and_others_are_refused(tmp_path):
    COMMITTED.save(tmp_path / "a.json")
    assert Results.load(tmp_path / "a.json") == COMMITTED
    other = replace(COMMITTED, commit="0123456789")
    with pytest.raises(ValueError, match="expected --update to go on with a file of the same commit"):
        COMMITTED.continued(other)
    with pytest.raises(ValueError, match=r"expected a results file of `cmlm-fast bench`, got .*c\.json, which does not exist"):
        Results.load(tmp_path / "c.json")
    moved = replace(COMMITTED, machine={**COMMITTED.machine, "threads": 64})
    with pytest.raises(ValueError, match="expected --update to go on with a file of this machine"):
        COMMITTED.continued(moved)
    assert COMMITTED.continued(replace(COMMITTED, machine={**COMMITTED.machine, "load": 9.0})) is COMMITTED
    (tmp_path / "b.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="expected a results file of `cmlm-fast bench` with schema 1"):
        Results.load(tmp_path / "b.json")


def test_an_exponent_has_three_sizes():
    rows = [row for row in COMMITTED.rows if (row.op, row.sweep, row.provider) == ("info_nce", "B", "eager")]
    assert len(replace(COMMITTED, rows=rows[:3]).slopes()) == 1 and not replace(COMMITTED, rows=rows[:2]).slopes()


def test_what_is_timed_is_named_by_its_commit_and_whether_files_differ(tmp_path):
    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True)

    code, page = tmp_path / "cmlm_fast" / "code.py", tmp_path / "page.md"
    code.parent.mkdir()
    git("init")
    for path in (code, page):
        path.write_text("1")
        git("add", path)
        git("commit", "-m", path.name)
    name = commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{10}", name)
    page.write_text("2")
    git("commit", "-am", "no code")
    assert commit(tmp_path) == name
    code.write_text("2")
    assert commit(tmp_path) == name + "+"
    git("commit", "-am", "code")
    assert commit(tmp_path) not in (name, name + "+")


def test_what_does_not_fit_into_memory_is_not_tried(monkeypatch):
    op = next(op for op in OPS if op.name == "info_nce")
    problem = op.build(CPU, **op.chosen("smoke")[0].sizes)
    eager = next(p for p in op.providers if p.name == "eager")
    for free, reason in ((6 * problem.matrix, ""), (4 * problem.matrix, "would hold 0.0 GB at once, 0.0 GB are free")):
        monkeypatch.setattr("benchmarks.registry.free_bytes", lambda device, free=free: free)
        assert eager.absence(problem) == reason


def test_report_is_whole_and_asks_the_network_for_nothing(tmp_path):
    paths = report.write(COMMITTED, tmp_path)
    pictures = {"ratios.png", "sweeps.png", "roofline.png", "memory.png"}
    assert {path.name for path in paths} == {"report.md", "report.html", *pictures}
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert page.count("data:image/png;base64,") == 4 and "http" not in page
    for row in COMMITTED.rows:
        assert run.seconds(row.p50) in page and run.seconds(row.p50) in text


def noisy(median, count, draw, noise=0.08):
    """Times of a busy machine: now and then one is twice as long."""
    return [median * draw.uniform(1 - noise, 1 + noise) * (2 if draw.random() < 0.05 else 1) for _ in range(count)]


@pytest.mark.parametrize("seed", range(10))
def test_a_slowdown_of_30_percent_is_caught_and_no_change_passes(seed):
    draw = random.Random(seed)
    for factor, verdict in ((1.3, "slower"), (1.0, "same"), (1 / 1.3, "faster")):
        launches = [(noisy(1.0, 20, draw), noisy(factor, 20, draw)) for _ in range(3)]
        change = compare.judge("row", launches, 0.1)
        assert change.verdict == verdict and change.low <= change.ratio <= change.high


def test_compare_of_files_fails_where_a_row_is_slower(tmp_path):
    slow = [replace(row, samples=[t * 1.3 for t in row.samples]) for row in COMMITTED.rows]
    COMMITTED.save(tmp_path / "a.json")
    replace(COMMITTED, rows=slow).save(tmp_path / "b.json")
    runner = CliRunner()
    same = runner.invoke(app, ["compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")])
    assert same.exit_code == 0, same.output
    worse = runner.invoke(app, ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert worse.exit_code == 1 and "slower" in worse.output


def test_compare_of_processes_catches_a_planted_slowdown(tmp_path, monkeypatch):
    """Two workers, one with an info_nce that takes three times as long: other tests run at the same time."""
    source = compare.ROOT / "cmlm_fast"
    shutil.copytree(source, tmp_path / "slow" / "cmlm_fast", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "slow" / "cmlm_fast" / "__init__.py").open("a") as file:
        file.write(
            "\nimport time as _time\n_fast = info_nce\n\ndef info_nce(*args, **options):\n"
            "    start = _time.perf_counter()\n    out = _fast(*args, **options)\n    end = _time.perf_counter()\n"
            "    while _time.perf_counter() - end < 2 * (end - start):\n        pass\n    return out\n"
        )

    def side(ref, folder, device, say):
        package = {"fast": source, "slow": tmp_path / "slow" / "cmlm_fast"}[ref]
        folder.mkdir()
        (folder / "benchmarks").symlink_to(compare.ROOT / "benchmarks")
        (folder / "cmlm_fast").symlink_to(package)
        return folder

    monkeypatch.setattr(compare, "side", side)
    monkeypatch.setattr(compare, "LAUNCHES", (1, 2))
    plan = [("info_nce", "B=256 D=384 float32 cross")]
    (change,) = compare.compare_refs("fast", "slow", plan, 1.0, 0.1, say=lambda line: None)
    assert change.verdict == "slower" and change.ratio > 1.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--op", "softmax"], "expected --op to be one of complementary_mask, token_contrastive"),
        (["--shape", "bert-huge"], "expected --shape to be contained in one of 64x128"),
        (["--op", "token_contrastive", "--shape", "N=7"], " labels that --full adds), got ['N=7']"),
        (["--shape", ""], "expected --shape to be contained in a shape's label, got ''"),
        (["--provider", "nobody"], "expected --provider to be contained in"),
        (["--output", "."], "expected --output to be a file"),
        (["--device", "tpu"], "expected --device to be one that is here"),
        (["compare", "a.json", "HEAD"], "expected two results files or two git refs"),
        (["compare", "no-such-ref", "."], "expected a git ref, got 'no-such-ref'"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, words):
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ValueError) and words in str(result.exception)


def test_the_command_reaches_the_suite():
    result = CliRunner().invoke(cmlm_fast, ["bench", "--op", "softmax"])
    assert result.exit_code == 2 and "error: expected --op to be one of" in result.output


@pytest.mark.parametrize(("options", "name"), [((), "bench.json"), (("--op", "info_nce"), "bench-part.json"),
                                               (("--op", "info_nce", "--update"), "bench.json")])  # fmt: skip
def test_a_part_of_the_suite_leaves_the_file_of_the_whole_alone(options, name, tmp_path, monkeypatch):
    found = replace(COMMITTED, absent=[Absent("info_nce", "B=4", "other", "not installed: pip install 'cmlm-fast[bench]'")])
    monkeypatch.setattr(run, "run", lambda *arguments: (arguments[-1](found), found)[1])
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, options)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name] and f"written to out/{name}" in result.output
    assert "pip install 'cmlm-fast[bench]'" in result.output


def test_outside_of_a_clone_the_command_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cmlm_fast.cli.__file__", str(tmp_path / "site-packages" / "cmlm_fast" / "cli.py"))
    with pytest.raises(ModuleNotFoundError, match="expected the working directory to be a clone of the repository"):
        benchmark_suite()


def test_docs_say_what_the_results_file_says():
    assert verdicts.PAGE.read_text(encoding="utf-8") == verdicts.page(COMMITTED)
    for draw in verdicts.PAGE_PICTURES:
        assert (verdicts.PAGE.parent / f"benchmarks-{draw.__name__}.png").exists()
    text = verdicts.README.read_text(encoding="utf-8")
    assert verdicts.readme(text, COMMITTED) == text


def test_committed_results_cover_the_quick_suite_beside_six_peers():
    quick = {(op.name, shape.label) for op, shape in chosen(None, None, "quick") if shape.sizes.get("dtype") != "bfloat16"}
    assert set(COMMITTED.groups()) >= quick  # bfloat16 is only for CPUs that multiply it
    assert len({row.provider for row in COMMITTED.rows if not row.is_ours}) >= 6


@pytest.mark.parametrize(("op", "shape"), COMMITTED.groups())
def test_the_automatic_choice_is_our_fastest_backend(op, shape):
    """Within 10 %, for backends that are as good as equal."""
    group = COMMITTED.groups()[op, shape]
    choice = automatic(group, COMMITTED.machine["type"])
    assert choice.p50 <= 1.1 * min(row.p50 for row in group if row.is_ours)


def test_what_steps_on_the_cpu_is_not_made_for_a_gpu():
    for name in ("tokenize_texts", "train_step"):
        op = next(op for op in OPS if op.name == name)
        rows, absent = run.measure(op, op.shapes[0], torch.device("cuda"), 0.1)
        assert not rows and {a.provider for a in absent} == {p.name for p in op.providers}
        assert {a.reason for a in absent} == {op.cpu_only} and op.cpu_only
