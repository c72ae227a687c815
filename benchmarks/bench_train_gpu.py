"""Times a post-training optimizer step on a GPU against both baselines, and the share of the matrix rate real tokens reach.

    python -m benchmarks.bench_train_gpu [--out DIR] [--case NAME ...] [--rounds N] [--seconds N] [--trace | --compile]

The models are BERT-base and RoBERTa-base in bfloat16, built from their configurations, with dropout. Sequences have the lengths
of real sentences (Rotten Tomatoes in BERT's word pieces, at most 78); ids are drawn by Zipf's law, since a step's time depends
on the text only through lengths and how often tokens repeat. As in bench_train, losses and gradients are compared first,
providers take turns, a step includes everything from token rows on, and speed-ups are per real token.

"ours compiled" and "strong compiled" have the encoder's layers compiled by torch.compile before they are timed; "ours compiled
low" also has low-precision layer norms. Speed-ups are those of the fastest of ours. A step has SIZES sentences, for naive and
strong at most those in MOST. One step of each of ours runs in PyTorch's sync debug mode, which finds waits.

- MFU: operations per second of a step's products (real tokens only), over the rate of an 8192³ product in this run.
- "train ms": a step in the whole loop of `CMLMTrainer.train`, with loader and callbacks, layers not compiled.
- "device ms", with --trace: how long the device is busy in a step, by PyTorch's profiler.

Everything goes to DIR/train.json, the table to DIR/train.txt; --trace also writes the profiler's tables. --compile times
nothing but fills torch.compile's cache, where a later run finds the compiled layers.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from cmlm_fast import CMLMConfig, CMLMModel, CMLMTrainer, CMLMTrainingArguments

from .bench_gpu import milliseconds
from .bench_train import PROVIDERS, check, make, operations, tokens
from .gpu_results import head

#: How many of the 8,530 sentences of Rotten Tomatoes have 3, 4, … tokens.
SENTENCES = (
    2, 4, 17, 45, 63, 85, 102, 123, 153, 171, 175, 206, 195, 211, 197, 262, 257, 280, 268, 282, 296, 282, 271,
    296, 287, 303, 285, 261, 247, 252, 209, 212, 211, 217, 182, 169, 171, 144, 157, 122, 114, 108, 79, 71, 78,
    59, 56, 40, 32, 42, 36, 25, 29, 19, 16, 7, 10, 10, 5, 7, 5, 4, 1, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1,
)  # fmt: skip
COMPILED = ("ours compiled", "strong compiled", "ours compiled low")
FIRST, STEPS = 4, 12  # steps of `train`: the FIRST are not timed, the STEPS after them are
BATCHES, DEVICE = 4, "cuda"
CASES = ("bert-base", "roberta-base")
SIZES = (512, 1024, 2048)  # sentences per step
BATCH = SIZES[0]
MOST = {"naive": 512, "strong": 1024}  # sentences per step that fit into memory next to the others


def configuration(case: str) -> Any:
    """The published checkpoint's configuration."""
    from transformers import BertConfig, RobertaConfig

    if case == "bert-base":
        return BertConfig()
    return RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)


def make_tokenizer(vocabulary: int) -> Any:
    """A word-level tokenizer with what the collators need: special tokens and padding. Pad is id 1, as in RoBERTa."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    special = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
    words = {word: i for i, word in enumerate([*special.values(), *(str(i) for i in range(5, vocabulary))])}
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
                                   model_input_names=names, **special)  # fmt: skip


def make_rows(vocabulary: int) -> list[dict[str, Any]]:
    """One row for each sentence, shuffled."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.repeat_interleave(torch.arange(3, 3 + len(SENTENCES)), torch.tensor(SENTENCES))
    lengths = lengths[torch.randperm(len(lengths), generator=random)].tolist()
    odds = 1 / torch.arange(1, vocabulary - 4, dtype=torch.float64)
    ids = (5 + torch.multinomial(odds, sum(lengths), replacement=True, generator=random)).split(lengths)
    rows = []
    for number, (length, part) in enumerate(zip(lengths, ids, strict=True)):
        part[0], part[-1] = 0, 2
        rows.append({"input_ids": part.tolist(), "attention_mask": [1] * length, "sample_id": number})
    return rows


def batches(rows: Sequence[Any], provider: str, size: int) -> list[list[Any]]:
    """A sample of a run's batches over these rows: mixed, or for `strong` sorted by length, shortest to longest."""
    order = sorted(rows, key=lambda row: len(row["input_ids"])) if provider.startswith("strong") else rows
    number = len(rows) // size
    chosen = range(number // BATCHES // 2, number, number // BATCHES)
    return [list(order[n * size : (n + 1) * size]) for n in chosen]


def seconds(step: Callable[[Any], Any], work: Sequence[Any]) -> float:
    """Device seconds per step; the mean over the batches.

    An untimed step comes first so that, as in training, the host may be ahead of the device from the start.
    """
    step(work[-1])
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for batch in work:
        step(batch)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / len(work)


class Clock(TrainerCallback):
    """Measures the seconds per step, once FIRST steps are done."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start or stop the clock."""
        if state.global_step in (FIRST, state.max_steps):
            torch.cuda.synchronize()
            now = time.perf_counter()
            if state.global_step == FIRST:
                self.begin = now
            else:
                self.seconds = (now - self.begin) / (state.max_steps - FIRST)


def train(lm: Any, tokenizer: Any, rows: Sequence[Any], size: int, folder: str) -> float:
    """Milliseconds per step of `CMLMTrainer.train`."""
    clock = Clock()
    arguments = CMLMTrainingArguments(folder, max_steps=FIRST + STEPS, per_device_train_batch_size=size, save_strategy="no",
                                      logging_strategy="no", report_to="none", disable_tqdm=True, bf16=True,
                                      use_cpu=DEVICE == "cpu")  # fmt: skip
    CMLMTrainer(CMLMModel(lm, CMLMConfig()), arguments, processing_class=tokenizer, callbacks=[clock],
                train_dataset=Dataset.from_list(list(rows))).train()  # fmt: skip
    return round(clock.seconds * 1e3, 2)


def waits(step: Callable[[Any], Any], batch: Any) -> str:
    """What in a step waits for the device; "" if nothing does."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batch)
    except RuntimeError as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{error} ({place.filename}:{place.lineno})"
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return ""


def add_compiled(providers: dict[str, Any], new: Callable[[str], Any], work: Mapping[str, Any], differences: dict[str, float],
                until: float) -> dict[str, str]:  # fmt: skip
    """Add the compiled providers and their differences; none is begun after `until`.

    They are checked against uncompiled ones that have taken no step.

    Returns:
        name -> why it is absent.
    """
    absent: dict[str, str] = {}
    plain = {name: new(name) for name in ("ours", "naive")}
    # Providers share code, so recompilations for the layers of one count towards the limit of another.
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    for name in COMPILED:
        try:
            if time.perf_counter() > until:
                raise TimeoutError("no time was left to compile it")
            provider = new(name)
            differences[name] = difference = check({name: provider, **plain}, work["naive"][0][:64])[name]
            if not difference < 0.05:
                raise AssertionError(f"loss and gradients differ from the naive step's by {difference}")
            seconds(provider.step, work[name])  # the second size since `check`: dynamic-shape code is made now
            providers[name] = provider
        except Exception as error:  # from a compiler or the driver: what is measured without it still counts
            absent[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return absent


def new_lm(config: Any) -> Any:
    """A masked LM of random weights."""
    from transformers import AutoModelForMaskedLM

    with torch.device(DEVICE):  # where drawing random weights takes no time
        return AutoModelForMaskedLM.from_config(config)


def maker(config: Any, tokenizer: Any, folder: str) -> Callable[[str], Any]:
    """Maps the name of a provider to a new one with its own weights."""
    return lambda name: make(name, torch.bfloat16, tokenizer, folder, partial(new_lm, config))


def compile_only(case: str) -> dict[str, str]:
    """Compile the layers of every provider that has compiled ones; returns name -> why one could not be."""
    config = configuration(case)
    tokenizer, rows = make_tokenizer(config.vocab_size), make_rows(config.vocab_size)
    work = {name: batches(rows, name, BATCH)[:1] for name in ("naive", *COMPILED)}
    with tempfile.TemporaryDirectory() as folder:
        return add_compiled({}, maker(config, tokenizer, folder), work, {}, float("inf"))


def measure(case: str, rate: float, rounds: int, until: float, trace: Path | None = None) -> Iterator[list[dict[str, Any]]]:
    """Yield a case's rows, in the end one for each of SIZES; partial lists come earlier, in case time runs out."""
    config = configuration(case)
    tokenizer, rows = make_tokenizer(config.vocab_size), make_rows(config.vocab_size)
    work = {size: {name: batches(rows, name, size) for name in (*PROVIDERS, *COMPILED) if size <= most(name)} for size in SIZES}
    with tempfile.TemporaryDirectory() as folder:
        new = maker(config, tokenizer, folder)
        providers = {name: new(name) for name in PROVIDERS}
        differences = check(providers, work[BATCH]["naive"][0][:64])
        if any(not value < 0.05 for value in differences.values()):
            raise AssertionError(f"loss and gradients are not those of the naive step: {differences}")
        facts = {"absent": dict.fromkeys(COMPILED, "not made yet"), "difference from naive": differences}
        for name in providers:
            seconds(providers[name].step, work[BATCH][name])
        yield [row_of(f"{case} {BATCH}", rate, providers, work[BATCH], 1) | facts]
        facts["absent"] = add_compiled(providers, new, work[BATCH], differences, until)
        done = []
        for size in SIZES:
            here = {name: provider for name, provider in providers.items() if name in work[size]}
            for name in here if size > BATCH else ():
                seconds(here[name].step, work[size][name])
            times = rounds if size == BATCH else min(rounds, 2)  # longer steps vary less
            done.append(row_of(f"{case} {size}", rate, here, work[size], times) | facts)
            yield done
        done[0]["train ms"] = train(new_lm(config), tokenizer, rows, BATCH, folder)
        yield done
        for row, size in ((done[0], BATCH), (done[-1], SIZES[-1])) if trace is not None else ():
            compiled = {name for name in providers if name.startswith("ours compiled")}
            for name in sorted({"ours", row["best"]} if size == BATCH else compiled):
                found, row["device ms"][name] = profile(providers[name].step, work[size][name])
                (trace / f"trace-{case}-{size}-{name.replace(' ', '-')}.txt").write_text(found)
                yield done


def most(provider: str) -> int:
    """The most sentences per step that a provider is timed with."""
    return MOST.get(provider.split()[0], SIZES[-1])


def row_of(case: str, rate: float, providers: Mapping[str, Any], work: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """One row of the results."""
    flops = operations(providers["ours"], work["ours"])
    found = {name: waits(provider.step, work[name][0]) for name, provider in providers.items() if name.startswith("ours")}
    samples: dict[str, list[float]] = {name: [] for name in providers}
    peak = {}
    for _ in range(rounds):
        for name, provider in providers.items():
            torch.cuda.reset_peak_memory_stats()
            samples[name].append(seconds(provider.step, work[name]))
            peak[name] = torch.cuda.max_memory_allocated()
    ms = {name: round(statistics.median(values) * 1e3, 2) for name, values in samples.items()}
    size = {name: tokens(work[name]) for name in ms}
    best = min((name for name in ms if name.startswith("ours")), key=ms.__getitem__)
    per_token = {name: ms[name] / size[name] for name in ms}  # milliseconds per token
    return {
        "case": f"{case} sentences bfloat16", "ms": ms,
        "tokens": {name: round(n) for name, n in size.items()},
        "best": best, "speedup": {name: round(per_token[name] / per_token[best], 2) for name in ms if name != best},
        "TFLOP": round(flops / 1e12, 2), "MFU": round(flops / (ms[best] / 1e3) / rate, 3),
        "peak GB": {name: round(n / 1e9, 1) for name, n in peak.items()}, "waits": found, "device ms": {},
    }  # fmt: skip


def profile(step: Callable[[Any], Any], work: Sequence[Any]) -> tuple[str, float]:
    """Tables of a step's time on the device and on the host, and the milliseconds per step for which the device is busy."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for batch in work[:2]:
            step(batch)
        torch.cuda.synchronize()
    table = found.key_averages()
    kernels = [event for event in table if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    busy = sum(event.self_device_time_total for event in kernels) / 1e3 / len(work[:2])
    return "\n".join(table.table(sort_by=by, row_limit=110, max_name_column_width=100)
                     for by in ("self_cuda_time_total", "self_cpu_time_total")), round(busy, 2)  # fmt: skip


def report(results: dict[str, Any]) -> str:
    """The table as text."""
    lines = [f"{results['device']}: bfloat16 product {results['rate'] / 1e12:.0f} TFLOP/s"]
    for row in results["rows"]:
        times = (f"{name} {ms} ms" + (f" ({row['speedup'][name]} x)" if name in row["speedup"] else "")
                 for name, ms in row["ms"].items())  # fmt: skip
        waiting = {name: found for name, found in row["waits"].items() if found}
        lines += [f"{row['case']}: {', '.join(times)}; x: as long a token as {row['best']}, MFU {row['MFU']:.0%}, "
                  f"waits: {waiting or 'none'}, peak GB {row['peak GB']}"]  # fmt: skip
        lines += [f"    in the loop of train a step of ours takes {row['train ms']} ms"] if "train ms" in row else []
        lines += [f"    of a step of {name} the device works {ms} ms" for name, ms in row["device ms"].items()]
        lines += [f"    absent: {name}, {why}" for name, why in row["absent"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=40, help="start no compilation later than this")
    parser.add_argument("--trace", action="store_true", help="also write tables of the profiler")
    parser.add_argument("--compile", action="store_true", help="only fill torch.compile's cache")
    options = parser.parse_args()
    if options.compile:
        print({case: compile_only(case) for case in options.case or CASES})
        return
    options.out.mkdir(parents=True, exist_ok=True)
    until = time.perf_counter() + options.seconds
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 8192**3 / milliseconds(lambda: a @ b) * 1e3
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "commit": head(), "torch": torch.__version__,
                               "rate": rate, "rows": []}  # fmt: skip
    for case in options.case or CASES:
        done = list(results["rows"])
        for rows in measure(case, rate, options.rounds, until, options.out if options.trace else None):
            results["rows"] = [*done, *rows]
            (options.out / "train.json").write_text(json.dumps(results, indent=1) + "\n")
            (options.out / "train.txt").write_text(report(results))
        gc.collect()  # reference cycles keep a Trainer alive, and with it the model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
