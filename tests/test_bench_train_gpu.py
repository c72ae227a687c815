"""benchmarks/bench_train_gpu.py on the CPU with a small encoder: nothing is asked of a device, nothing is compiled."""

from __future__ import annotations

import time

import pytest
import torch
from conftest import make_lm

if torch.cuda.is_available():
    pytest.skip("make gpu measures there", allow_module_level=True)

from benchmarks import bench_train_gpu
from benchmarks.bench_train_gpu import batches, make_rows, measure, report, seconds, tokens


class Event:
    """Stands in for torch.cuda.Event, with the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return (end.time - self.time) * 1e3


def test_rows_and_report(monkeypatch):
    config = make_lm(vocab_size=300, hidden_dropout_prob=0.1).config
    monkeypatch.setattr(bench_train_gpu, "configuration", lambda case: config)
    for name, value in {"BATCH": 8, "SIZES": (8, 12), "MOST": {"naive": 8}}.items():
        monkeypatch.setattr(bench_train_gpu, name, value)
    monkeypatch.setattr(bench_train_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(bench_train_gpu, "waits", lambda step, batch: step(batch) and "")
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10**9)
    monkeypatch.setattr(bench_train_gpu, "operations", lambda ours, work: 1e7 * sum(map(len, work)) / len(work))
    (first,), *_, (row, larger) = measure("small", 1e6, 2, until=0.0)
    assert first["ms"].keys() == row["ms"].keys() == {"ours", "strong", "naive"} and larger["ms"].keys() == {"ours", "strong"}
    assert row["case"] == "small 8 sentences bfloat16" and larger["case"] == "small 12 sentences bfloat16"
    for one, sentences in ((row, 8), (larger, 12)):
        assert one["best"] == "ours" and one["TFLOP"] == 0.0 and one["peak GB"].keys() == one["ms"].keys()
        assert one["MFU"] == pytest.approx(1e7 * sentences / (one["ms"]["ours"] / 1e3) / 1e6, rel=1e-3)
        long = {name: ms / one["tokens"][name] for name, ms in one["ms"].items()}
        assert one["speedup"] == {name: pytest.approx(long[name] / long["ours"], abs=0.03) for name in long if name != "ours"}
    assert row["difference from naive"].keys() == {"ours", "strong"} and max(row["difference from naive"].values()) < 0.05
    assert set(row["absent"].values()) == {"TimeoutError: no time was left to compile it"}
    assert row["train ms"] > 0
    text = report({"device": "none", "rate": 1e6, "rows": [row]})
    assert all(f"{name} {ms} ms" in text for name, ms in row["ms"].items()) and "absent: ours compiled" in text
    assert f"in the loop of train a step of ours takes {row['train ms']} ms" in text


def test_steps_are_timed_behind_one_that_is_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    taken: list[str] = []
    assert 0 <= seconds(taken.append, ["a", "b"]) < 1 and taken == ["b", "a", "b"]
    monkeypatch.setattr(Event, "elapsed_time", lambda begin, end: 500.0)  # milliseconds
    assert seconds(taken.append, ["a", "b"]) == 0.25


def test_batches_have_the_lengths_of_the_sentences():
    rows = make_rows(1000)
    assert len(rows) == 8530 and sorted(len(row["input_ids"]) for row in rows)[-1] == 78
    mixed, grouped = batches(rows, "ours", 512), batches(rows, "strong compiled", 512)
    assert {len(batch) for batch in (*mixed, *grouped)} == {512} and len(mixed) == len(grouped) == 4
    assert tokens(mixed) == pytest.approx(tokens(grouped), rel=0.05)
    spread = [max(lengths) - min(lengths) for lengths in ([len(row["input_ids"]) for row in batch] for batch in grouped)]
    assert max(spread) < 15
