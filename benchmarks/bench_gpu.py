"""Measures the roofline's shapes on a GPU: every backend against PyTorch alone, in one run.

    python -m benchmarks.bench_gpu [--out DIR] [--case PART-OF-A-NAME ...] [--once]

Forward and backward on bfloat16 rows (int64 ids). Providers take turns; each turn is triton's do_bench, which empties L2
before every call, and the median over turns counts. A provider whose loss or gradients differ from eager's, or whose masks
differ from the reference's, gets no time; if that baseline does not fit into memory, the first provider that does replaces it.
The same run measures two ceilings: an 8192³ bfloat16 matrix product and a copy. Everything goes to DIR/ops.json, the tables
to DIR/ops.txt. `--once` calls each op for which CUDA kernels are chosen a single time, for a profiler.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cmlm_fast import available
from cmlm_fast._library import op
from cmlm_fast.backends import _SUFFIX
from cmlm_fast.testing import EAGER

from .gpu_results import head
from .ops.contrast import as_written
from .roofline import SHAPES, Shape, arguments, duration, table

Call = Callable[[], Any]
BACKENDS = ("triton", "cuda")
TURNS = 3


def milliseconds(call: Call) -> float:
    """Median time of one call, over about 60 ms of calls."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=20, rep=60, return_mode="median"))


def trained(function: Callable[..., Any], args: tuple[Any, ...]) -> Call:
    """A forward and backward call that returns the loss and leaves the gradients in its `leaves`."""
    leaves = [x.requires_grad_() for x in args[:2]]

    def call() -> Any:
        for leaf in leaves:
            leaf.grad = None
        out = function(*args)
        loss = out[0] if isinstance(out, tuple) else out
        loss.backward()
        return loss.detach()

    call.leaves = leaves  # type: ignore[attr-defined]
    return call


def torch_linear(shape: Shape, args: tuple[Any, ...]) -> Call:
    """token_contrastive, scope batch, through F.linear_cross_entropy."""

    def loss(query: Any, key: Any, target: Any, tau: Any, *_: Any) -> Any:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        return F.linear_cross_entropy(query / tau.to(query.dtype), key, target)

    return trained(loss, args)


def providers(shape: Shape, device: str) -> dict[str, Call]:
    """Name → call, for every provider that runs on `device`; torch.compile and its peers only for shapes with a goal."""
    args = arguments(shape, device)
    mask = shape.op == "complementary_mask"
    found: dict[str, Call] = {}
    for backend in BACKENDS:
        if available(shape.op, device)[backend] is None:
            run = op(shape.op, _SUFFIX[backend])
            found[backend] = (lambda run=run: run(*args)) if mask else trained(run, args)
    if mask:
        return {**found, "reference": lambda: op(shape.op, "_reference")(*args)}
    written = as_written if shape.op == "token_contrastive" else EAGER[shape.op]
    found["eager"] = trained(written, args)
    if shape.goal and device == "cuda":
        found["torch.compile"] = trained(torch.compile(written, dynamic=False), args)
        if shape.op == "token_contrastive" and shape.keys == shape.m and hasattr(F, "linear_cross_entropy"):
            found["F.linear_cross_entropy"] = torch_linear(shape, args)
    return found


def answer(call: Call) -> tuple[Any, ...]:
    """Masks, or loss and gradients, of one call."""
    got = call()
    return got if isinstance(got, tuple) else (got, *(leaf.grad for leaf in getattr(call, "leaves", ())))


def agrees(got: Any, expected: Any) -> bool:
    """Whether masks are equal bit for bit, losses within 2 %, gradients within 5 % of their norm."""
    if not got.is_floating_point():
        return torch.equal(got, expected)
    difference = torch.linalg.vector_norm(got.float() - expected.float())
    return bool(difference <= (0.05 if got.dim() else 0.02) * torch.linalg.vector_norm(expected.float()))


def extra_memory(call: Call) -> int:
    """Peak bytes held during a call, beyond those held before it and its outputs and gradients."""
    kept = call()
    outputs = sum(x.nbytes for x in kept) if isinstance(kept, tuple) else 0
    del kept
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()  # replaces the first call's gradients
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before - outputs


def measure(shape: Shape, device: str, clock: Callable[[Call], float] = milliseconds) -> dict[str, Any]:
    """One row: milliseconds and extra bytes of each provider, and why the rest have none."""
    calls, turns, absent, extra = providers(shape, device), {}, {}, {}
    last = list(calls)[-1] if shape.op == "complementary_mask" else "eager"
    expected = None
    for name in (last, *(name for name in calls if name != last)):
        try:
            got = answer(calls[name])
            expected = got if expected is None else expected
            if not all(map(agrees, got, expected)):
                absent[name] = "differs from the reference"
                continue
            extra[name] = extra_memory(calls[name]) if device == "cuda" else 0
            turns[name] = []
        except torch.OutOfMemoryError:
            absent[name] = "out of memory"
        except Exception as error:  # from a compiler or a launch: the other providers and shapes still count
            absent[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    for _ in range(TURNS):
        for name, times in turns.items():
            times.append(clock(calls[name]))
    ms = {name: round(statistics.median(times), 5) for name, times in turns.items()}
    return {"case": shape.name, "goal": shape.goal, "ms": ms, "absent": absent, "extra bytes": extra}


def ceilings(clock: Callable[[Call], float] = milliseconds) -> dict[str, float]:
    """Operations per second of a bfloat16 product, and bytes per second (read and written) of a copy."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return {"rate": 2 * 8192**3 / clock(lambda: a @ b) * 1e3, "bandwidth": 2**32 / clock(lambda: target.copy_(source)) * 1e3}


def report(results: dict[str, Any], shapes: tuple[Shape, ...]) -> str:
    """The measurements as text."""
    rate, bandwidth = results["ceilings"]["rate"], results["ceilings"]["bandwidth"]
    lines = [f"{results['device']}: bfloat16 product {rate / 1e12:.0f} TFLOP/s, copy {bandwidth / 1e12:.2f} TB/s", ""]
    by_name = {shape.name: shape for shape in shapes}
    for row in results["rows"]:
        shape = by_name[row["case"]]
        lines.append(row["case"] + (f"   goal: {row['goal']}" if row["goal"] else ""))
        for name, ms in row["ms"].items():
            share = (f"{shape.counted / ms * 1e3 / rate:.0%} of the matrix rate" if shape.counted
                     else f"{25 * shape.n / ms * 1e3 / bandwidth:.0%} of the copy")  # fmt: skip
            lines.append(f"  {name:<24}{duration(ms / 1e3):>10}  {share:<28}{row['extra bytes'][name] / 2**20:>9.1f} MiB extra")
        lines += [f"  {name:<24}{reason:>10}" for name, reason in row["absent"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--case", action="append", metavar="PART", help="only shapes whose name contains this")
    parser.add_argument("--once", action="store_true", help="one call of each CUDA op, nothing timed")
    options = parser.parse_args()
    if options.once:
        for shape in (Shape("token_contrastive", 2048, 65536, 768, 65536), Shape("info_nce", 8192, 8192, 768, 8192, "cross")):
            trained(op(shape.op), arguments(shape, "cuda"))()
        op("complementary_mask")(*arguments(Shape("complementary_mask", 2**24, scheme="bernoulli"), "cuda"))
        torch.cuda.synchronize()
        return
    shapes = tuple(s for s in SHAPES if not options.case or any(part in s.name for part in options.case))
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "commit": head(), "torch": torch.__version__,
                               "ceilings": ceilings(), "rows": []}  # fmt: skip
    for shape in shapes:
        results["rows"].append(measure(shape, "cuda"))
        torch.cuda.empty_cache()
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "ops.json").write_text(json.dumps(results, indent=1) + "\n")  # partial results, in case time runs out
        (options.out / "ops.txt").write_text(report(results, shapes))
    measured = {row["case"]: row["ms"]["triton"] for row in results["rows"] if "triton" in row["ms"]}
    with (options.out / "ops.txt").open("a") as file:
        file.write("\n" + "\n".join(table(measured)) + "\n")


if __name__ == "__main__":
    main()
