"""Times a whole post-training optimizer step against two baselines and the floor of its work, in one run.

    python -m benchmarks.bench_train [--dtype float32] [--dtype bfloat16] [--rounds N] [--output benchmarks/results/train.json]

The model is all-MiniLM-L6-v2 (6 layers, width 384, 22.7 M parameters) with its dropout, on real sentences (Rotten Tomatoes), 32
per step. A step includes everything: batch from token rows, masks, both passes, backward, gradient clipping, AdamW. Providers
take turns, round by round, each in its own process: `ours` configures the allocator as `CMLMTrainer.train` does, `strong` and
`naive` leave it as it is, and `strong kept` is strong with our setting. Losses and gradients are compared first, with the same
masks and without dropout. Speed-ups are per real token.

The floor is the time of the step's matrix products at the rate of the fastest product measured in any round, plus that of
AdamW's bytes at the rate of the fastest copy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cmlm_fast import CMLMConfig, CMLMModel, CMLMTrainer, CMLMTrainingArguments
from cmlm_fast.compiling import compile_layers
from cmlm_fast.data import tokenize_texts
from cmlm_fast.demo_assets import demo_model_path, demo_texts
from cmlm_fast.machine import bfloat16_hardware
from cmlm_fast.memory import keep_freed_memory

from .peers import Naive, Strong, to_device
from .results import commit, describe
from .timing import has_onednn, onednn

PROVIDERS = ("ours", "strong", "naive")
TIMED = ("ours", "strong", "strong kept", "naive")
SEQUENCES, BATCHES = 32, 5
#: How many batches transformers' own length grouping sorts at a time.
SORTED_BATCHES = 50


def load() -> tuple[Any, Any]:
    """The tokenizer, and as many token rows as length grouping sorts at a time."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    order = torch.randperm(8530, generator=torch.Generator().manual_seed(0))[: SORTED_BATCHES * SEQUENCES]
    return tokenizer, tokenize_texts(demo_texts().select(order.tolist()), tokenizer, max_length=128)


def batches(rows: Any, provider: str) -> list[list[Any]]:
    """A sample of a run's batches over these rows: mixed, or for `strong` sorted by length, from the shortest to the longest.

    Both hold the same number of sentences but not of tokens, so speeds are compared by time per token.
    """
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__) if provider.startswith("strong") else range(len(lengths))
    step = SORTED_BATCHES // BATCHES
    chosen = range(step // 2, SORTED_BATCHES, step)
    return [[rows[i] for i in list(order)[n * SEQUENCES : (n + 1) * SEQUENCES]] for n in chosen]


def tokens(work: Sequence[Sequence[Any]]) -> float:
    """Real tokens in both views of a batch; the mean over batches."""
    return sum(2 * len(row["input_ids"]) for rows in work for row in rows) / len(work)


class Ours:
    """The trainer's step, driven from outside."""

    def __init__(self, lm: Any, tokenizer: Any, dtype: torch.dtype, folder: str, compiled: bool = False,
                 low_norms: bool = False) -> None:  # fmt: skip
        on_cpu = next(lm.parameters()).device.type == "cpu"
        arguments = CMLMTrainingArguments(folder, use_cpu=on_cpu, bf16=dtype == torch.bfloat16, report_to="none",
                                          torch_compile=compiled, low_precision_layer_norm=low_norms)  # fmt: skip
        self.trainer = CMLMTrainer(CMLMModel(lm, CMLMConfig()), arguments, processing_class=tokenizer, train_dataset=[])
        self.trainer.state.max_steps = 1_000_000
        self.trainer.create_optimizer_and_scheduler(1_000_000)
        prepared = self.trainer.accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        self.model, self.optimizer = prepared
        self.lm = self.trainer.model.lm

    def step(self, rows: Sequence[Any]) -> Tensor:
        """One optimizer step from token rows."""
        trainer = self.trainer
        batch = to_device(trainer.data_collator(rows), trainer.args.device)
        (inputs,), _ = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        loss = trainer.training_step(self.model, inputs)
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        self.optimizer.step()
        trainer.lr_scheduler.step()
        self.model.zero_grad()
        trainer.state.global_step += 1
        return loss


def minilm() -> Any:
    """all-MiniLM-L6-v2 with a new LM head."""
    from transformers import AutoModelForMaskedLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    return AutoModelForMaskedLM.from_pretrained(demo_model_path())


def make(provider: str, dtype: torch.dtype, tokenizer: Any, folder: str, new: Callable[[], Any] = minilm) -> Any:
    """A provider with its own weights: `lm`, made by `new`, and `step(rows)`.

    "ours compiled", for example, has compiled layers; "ours compiled low" also has low-precision layer norms.
    """
    torch.manual_seed(0)  # new weights must be the same for all
    lm, (kind, *how) = new(), provider.split()
    compiled = "compiled" in how
    if kind == "ours":
        return Ours(lm, tokenizer, dtype, folder, compiled, "low" in how)
    if compiled:
        compile_layers(lm)
    return {"strong": Strong, "naive": Naive}[kind](lm, tokenizer, CMLMConfig(), dtype)


def check(providers: dict[str, Any], rows: Sequence[Any]) -> dict[str, float]:
    """Largest relative difference of loss and gradients from naive's in this dtype; same masks, no dropout."""
    trainer = providers["ours"].trainer
    packed = trainer.mask(trainer.data_collator(rows), 0)
    found = {}
    for name, provider in providers.items():
        provider.lm.eval()
        if isinstance(provider, Ours):
            with provider.trainer.autocast_smart_context_manager():
                loss = provider.model(**packed).loss
        else:
            batch = provider.pad(rows)
            ids = [row["sample_id"] for row in rows]
            masked = trainer.mask({**batch, "sample_ids": torch.tensor(ids)}, 0)
            given = {**to_device(batch, provider.device), **{view: masked[view] for view in ("view1", "view2", "role")}}
            with torch.autocast(provider.device.type, provider.dtype, enabled=provider.dtype != torch.float32):
                loss = provider.loss(given)
        loss.backward()
        gradients = {k: p.grad for k, p in provider.lm.named_parameters() if p.grad is not None}
        found[name] = (loss.detach(), torch.cat([gradients[k].flatten() for k in sorted(gradients)]))
        provider.lm.zero_grad()
        provider.lm.train()
    loss, gradient = found["naive"]
    return {name: round(max(float(abs(a - loss) / loss), float((g - gradient).norm() / gradient.norm())), 7)
            for name, (a, g) in found.items() if name != "naive"}  # fmt: skip


class Floor:
    """The least that a step costs: its products and AdamW's bytes, at the best rates measured in any round."""

    def __init__(self, ours: Ours, work: Sequence[Sequence[Any]], dtype: torch.dtype) -> None:
        config, self.dtype, self.gemm_rate, self.copy_rate = ours.lm.config, dtype, 0.0, 0.0
        self.flops = operations(ours, work)
        # AdamW reads weight, gradient and two moments, and writes all but the gradient.
        self.bytes = 7 * 4 * sum(p.numel() for p in ours.lm.parameters() if p.requires_grad)
        self.shapes = (2048, 2048, 2048), (1712, config.hidden_size, config.intermediate_size)

    def measure(self) -> None:
        """Measure one round's rates, and keep the best so far."""
        self.gemm_rate = max(self.gemm_rate, *(gemm_rate(*shape, self.dtype) for shape in self.shapes))
        source = torch.ones(2**26)
        target = torch.empty_like(source)
        self.copy_rate = max(self.copy_rate, 8 * source.numel() / best(lambda: target.copy_(source)))

    def row(self) -> dict[str, float]:
        """The floor in the form that results hold."""
        seconds = self.flops / self.gemm_rate + self.bytes / self.copy_rate
        return {"GFLOP": round(self.flops / 1e9, 1), "GEMM GFLOP/s": round(self.gemm_rate / 1e9, 1),
                "AdamW MB": round(self.bytes / 1e6, 1), "copy GB/s": round(self.copy_rate / 1e9, 1),
                "ms": round(seconds * 1e3, 1)}  # fmt: skip


def operations(ours: Ours, work: Sequence[Sequence[Any]]) -> float:
    """Operations in the matrix products of a step; the mean over batches."""
    # Only real tokens count. Each weight of a linear layer takes two operations per row forward and four backward; attention,
    # six products of a sequence with itself; token contrast, three products of masked tokens and candidates per direction.
    config, flops, encoder = ours.lm.config, 0.0, linear_weights(ours.lm.base_model)
    head = linear_weights(ours.lm) - encoder
    for rows in work:
        lengths = [len(row["input_ids"]) for row in rows]
        batch = ours.trainer.mask(ours.trainer.data_collator(rows), 0)
        masked = int((batch["role"] > 0).sum())
        candidates = int((~torch.isin(batch["input_ids"], batch["special_ids"])).sum())
        flops += 6 * (encoder * 2 * sum(lengths) + head * masked)
        flops += 12 * config.hidden_size * config.num_hidden_layers * sum(2 * n * n for n in lengths)
        flops += 6 * config.hidden_size * masked * candidates
    return flops / len(work)


def linear_weights(model: nn.Module) -> int:
    """Number of elements in the weights of all linear layers."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def gemm_rate(m: int, k: int, n: int, dtype: torch.dtype) -> float:
    """Operations per second of one product, by the faster of PyTorch's own kernel and oneDNN's."""
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    ways = [lambda: F.linear(a, b)]
    if has_onednn(dtype):
        ways.append(lambda: onednn(a, b))
    return 2 * m * k * n / min(map(best, ways))


def best(call: Callable[[], Any], repeats: int = 7) -> float:
    """Seconds of the fastest of several calls: a rate is what the machine can do."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


class Worker:
    """A provider in its own process, so that its allocator settings do not affect another's time."""

    def __init__(self, provider: str, dtype: torch.dtype) -> None:
        self.connection, other = mp.Pipe()
        arguments = (other, provider, dtype, torch.get_num_threads())
        self.process = mp.get_context("spawn").Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        other.close()  # so that a worker's end raises EOFError here
        self.connection.recv()  # ready

    def seconds(self) -> float:
        """Seconds per step; the mean over the batches."""
        self.connection.send("run")
        seconds: float = self.connection.recv()
        return seconds

    def stop(self) -> None:
        """End the process and wait for it."""
        self.connection.send("stop")
        self.process.join()


def _serve(connection: Any, provider: str, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    if (provider.startswith("ours") or "kept" in provider) and not keep_freed_memory():
        raise RuntimeError(f"{provider} is timed with freed memory kept, which this C library, or its environment, does not do")
    tokenizer, rows = load()
    work = batches(rows, provider)
    with tempfile.TemporaryDirectory() as folder:
        one = make(provider, dtype, tokenizer, folder)
        for batch in work:  # lets oneDNN and the allocator see each size once
            one.step(batch)
        connection.send(None)
        while connection.recv() == "run":
            for batch in work[:2]:  # an idle process's memory may have been reclaimed, and its threads are asleep
                one.step(batch)
            begin = time.perf_counter()
            for batch in work:
                one.step(batch)
            connection.send((time.perf_counter() - begin) / BATCHES)


def measure(dtype: torch.dtype, rounds: int, names: Sequence[str] = TIMED) -> dict[str, Any]:
    """One row of the results: medians over rounds; a round's time is the mean over the batches."""
    tokenizer, rows = load()
    with tempfile.TemporaryDirectory() as folder:
        providers = {name: make(name, dtype, tokenizer, folder) for name in names if "kept" not in name}
        work = {name: batches(rows, name) for name in names}
        differences = check(providers, work["naive"][0]) if "naive" in names else {}
        if any(not value < (1e-3 if dtype == torch.float32 else 0.05) for value in differences.values()):
            raise AssertionError(f"loss and gradients are not those of the naive step: {differences}")
        least = Floor(providers["ours"], work["ours"], dtype)
    workers = {name: Worker(name, dtype) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        least.measure()
        for name, worker in workers.items():
            samples[name].append(worker.seconds())
    for worker in workers.values():
        worker.stop()
    ms = {name: round(statistics.median(values) * 1e3, 1) for name, values in samples.items()}
    size, found = {name: tokens(work[name]) for name in names}, least.row()
    return {
        "op": "training step",
        "case": f"MiniLM-L6 32 sentences {str(dtype).removeprefix('torch.')}",
        "ms": ms,
        "tokens": {name: round(count) for name, count in size.items()},
        "speedup": {name: round(ms[name] / size[name] / (ms["ours"] / size["ours"]), 2) for name in names if name != "ours"},
        "floor": found,
        "share of floor": round(found["ms"] / ms["ours"], 3),
        "difference from naive": differences,
    }


def main() -> None:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"),
                        help="default: float32, and bfloat16 if the CPU multiplies it in hardware")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--provider", action="append", choices=TIMED, help="only these; `ours` is needed")
    parser.add_argument("--output", type=Path, default=Path("out/bench_train.json"))
    options = parser.parse_args()
    machine = describe(torch.device("cpu"))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    measured = {"commit": commit(Path(__file__).parents[1]), **versions}
    result = Table(title="one optimizer step, 32 sentences")
    for column in ("dtype", "ours ms", *TIMED[1:], "floor ms", "share of floor"):
        result.add_column(column, justify="right")
    for name in options.dtype or ("float32", "bfloat16")[: 1 + bfloat16_hardware()]:
        row = measure(getattr(torch, name), options.rounds, options.provider or TIMED) | measured
        print(json.dumps(row), flush=True)
        save(row, machine, options.output)
        ms, speedup = row["ms"], row["speedup"]
        others = [f"{ms[other]} ({speedup[other]} x)" if other in ms else "" for other in TIMED[1:]]
        result.add_row(name, f"{ms['ours']}", *others, f"{row['floor']['ms']}", f"{row['share of floor']:.0%}")
    Console(width=120).print(result)


def save(row: dict[str, Any], machine: dict[str, Any], path: Path) -> None:
    """Write a row, replacing the earlier one of its case; `machine` describes the state before the run."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [*(old for old in rows if old["case"] != row["case"]), row]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "rows": sorted(rows, key=lambda r: r["case"])}, indent=1) + "\n")


if __name__ == "__main__":
    main()
