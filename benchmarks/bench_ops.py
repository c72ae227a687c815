"""Speed of the ops on this machine, beside what a user would run instead, in one table and one JSON file.

    python benchmarks/bench_ops.py [--op NAME] [--seconds S] [--output benchmarks/results/cpu.json]

Each row times its providers interleaved, checks the op against float64 first (a wrong op has no speed), and gives the
distance to a ceiling measured in the same run: the op's matrix products alone, or the copy bandwidth.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from timing import copy_bandwidth, interleaved, peak_memory

import cmlm_fast
from cmlm_fast._library import op
from cmlm_fast.ops._scores import loss_dtype
from cmlm_fast.testing import assert_no_worse_than_eager, eager_info_nce, eager_token_contrastive

Row = dict[str, Any]
SECONDS = 2.0


def forward_backward(function: Callable[..., Any], *inputs: Any, **options: Any) -> Callable[[], None]:
    """One training use of a loss: forward, backward, gradients dropped."""

    def call() -> None:
        for tensor in inputs:
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.grad = None
        function(*inputs, **options).backward()

    return call


def row(name: str, case: str, seconds: dict[str, float], **extra: Any) -> Row:
    """One result: milliseconds of each provider, and ours against the fastest other."""
    others = {provider: t for provider, t in seconds.items() if provider not in ("ours", "ceiling")}
    best = min(others, key=others.__getitem__)
    result: Row = {"op": name, "case": case, "ms": {p: round(t * 1e3, 4) for p, t in seconds.items()}, "best other": best,
                   "speedup": round(others[best] / seconds["ours"], 3), **extra}  # fmt: skip
    if "ceiling" in seconds:
        result["share of ceiling"] = round(seconds["ceiling"] / seconds["ours"], 3)
    return result


def complementary_mask() -> Iterator[Row]:
    """Both views of a batch, beside transformers' masking called once a view; 25 bytes a token is the least to move."""
    from transformers import BertTokenizerFast, DataCollatorForLanguageModeling

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*specials, *(f"w{i}" for i in range(30_517))])}
    tokenizer = BertTokenizerFast(vocab=vocabulary)
    collator = DataCollatorForLanguageModeling(tokenizer)
    bandwidth = copy_bandwidth()
    for shape, sampling in (((64, 128), "exact"), ((64, 128), "bernoulli"), ((4096, 512), "bernoulli"), ((4096, 512), "exact")):
        ids = torch.randint(5, 30_522, shape)
        options: dict[str, Any] = {"mask_token_id": 4, "vocab_size": 30_522, "special_ids": (0, 2, 3, 4), "sampling": sampling}
        ours, reference = (cmlm_fast.complementary_mask(ids, backend=b, **options) for b in (None, "reference"))
        assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))
        special = torch.zeros(shape, dtype=torch.bool)
        seconds = interleaved(
            {
                "ours": lambda: cmlm_fast.complementary_mask(ids, **options),  # noqa: B023
                "torch_mask_tokens": lambda: [collator.torch_mask_tokens(ids.clone(), special) for _ in range(2)],  # noqa: B023
                "reference": lambda: cmlm_fast.complementary_mask(ids, backend="reference", **options),  # noqa: B023
            },
            SECONDS,
        )
        seconds["ceiling"] = 25 * ids.numel() / bandwidth
        yield row("complementary_mask", f"{shape[0]}x{shape[1]} {sampling}", seconds, copy_gb_s=round(bandwidth / 1e9, 1))


def token_contrastive() -> Iterator[Row]:
    """N = 1024 anchors against M = 8192 keys, forward and backward; the ceiling is the three products alone."""
    n, m = 1024, 8192
    compiled = torch.compile(eager_token_contrastive)
    for d in (128, 384, 768):
        for dtype in (torch.float32, torch.bfloat16):
            for exclude in (False, True):
                query, key = (torch.randn(size, d).to(dtype).requires_grad_() for size in (n, m))
                words = torch.randint(0, 5000, (m,))
                target = torch.randperm(m)[:n]
                tokens = (words[target], words) if exclude else (None, None)
                tau = torch.tensor(0.05)
                args = (query, key, target, tau, None, None, *tokens, True, "mean", True, True)
                assert_no_worse_than_eager("token_contrastive", "", args)
                p = torch.randn(n, m).to(dtype)
                q, k = query.detach(), key.detach()
                ours = forward_backward(lambda *a: op("token_contrastive")(*a)[0], *args)
                seconds = interleaved(
                    {
                        "ours": ours,
                        "eager": forward_backward(eager_token_contrastive, *args),
                        "torch.compile": forward_backward(compiled, *args),
                        "ceiling": lambda: (q @ k.T, p @ k, p.T @ q),  # noqa: B023
                    },
                    SECONDS,
                )
                gradients = (query.numel() + key.numel()) * query.element_size()
                extra = peak_memory(ours) - gradients - key.numel() * 4
                case = f"N={n} M={m} D={d} {str(dtype)[6:]}" + (" excluding the same token" if exclude else "")
                yield row("token_contrastive", case, seconds, extra_bytes=extra,
                          extra_share_of_matrix=round(extra / (n * m * query.element_size()), 4))  # fmt: skip


def token_contrastive_sequence() -> Iterator[Row]:
    """Scope `sequence`: 64 sequences of 128 tokens, the keys of a row those of its sequence."""
    m, length, d = 8192, 128, 384
    for dtype in (torch.float32, torch.bfloat16):
        target = torch.arange(0, m, 4)
        query, key = (torch.randn(size, d).to(dtype).requires_grad_() for size in (target.numel(), m))
        start = (target // length * length).int()
        args = (query, key, target, torch.tensor(0.05), start, start + length, None, None, True, "mean", True, True)
        assert_no_worse_than_eager("token_contrastive", "", args)
        blocks = [t.detach().view(m // length, -1, d) for t in (query, key)]
        p = torch.randn(m // length, blocks[0].shape[1], length).to(dtype)
        seconds = interleaved(
            {
                "ours": forward_backward(lambda *a: op("token_contrastive")(*a)[0], *args),
                "eager": forward_backward(eager_token_contrastive, *args),
                "ceiling": lambda: (blocks[0] @ blocks[1].mT, p @ blocks[1], p.mT @ blocks[0]),  # noqa: B023
            },
            SECONDS,
        )
        yield row("token_contrastive", f"sequence scope, N={target.numel()} M={m} L={length} D={d} {str(dtype)[6:]}", seconds)


def info_nce() -> Iterator[Row]:
    """Forward and backward on D = 384, beside eager PyTorch and the two libraries people use, on the same scheme."""
    from pytorch_metric_learning.losses import NTXentLoss

    d = 384
    for batch in (64, 256, 1024, 4096):
        for scheme, symmetric in (("cross", True), ("cross", False), ("nt_xent", True)):
            z1, z2 = (torch.randn(batch, d).requires_grad_() for _ in range(2))
            args = (z1, z2, torch.tensor(0.05), None, scheme, symmetric, True, "mean", True, True)
            assert_no_worse_than_eager("info_nce", "", args)
            providers = {
                "ours": forward_backward(cmlm_fast.info_nce, z1, z2, scheme=scheme, symmetric=symmetric),
                "eager": forward_backward(eager_info_nce, *args),
            }
            if scheme == "nt_xent":
                pml, labels = NTXentLoss(temperature=0.05), torch.arange(batch).repeat(2)
                providers["pytorch-metric-learning"] = forward_backward(lambda a, b: pml(torch.cat([a, b]), labels), z1, z2)  # noqa: B023
            elif not symmetric:
                providers["sentence-transformers"] = forward_backward(multiple_negatives_ranking(), z1, z2)
            kind = scheme + ("" if symmetric else " one-sided")
            memory = peak_memory(providers["ours"]) - 2 * batch * d * 4
            yield row("info_nce", f"B={batch} D={d} {kind}", interleaved(providers, SECONDS), extra_bytes=memory,
                      extra_share_of_matrix=round(memory / (4 * batch * batch), 3))  # fmt: skip


def multiple_negatives_ranking() -> Callable[..., Any]:
    """sentence-transformers' MultipleNegativesRankingLoss on given embeddings, at its scale of 20 (τ = 0.05)."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(model=torch.nn.Identity(), scale=20.0)
    return lambda a, b: loss.compute_loss_from_embeddings([a, b], None)


def mlm_head() -> Iterator[Row]:
    """The LM head's loss at gathered rows, beside PyTorch's chunked linear cross entropy; the ceiling: its products."""
    v, d = 30_522, 384
    for n in (200, 2000):
        hidden, weight = (torch.randn(size, d).requires_grad_() for size in (n, v))
        bias, target = torch.zeros(v, requires_grad=True), torch.randint(0, v, (n,))
        h, w, p = hidden.detach(), weight.detach(), torch.randn(n, v)
        providers = {
            "ours": forward_backward(cmlm_fast.mlm_cross_entropy, hidden, weight, bias, target),
            "F.cross_entropy": forward_backward(
                lambda a, b, c, t: F.cross_entropy(F.linear(a, b, c), t), hidden, weight, bias, target
            ),
        }
        if hasattr(F, "linear_cross_entropy"):
            providers["F.linear_cross_entropy"] = forward_backward(
                lambda a, b, c, t: F.linear_cross_entropy(a, b, t, linear_bias=c), hidden, weight, bias, target
            )
        yield row("mlm_cross_entropy", f"N={n} V={v} D={d} float32",
                  interleaved({**providers, "ceiling": lambda: (h @ w.T, p @ w, p.T @ h)}, SECONDS))  # fmt: skip  # noqa: B023


SUITES = {
    "complementary_mask": [complementary_mask],
    "token_contrastive": [token_contrastive, token_contrastive_sequence],
    "info_nce": [info_nce],
    "mlm_cross_entropy": [mlm_head],
}


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"device": model, "threads": torch.get_num_threads(), "torch": torch.__version__, "date": str(date.today()),
            "cmlm_fast": cmlm_fast.__version__, "loss_dtype": str(loss_dtype(torch.bfloat16))}  # fmt: skip


def main() -> None:
    """Run the suites, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=SUITES, action="append", help="only these ops (default: all)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each row")
    parser.add_argument("--output", type=Path, default=Path("out/bench_ops.json"))
    options = parser.parse_args()
    global SECONDS
    SECONDS = options.seconds
    torch.manual_seed(0)
    rows = []
    for name in options.op or SUITES:
        for suite in SUITES[name]:
            for result in suite():
                rows.append(result)
                print(f"{result['op']} {result['case']}: {result['ms']}", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    table = Table(title=f"{machine()['device']}, {machine()['threads']} threads, torch {torch.__version__}")
    for column in ("op", "case", "ours ms", "best other", "speed-up", "share of ceiling"):
        table.add_column(column, justify="left" if column in ("op", "case", "best other") else "right")
    for result in rows:
        other = result["best other"]
        table.add_row(result["op"], result["case"], f"{result['ms']['ours']:.3f}", f"{other} {result['ms'][other]:.3f}",
                      f"{result['speedup']:.2f} x", f"{result.get('share of ceiling', float('nan')):.2f}")  # fmt: skip
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
