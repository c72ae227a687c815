"""benchmarks/bench_gpu.py on small shapes, with Triton interpreted and a clock that does not measure."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("make gpu measures there", allow_module_level=True)

from benchmarks import bench_gpu
from benchmarks.bench_gpu import measure, report
from benchmarks.roofline import Shape, arguments

SHAPES = (
    Shape("token_contrastive", 30, 90, 24, 90, goal="any"),
    Shape("token_contrastive", 64, 64, 24, 16),
    Shape("info_nce", 20, 20, 24, 20, "cross"),
    Shape("info_nce", 20, 20, 24, 20, "nt_xent"),
    Shape("complementary_mask", 512, scheme="bernoulli"),
    Shape("complementary_mask", 512, scheme="exact"),
)


def test_rows_and_report():
    rows = [measure(shape, "cpu", clock=lambda call: call() is None or 0.5) for shape in SHAPES]
    for row, shape in zip(rows, SHAPES, strict=True):
        beside = "reference" if shape.op == "complementary_mask" else "eager"
        assert row["ms"] == {beside: 0.5, "triton": 0.5} and not row["absent"]
    text = report({"device": "none", "ceilings": {"rate": 1e12, "bandwidth": 1e12}, "rows": rows}, SHAPES)
    assert "goal: any" in text and text.count("triton") == len(SHAPES)
    assert f"{6 * 30 * 90 * 24 / 0.5e-3 / 1e12:.0%} of the matrix rate" in text
    assert f"{25 * 512 / 0.5e-3 / 1e12:.0%} of the copy" in text


def test_a_time_is_the_median_of_its_turns():
    turns = {}

    def clock(call):
        turns[call] = turns.get(call, 0) + 1
        return 9.0 if turns[call] == 1 else 0.5 if turns[call] % 2 else 0.25

    assert set(measure(SHAPES[4], "cpu", clock)["ms"].values()) == {0.5}
    assert set(turns.values()) == {bench_gpu.TURNS} and bench_gpu.TURNS == 3


def test_a_provider_that_differs_or_does_not_fit_has_no_time(monkeypatch):
    def out_of_memory():
        raise torch.OutOfMemoryError

    plain = bench_gpu.providers

    def providers(shape, device):
        calls = plain(shape, device)
        eager = bench_gpu.EAGER["info_nce"]
        wrong = bench_gpu.trained(lambda z1, *rest: eager(2 * z1.detach() - z1, *rest), arguments(shape, device))
        return {**calls, "triton": lambda: calls["eager"]() * 1.1, "backwards": wrong, "large": out_of_memory}

    monkeypatch.setattr(bench_gpu, "providers", providers)
    row = measure(SHAPES[2], "cpu", clock=lambda call: 1.0)
    assert row["ms"] == {"eager": 1.0}
    differs = "differs from the reference"  # one in its loss, the other only in its gradient
    assert row["absent"] == {"triton": differs, "backwards": differs, "large": "out of memory"}
