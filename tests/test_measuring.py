"""How the benchmarks compute their numbers: tested with a fake clock, and against operations that PyTorch counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_lm
from datasets import Dataset
from test_trainer import make_trainer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_train, memory, run, timing
from benchmarks.bench_train import Floor, batches, operations
from benchmarks.ops import OPS
from benchmarks.ops._losses import Check
from benchmarks.registry import Provider, Wrong
from cmlm_fast import CMLMConfig
from cmlm_fast.testing import eager_token_contrastive

CPU = torch.device("cpu")
BY_NAME = {op.name: op for op in OPS}


class Clock:
    """A stand-in for `time`, with calls that last as long as they say."""

    def __init__(self, monkeypatch, *modules):
        self.now, self.calls = 0.0, []
        for module in modules:
            monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)

    def call(self, name, seconds):
        """A call of that many seconds; given a list, each call takes the next entry."""
        seconds = seconds if isinstance(seconds, list) else [seconds]

        def lasts():
            self.now += seconds[min(self.calls.count(name), len(seconds) - 1)]
            self.calls.append(name)

        return lasts


def rows_of(lengths):
    return Dataset.from_dict({"input_ids": [[0] * n for n in lengths]})


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_a_sample_is_the_mean_of_its_calls_and_every_provider_has_its_turn(monkeypatch):
    clock = Clock(monkeypatch, timing)
    assert timing.sample(clock.call("a", [1.0, 2.0, 6.0]), 3, CPU) == pytest.approx(3.0)
    assert timing.repeats_of(clock.call("warm", [9.0, 1e-3]), CPU) == 1  # timed by the first call alone
    assert timing.repeats_of(clock.call("short", [0.05, 1e-3]), CPU) == 5
    clock.calls.clear()
    samples = timing.interleaved({name: clock.call(name, 0.125) for name in "xyz"}, CPU, seconds=2.0, least=2)
    assert samples == {name: pytest.approx([0.125] * 6) for name in "xyz"}  # rounds of 0.375 s, until 2 s are over
    rounds = ["".join(clock.calls[3 + 3 * i:][:3]) for i in range(6)]
    assert {"".join(sorted(order)) for order in rounds} == {"xyz"} and len(set(rounds)) > 2
    long = timing.interleaved({"x": clock.call("x", 4.0)}, CPU, seconds=2.0)
    assert long == {"x": [4.0] * 3}


def test_quantiles_are_those_of_their_names():
    assert timing.quantiles([float(i) for i in range(10, -1, -1)]) == pytest.approx((2.0, 5.0, 8.0))


def test_ceilings_count_a_product_and_both_sides_of_a_copy(monkeypatch):
    times = {"float32": [3.0, 2.0, 4.0], "oneDNN float32": [0.5], "bfloat16": [3.0, 2.0, 4.0], "copy": [3.0, 4.0]}
    monkeypatch.setattr(timing, "interleaved", lambda calls, *_: times)
    monkeypatch.setattr(timing, "bfloat16_hardware", lambda: True)
    product, copied = 2 * 1536**3 / 1e12, 2 * 128 * 1024**2 / 1e9
    assert timing.ceilings(CPU) == pytest.approx(
        {"float32 TFLOP/s": product / 0.5, "bfloat16 TFLOP/s": product / 2, "copy GB/s": copied / 3})  # fmt: skip


def test_a_row_is_made_of_the_samples_of_its_provider(monkeypatch):
    times = {"slow": [4.0, 4.0, 8.0, 8.0, 8.0], "": [2.0, 2.0, 3.0, 9.0, 9.0], "fast": [1.0] * 100}
    monkeypatch.setattr(run, "interleaved", lambda calls, *_: {name: list(times[name]) for name in calls})
    monkeypatch.setattr(run, "peak_bytes", lambda call, device: peaks[call])
    op, peaks = BY_NAME["info_nce"], {}
    eager = next(p for p in op.providers if p.name == "eager")

    def provider(name, peak):
        def make(problem):
            call = eager.make(problem)
            peaks[call] = peak
            return call

        return Provider(name, make)

    shape = op.chosen("smoke")[0]
    (slow, fast), absent = run.measure(replace(op, providers=(provider("slow", 7), provider("fast", 5))), shape, CPU, 1.0)
    assert not absent and (slow.provider, fast.provider) == ("slow", "fast")
    assert (slow.p20, slow.p50, slow.p80) == pytest.approx((4.0, 8.0, 8.0)) and fast.p50 == 1.0
    assert (slow.ceiling_share, fast.ceiling_share) == pytest.approx((3 / 8, 3.0))
    assert (slow.peak_bytes, fast.peak_bytes) == (7, 5)
    assert slow.work == 6 * 12 * 12 * 16 and slow.unit == "TFLOP/s" and slow.rate == pytest.approx(slow.work / 8 / 1e12)
    assert len(slow.samples) == 5 and 30 <= len(fast.samples) <= 40
    shown = [dict(zip(run.HEADS, run.cells(row, [slow, fast]), strict=True)) for row in (slow, fast)]
    assert [row["speed ÷ best other's"] for row in shown] == ["0.125 ×", "8 ×"]
    assert [row["of ceiling"] for row in shown] == ["38%", "300%"] and shown[0]["p20 – p80"] == "4 s – 8 s"
    assert {name: scale for name, (scale, _) in run.UNITS.items()} == {"flop": 1e12, "byte": 1e9, "token": 1e6, "sequence": 1.0}


@pytest.mark.parametrize("op", [op for op in OPS if op.name not in ("train_step", "tokenize_texts")], ids=lambda op: op.name)
def test_the_work_of_a_task_is_what_its_ceiling_does(op):
    for shape in op.chosen("smoke"):
        problem = op.build(CPU, **shape.sizes)
        amount, kind = problem.work
        if kind == "flop":
            assert flops(problem.ceiling) == amount
            eager = flops(next(p for p in op.providers if p.name == "eager").make(problem))
            # Only a sequence's own scores, or half of a symmetric matrix and its gradients, count; eager computes everything.
            assert eager == amount * (3 if "sequence scope" in shape.label else 2 if "nt_xent" in shape.label else 1)
        else:
            masked = op.auto(problem)()
            ids, units = problem.inputs
            moved = ids.nbytes + (0 if units is None else units.nbytes) + sum(x.nbytes for x in masked)
            assert kind == "byte" and amount == problem.traffic == moved


def test_answers_are_held_to_float64_ours_to_twice_the_error_of_eager():
    def answer(loss, gradient):
        return [torch.tensor(1 + loss), torch.full((4,), 1 + gradient)]

    exact = [x.double() for x in answer(0.0, 0.0)]
    check = Check(lambda: exact, lambda: answer(0.0, 1e-4), torch.float32)
    for name, right, wrong in (("ours/cpp", 1.8e-4, 2.5e-4), ("peer", 8e-4, 2e-3)):
        assert check(name, answer(0.0, right)) == pytest.approx((right, 1e-4), rel=1e-2)
        for loss, gradient in ((wrong, 0.0), (0.0, wrong), (0.0, float("nan")), (float("nan"), 0.0)):
            with pytest.raises(Wrong, match=f"{name}: error"):
                check(name, answer(loss, gradient))


def test_steps_of_the_suite_count_tokens_of_both_views_and_are_held_to_naive(monkeypatch):
    found = {"ours": 0.0009}
    for name, value in {"load": lambda: (None, rows_of(range(1, 21))), "make": lambda name, *_: name,
                        "check": lambda models, rows: found}.items():  # fmt: skip
        monkeypatch.setattr(bench_train, name, value)
    problem = BY_NAME["train_step"].build(CPU, 2, 4)
    assert problem.work == (2.0 * (4 + 5 + 6 + 7 + 14 + 15 + 16 + 17), "token")
    problem.check("ours/python", None)
    problem.check("naive", None)
    for difference in (0.0011, float("nan")):
        found["strong"] = difference
        with pytest.raises(Wrong, match="strong: loss and gradients differ from the naive step's"):
            problem.check("strong", None)


def test_a_call_is_charged_with_what_it_holds():
    size = 48 * 1024**2
    if (peak := memory.peak_bytes(lambda: torch.ones(size, dtype=torch.uint8), CPU)) is not None:
        assert 0.9 * size < peak < 1.2 * size
    assert 2**28 < memory.free_bytes(CPU) < 2**50


def test_a_step_has_the_operations_that_pytorch_counts(tmp_path, tiny_rows, tiny_tokenizer):
    lm = make_lm(attn_implementation="eager")
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, lm=lm)
    work = [[tiny_rows[i] for i in range(n)] for n in (5, 9)]
    expected = 0.0
    plain = make_lm(attn_implementation="eager")
    for rows in work:
        batch = trainer.mask(trainer.data_collator(rows), 0)
        role, special = batch["role"], torch.isin(batch["input_ids"], batch["special_ids"])
        for row in rows:
            expected += 2 * 3 * flops(lambda row=row: plain.bert(torch.tensor([row["input_ids"]])))
        for one in (1, 2):
            count, candidates = int((role == one).sum()), int((~special).sum())
            query, key = torch.randn(count, 32, requires_grad=True), torch.randn(candidates, 32, requires_grad=True)
            target, tau = torch.zeros(count, dtype=torch.long), torch.tensor(0.1)
            expected += 3 * flops(lambda query=query: plain.cls(query))
            expected += flops(lambda query=query, key=key, target=target, tau=tau: eager_token_contrastive(
                query, key, target, tau, None, None, None, None, True, "sum", True, True).backward())  # fmt: skip
    assert operations(SimpleNamespace(lm=lm, trainer=trainer), work) == pytest.approx(expected / len(work), rel=1e-9)


def test_a_floor_is_products_and_adamw_at_the_best_rates_of_all_rounds(tmp_path, tiny_rows, tiny_tokenizer, monkeypatch):
    lm = make_lm()
    ours = SimpleNamespace(lm=lm, trainer=make_trainer(tmp_path, tiny_rows, tiny_tokenizer, lm=lm))
    floor = Floor(ours, [[tiny_rows[0]]], torch.float32)
    next(lm.parameters()).requires_grad = False
    assert floor.bytes == 28 * lm.num_parameters()
    assert Floor(ours, [[tiny_rows[0]]], torch.float32).bytes == 28 * lm.num_parameters(only_trainable=True)
    rates, times = iter([2e9, 3e9, 1e9, 2e9]), iter([2.0, 0.5])
    monkeypatch.setattr(bench_train, "gemm_rate", lambda *_: next(rates))
    monkeypatch.setattr(bench_train, "best", lambda call: next(times))
    for round_of_two_shapes in range(2):
        floor.measure()
        assert floor.gemm_rate == 3e9 and floor.copy_rate == 2 * 4 * 2**26 / (2.0, 0.5)[round_of_two_shapes]
    floor.flops, floor.bytes, floor.gemm_rate, floor.copy_rate = 3e9, 5e9, 2e9, 4e9
    assert floor.row() == {"GFLOP": 3.0, "GEMM GFLOP/s": 2.0, "AdamW MB": 5000.0, "copy GB/s": 4.0, "ms": 2750.0}


def test_the_fastest_of_some_calls_is_a_rate(monkeypatch):
    clock = Clock(monkeypatch, bench_train)
    assert bench_train.best(clock.call("a", [0.125, 3.0, 2.0, 5.0])) == 2.0  # the first call warms up
    times = iter([0.5, 0.25])
    monkeypatch.setattr(bench_train, "has_onednn", lambda dtype: True)
    monkeypatch.setattr(bench_train, "best", lambda call: next(times))
    assert bench_train.gemm_rate(3, 5, 7, torch.float32) == 2 * 3 * 5 * 7 / 0.25


def test_a_step_is_compared_by_the_time_of_a_token(monkeypatch, tmp_path):
    taken = {"ours": [0.2, 0.1, 0.3], "strong": [0.3, 0.3, 0.3], "naive": [1.0, 9.0, 1.0]}

    class Worker:
        def __init__(self, name, dtype):
            self.times = iter(taken[name])

        def seconds(self):
            return next(self.times)

        def stop(self):
            pass

    class Least:
        def __init__(self, *_):
            self.rounds = 0

        def measure(self):
            self.rounds += 1

        def row(self):
            return {"ms": 50.0 * self.rounds}

    rows = rows_of(range(1, 1601))
    for name, value in {"load": lambda: (None, rows), "make": lambda name, *_: name, "Worker": Worker, "Floor": Least,
                        "check": lambda providers, work: found}.items():  # fmt: skip
        monkeypatch.setattr(bench_train, name, value)
    found = {"ours": 0.0, "strong": 0.0}
    row = bench_train.measure(torch.float32, 3, ("ours", "strong", "naive"))
    mixed = [length for n in (5, 15, 25, 35, 45) for length in range(32 * n + 1, 32 * n + 33)]
    assert row["ms"] == {"ours": 200.0, "strong": 300.0, "naive": 1000.0}
    assert set(row["tokens"].values()) == {round(2 * sum(mixed) / 5)}  # the rows are sorted already
    assert row["speedup"] == {"strong": 1.5, "naive": 5.0} and row["share of floor"] == 0.75
    sizes = iter((100.0, 200.0, 400.0))
    monkeypatch.setattr(bench_train, "tokens", lambda work: next(sizes))
    assert bench_train.measure(torch.float32, 3, ("ours", "strong", "naive"))["speedup"] == {"strong": 0.75, "naive": 1.25}
    for difference in (0.0011, float("nan")):
        found["strong"] = difference
        with pytest.raises(AssertionError, match="not those of the naive step"):
            bench_train.measure(torch.float32, 3, ("ours", "strong", "naive"))


@pytest.mark.parametrize("part", ["gradient", "loss"])
def test_a_baseline_that_computes_something_else_is_found(part, tmp_path, tiny_rows, tiny_tokenizer):
    providers = {name: bench_train.make(name, torch.float32, tiny_tokenizer, str(tmp_path), make_lm)
                 for name in ("ours", "strong", "naive")}  # fmt: skip
    rows = [tiny_rows[i] for i in range(6)]
    assert max(bench_train.check(providers, rows).values()) < 1e-5
    lm = providers["strong"].lm
    if part == "gradient":
        lm.bert.embeddings.word_embeddings.weight.register_hook(lambda gradient: 1.1 * gradient)
    else:
        lm.cls.predictions.bias.data[::2] += 0.1
    found = bench_train.check(providers, rows)
    assert found["strong"] > 1e-3 and found["ours"] < 1e-5


def test_a_worker_gives_the_mean_of_its_batches(monkeypatch):
    clock, sent, kept = Clock(monkeypatch, bench_train), [], []
    step = clock.call("step", 3.0)
    asked = iter(["run", "run", "stop"])
    line = SimpleNamespace(send=sent.append, recv=lambda: next(asked))
    for name, value in {"load": lambda: (None, None), "batches": lambda rows, provider: list("abcde"),
                        "make": lambda *_: SimpleNamespace(step=lambda batch: step()),
                        "keep_freed_memory": lambda: not kept.append(1)}.items():  # fmt: skip
        monkeypatch.setattr(bench_train, name, value)
    bench_train._serve(line, "strong", torch.float32, torch.get_num_threads())
    assert sent == [None, 3.0, 3.0] and not kept
    assert len(clock.calls) == 5 + 2 * (2 + 5)  # each batch once at first, and two before each timed round
    asked = iter(["stop"] * 2)
    for provider in ("ours", "strong kept"):
        bench_train._serve(line, provider, torch.float32, torch.get_num_threads())
    assert kept == [1, 1]
    monkeypatch.setattr(bench_train, "keep_freed_memory", lambda: False)
    with pytest.raises(RuntimeError, match="ours is timed with freed memory kept"):
        bench_train._serve(line, "ours", torch.float32, torch.get_num_threads())


def test_batches_of_a_run_are_alike_for_all_and_sorted_for_strong():
    lengths = torch.randint(5, 60, (1600,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = rows_of(lengths)
    mixed, grouped = batches(rows, "ours"), batches(rows, "strong kept")
    assert [len(batch) for batch in (*mixed, *grouped)] == [32] * 10
    assert mixed == batches(rows, "naive") and grouped == batches(rows, "strong")
    sizes = [[len(row["input_ids"]) for row in batch] for batch in grouped]
    assert [n for batch in sizes for n in batch] == sorted(n for batch in sizes for n in batch)
    assert bench_train.tokens(mixed) == 2 * sum(len(row["input_ids"]) for batch in mixed for row in batch) / 5


def test_a_row_of_the_step_replaces_the_earlier_one_of_its_case(tmp_path):
    path = Path(tmp_path, "sub", "train.json")
    for case, ms in (("b", 1), ("a", 2), ("b", 3)):
        bench_train.save({"case": case, "ms": ms}, {"device": "it"}, path)
    assert json.loads(path.read_text())["rows"] == [{"case": "a", "ms": 2}, {"case": "b", "ms": 3}]


def test_baselines_hold_the_objective_of_the_package():
    config = CMLMConfig()
    assert (config.scheme, config.pooling, config.scope, config.mlm_views) == ("cross", "mean", "batch", "both")
