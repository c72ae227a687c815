"""Post-training optimizer steps: the trainer's own, and the two that people write (benchmarks/peers)."""

from __future__ import annotations

import random
import tempfile
from functools import partial
from typing import Any

import torch

from ..registry import Call, Op, Problem, Provider, Shape, Wrong

#: Largest relative difference of loss and gradients from those of the naive step: same masks, no dropout.
BOUND = {"float32": 1e-3, "bfloat16": 0.05}


def build(device: torch.device, batches: int, sequences: int, dtype: str = "float32") -> Problem:
    """Steps of all-MiniLM-L6-v2 on real sentences, the same for all providers; `strong` gets them grouped by length."""
    from transformers.utils import logging

    from ..bench_train import check, load, make

    logging.disable_progress_bar()  # loading's; the suite has its own
    tokenizer, rows = load()
    by_length = sorted(range(len(rows)), key=[len(ids) for ids in rows["input_ids"]].__getitem__)
    step = len(rows) // batches
    grouped = [[rows[i] for i in by_length[n * step + (step - sequences) // 2 :][:sequences]] for n in range(batches)]
    loose = [row for group in grouped for row in group]
    random.Random(0).shuffle(loose)
    work = {"strong": grouped, "mixed": [loose[n * sequences : (n + 1) * sequences] for n in range(batches)]}
    folder = tempfile.TemporaryDirectory()  # held by the problem, and deleted with it
    kind = getattr(torch, dtype)
    models = {name: make(name, kind, tokenizer, folder.name) for name in ("ours", "strong", "naive")}
    differences = check(models, work["mixed"][0])

    def agrees(name: str, answer: Any) -> tuple[float, None] | None:
        found = differences.get(name.split("/")[0])
        if found is not None and not found < BOUND[dtype]:
            raise Wrong(f"{name}: loss and gradients differ from the naive step's by {found:.3g}")
        return None

    tokens = float(sum(2 * len(row["input_ids"]) for row in loose))  # of both views
    sizes = {"batches": batches, "sequences": sequences, "dtype": dtype}
    return Problem(sizes, device, (models, work, folder), (tokens, "token"), 0.0, agrees)


def _steps(name: str, problem: Problem) -> Call:
    """One step per batch."""
    models, work, _ = problem.inputs
    return lambda: [models[name].step(rows) for rows in work["strong" if name == "strong" else "mixed"]]


def _shape(batches: int, sequences: int, dtype: str, suite: str = "quick") -> Shape:
    sizes = {"batches": batches, "sequences": sequences, "dtype": dtype}
    return Shape(f"MiniLM-L6 {batches} steps of {sequences} sentences {dtype}", sizes, suite)


OPS = (
    Op(
        "train_step", "optimizer steps of post-training: masks, both views, backward, clipping, AdamW",
        (
            _shape(1, 2, "float32", "smoke"), _shape(3, 16, "bfloat16"),
            _shape(5, 32, "float32", "full"), _shape(5, 32, "bfloat16", "full"),
        ),
        build,
        (
            Provider("ours/python", partial(_steps, "ours")),
            Provider("strong", partial(_steps, "strong")),
            Provider("naive", partial(_steps, "naive")),
        ),
        partial(_steps, "ours"),
        "matrix products, which all three share, and in 16 bits, just as much, the passes between them",
        cpu_only="this benchmark steps on the CPU",
    ),
)  # fmt: skip
