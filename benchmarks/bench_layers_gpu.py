"""Times two parts of the training step on a GPU against PyTorch: attention over packed sequences and the LM head's loss.

    python -m benchmarks.bench_layers_gpu [--out DIR]

Shapes are those of a bert-base step in bench_train_gpu, in bfloat16. Attention: both views of 512 sentences of 6 to 64 tokens,
12 heads of width 64, and as many tokens in sequences of 65 to 128. LM head: 15 % of the tokens against 30,522 words. Timed are
forward alone, and forward plus backward; providers take turns, each turn is triton's do_bench, and the median counts. Outputs
and gradients are compared without dropout. Everything goes to DIR/layers.json, the table to DIR/layers.txt.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmlm_fast import varlen_attention
from cmlm_fast.attention import _flash
from cmlm_fast.ops.mlm_cross_entropy import head_losses

from .bench_gpu import TURNS, agrees, milliseconds
from .bench_train_gpu import BATCH, make_rows
from .gpu_results import head

HEADS, WIDTH, VOCABULARY = 12, 64, 30522
Function = Callable[..., Tensor]


def attention(dropout: float, longer: bool = False) -> tuple[dict[str, Function], list[Tensor]]:
    """Providers, and the tensors that they take and differentiate by."""
    lengths = [len(row["input_ids"]) for row in make_rows(VOCABULARY)[:BATCH] for _ in range(2)]
    lengths = [65 + n % 64 for n in range(sum(lengths) // 96)] if longer else lengths
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    leaves = list(torch.randn(3, sum(lengths), HEADS, WIDTH, device="cuda", dtype=torch.bfloat16).unbind())
    seed, longest = torch.tensor(0, device="cuda"), max(lengths)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, bounds, dropout=dropout, seed=seed, backend="triton")

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _flash(q, k, v, bounds, longest, None, dropout, None)

    return {"varlen_attention": ours, "PyTorch's flash attention": flash}, leaves


def lm_head() -> tuple[dict[str, Function], list[Tensor]]:
    """The same for the LM head's decoder and its loss."""
    tokens = 2 * sum(len(row["input_ids"]) for row in make_rows(VOCABULARY)[:BATCH])
    rows, width = round(0.15 * tokens) // 32 * 32, HEADS * WIDTH
    target = torch.randint(VOCABULARY, (rows,), device="cuda")
    shapes, options = ((rows, width), (VOCABULARY, width), (VOCABULARY,)), {"device": "cuda", "dtype": torch.bfloat16}
    hidden, weight, bias = (torch.randn(shape, **options) * 0.1 for shape in shapes)  # type: ignore[arg-type]

    def eager(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), target, reduction="sum")

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # what the trainer calls: no row is dropped
        return head_losses(hidden, weight, bias, target).sum()

    compiled = torch.compile(eager, dynamic=False)
    return {"mlm_cross_entropy": ours, "eager": eager, "torch.compile": compiled}, [hidden, weight, bias]


def measure(case: str, functions: dict[str, Function], leaves: list[Tensor], compared: bool) -> dict[str, Any]:
    """One row; a provider whose output or gradients differ from those of the last one listed gets no time."""
    leaves = [leaf.requires_grad_() for leaf in leaves]
    calls: dict[str, dict[str, Callable[[], Any]]] = {}
    expected, absent = None, {}
    upstream: Tensor | None = None
    for name, function in reversed(functions.items()):
        try:
            out = function(*leaves)
            upstream = torch.randn_like(out) if upstream is None else upstream

            def trained(function: Function = function, upstream: Tensor = upstream) -> Any:
                out = function(*leaves)
                return out.detach(), *torch.autograd.grad(out, leaves, upstream)

            got = trained()
            expected = got if expected is None else expected
            if compared and not all(map(agrees, got, expected)):
                absent[name] = "differs from PyTorch's"
                continue
            calls[name] = {"forward": partial(function, *leaves), "forward and backward": trained}
        except Exception as error:  # from a compiler, say: the others still count
            absent[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    times: dict[str, dict[str, list[float]]] = {name: {what: [] for what in parts} for name, parts in calls.items()}
    for _ in range(TURNS):
        for name, parts in calls.items():
            for what, call in parts.items():
                times[name][what].append(milliseconds(call))
    ms = {name: {what: round(statistics.median(t), 4) for what, t in parts.items()} for name, parts in times.items()}
    return {"case": case, "ms": dict(reversed(ms.items())), "absent": absent}


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    cases = (
        *((f"attention, dropout {p}", partial(attention, p), p == 0) for p in (0.0, 0.1)),
        ("attention of 65 to 128 tokens, dropout 0.1", partial(attention, 0.1, longer=True), False),
        ("LM head and its loss", lm_head, True),
    )
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "commit": head(), "torch": torch.__version__, "rows": []}
    for case, make, compared in cases:
        found["rows"].append(measure(case, *make(), compared=compared))
        (options.out / "layers.json").write_text(json.dumps(found, indent=1) + "\n")  # partial results, in case time runs out
        (options.out / "layers.txt").write_text(report(found["rows"]))


def report(rows: list[dict[str, Any]]) -> str:
    """The table as text."""
    lines = [f"{row['case']}: {name}: " + ", ".join(f"{what} {ms:.3f} ms" for what, ms in parts.items())
             for row in rows for name, parts in row["ms"].items()]  # fmt: skip
    lines += [f"{row['case']}: absent: {name}, {why}" for row in rows for name, why in row["absent"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
