"""Tune tile sizes by measurement on this machine's GPU: one call, or `python -m cmlm_fast.kernels.tune`.

Nothing is tuned unless requested: the kernels take their chip's entry in configs.json. `tune` times the forward and backward
passes of token_contrastive under each candidate, keeps the fastest of those that agree with the previous entry, uses it from
then on, and writes it where later processes find it (see _configs.py).

    >>> from cmlm_fast.kernels.tune import tune
    >>> tune()  # doctest: +SKIP
    {'narrow': Config(...), 'wide': Config(...)}
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from . import chip
from ._configs import Config, Tile, config, dump, load, shape_class, use, user_file

#: Candidates, one field of Config after another: (rows, cols, depth, warps, stages) of the scores, (cols, depth, warps,
#: stages) of the products, (rows, keys) of a panel.
SCORES = tuple(product((64, 128), (64, 128, 256), (32, 64), (4, 8), (3, 4)))
PRODUCTS = tuple(product((64, 128, 256), (32, 64), (4, 8), (3, 4)))
PANELS = ((2048, 2048), (4096, 1024), (4096, 2048), (8192, 1024))
SHAPES = ((4096, 32768, 128), (4096, 32768, 768))  # N, M, D: one for each shape class
REFUSED = ("OutOfResources", "PTXASError", "CompilationError")  # Triton's errors for a tile that does not fit


def candidates(now: Config, field: str) -> Iterator[Config]:
    """`now`, then entries that differ in `field` ("scores", "products" or "panel"), the nearest first: time may run out."""
    yield now
    if field == "scores":
        tried = [replace(now, scores=Tile(*sizes, now.scores.group)) for sizes in SCORES]
    elif field == "products":
        tried = [replace(now, products=Tile(now.scores.rows, *sizes)) for sizes in PRODUCTS]
    else:
        tried = [replace(now, panel=panel) for panel in PANELS]

    def changes(entry: Config) -> int:
        before, after = (value if isinstance(value := getattr(one, field), tuple) else astuple(value) for one in (now, entry))
        return sum(a != b for a, b in zip(before, after, strict=True))

    for entry in sorted(tried, key=changes):
        if entry != now and entry.products.depth <= min(entry.scores.rows, entry.scores.cols):
            yield entry


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call on the GPU, with the L2 cache flushed before each."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=50, return_mode="median"))


def tune(
    device: str | torch.device = "cuda",
    *,
    dtype: torch.dtype = torch.bfloat16,
    shapes: tuple[tuple[int, int, int], ...] = SHAPES,
    seconds: float = 120.0,
    path: Path | None = None,
    clock: Callable[[Callable[[], object]], float] = milliseconds,
) -> dict[str, Config]:
    """Measure candidates, use the fastest, and write it to a file.

    Args:
        device: where to measure.
        dtype: of the rows; the entry serves all dtypes of its width.
        shapes: (N, M, D), one for each shape class to tune.
        seconds: for each shape, a third each for scores, products and panel; once spent, the best so far is taken.
        path: the file to write, whose other entries stay; None: the one that later processes read.
        clock: returns the milliseconds of a call.

    Returns:
        The entry of each shape class.

    Raises:
        ValueError: no file is named, and CMLM_FAST_TRITON_CONFIGS is empty.
    """
    path = path or user_file()
    if path is None:
        raise ValueError("cmlm_fast.kernels.tune: expected path to be given while CMLM_FAST_TRITON_CONFIGS is empty, got None")
    kept = load(path) if path.exists() else {}
    chosen = {}
    for n, m, d in shapes:
        name = shape_class(d)
        call = _call(torch.device(device), dtype, n, m, d)
        best, truth = config(chip(), dtype, name), call()
        for field in ("scores", "products", "panel"):
            timed: list[tuple[float, Config]] = []
            end = time.monotonic() + seconds / 3
            for entry in candidates(best, field):
                if timed and time.monotonic() > end:
                    break
                took = _time(entry, name, dtype, call, truth, clock)
                if took is not None:
                    timed.append((took, entry))
            best = min(timed, key=lambda pair: pair[0])[1]
        use(chip(), dtype, name, best)
        kept.setdefault(chip(), {}).setdefault(str(dtype.itemsize * 8), {})[name] = chosen[name] = best
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump(kept), encoding="utf-8")
    return chosen


def _call(device: torch.device, dtype: torch.dtype, n: int, m: int, d: int) -> Callable[[], tuple[Tensor, ...]]:
    """Loss and gradients of random rows."""
    from .token_contrastive import token_contrastive

    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(rows, d, generator=generator).to(device, dtype) for rows in (n, m))
    target, tau = torch.arange(n, device=device) % m, torch.tensor(0.05, device=device)
    return lambda: token_contrastive(query, key, target, tau, None, None, None, None, True, "mean", True, True)


def _time(entry: Config, name: str, dtype: torch.dtype, call: Callable[[], tuple[Tensor, ...]], truth: tuple[Tensor, ...],
          clock: Callable[[Callable[[], object]], float]) -> float | None:  # fmt: skip
    """Milliseconds, or None if the tile does not fit the chip or any result differs by more than rounding."""
    before = config(chip(), dtype, name)
    use(chip(), dtype, name, entry)
    try:
        for got, expected in zip(call(), truth, strict=True):
            if not (got.double() - expected.double()).norm() <= 1e-2 * expected.double().norm():
                return None
        return clock(call)
    except Exception as error:
        if type(error).__name__ in REFUSED or "PassManager" in str(error):
            return None
        raise
    finally:
        use(chip(), dtype, name, before)


def main() -> None:
    """Tune for this machine's GPU and print what was chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="for each of two shape classes")
    parser.add_argument("--output", type=Path, help="the file (default: the one that later processes read)")
    options = parser.parse_args()
    for name, entry in tune(seconds=options.seconds, path=options.output).items():
        print(f"{chip()} {name}: {entry}")


if __name__ == "__main__":
    main()
