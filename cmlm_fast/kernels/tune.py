"""Choosing tile sizes by measurement: one call, or `python -m cmlm_fast.kernels.tune [--output FILE]`.

    >>> from cmlm_fast.kernels.tune import retune
    >>> retune()                      # doctest: +SKIP
    {'narrow': Config(...), 'wide': Config(...)}

Nothing is tuned unless asked for: an op takes its chip's entry of configs.json. `retune` times forward and backward of
token_contrastive under each candidate, keeps the fastest of those that give the same loss, and uses it from then on in this
process; `write` puts it into configs.json, for all later ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from . import chip
from ._configs import Config, Tile, config, dump, install, shape_class, table

#: Candidates beside the entry there is: (rows, cols, depth, warps, stages) of the scores and of the products.
SCORES = [(r, c, d, w, s) for r, c, (d, s), w in product((64, 128), (64, 128, 256), ((32, 4), (64, 3), (64, 4)), (4, 8))]
PRODUCTS = [(0, c, d, w, s) for c, (d, s), w in product((64, 128, 256), ((32, 4), (64, 3), (64, 4)), (4, 8))]
PANELS = [(2048, 2048), (4096, 1024), (4096, 2048), (8192, 1024)]


def candidates(now: Config, what: str) -> Iterator[Config]:
    """`now` and its variants in `what`: "scores", "products" or "panel"."""
    yield now
    if what == "panel":
        yield from (replace(now, panel=panel) for panel in PANELS if panel != now.panel)
        return
    for sizes in SCORES if what == "scores" else PRODUCTS:
        rows, cols, depth, warps, stages = sizes
        tile = Tile(rows or now.scores.rows, cols, depth, warps, stages)
        yield replace(now, **{what: tile})


def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Median time of a call."""
    call()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def retune(
    device: str | torch.device = "cuda",
    *,
    dtype: torch.dtype = torch.bfloat16,
    shapes: tuple[tuple[int, int, int], ...] = ((4096, 32768, 128), (4096, 32768, 768)),
    seconds: float = 60.0,
    stages: tuple[str, ...] = ("scores", "products", "panel"),
    write: Path | None = None,
) -> dict[str, Config]:
    """Measure candidates and use the fastest.

    Args:
        device: where to measure.
        dtype: of the rows; its entry serves all dtypes of its width.
        shapes: (N, M, D); one for each shape class to tune.
        seconds: for each shape; when they are over, the best so far is taken.
        stages: what is tuned, one after the other.
        write: a file for the whole table, such as the package's configs.json.

    Returns:
        The entry of each shape class.
    """
    device, chosen = torch.device(device), {}
    for shape in shapes:
        name = shape_class(shape[2])
        best = config(chip(), dtype, name)
        call = _call(device, dtype, shape)
        expected, end = float(call()), time.perf_counter() + seconds
        for what in stages:
            timed: list[tuple[float, Config]] = []
            for candidate in candidates(best, what):
                if timed and time.perf_counter() > end:
                    break
                elapsed = _timed(candidate, name, dtype, device, call, expected)
                if elapsed is not None:
                    timed.append((elapsed, candidate))
            best = min(timed, key=lambda pair: pair[0])[1]
        install(chip(), dtype, name, best)
        chosen[name] = best
    if write is not None:
        write.write_text(dump(table()), encoding="utf-8")
    return chosen


def _call(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> Callable[[], torch.Tensor]:
    from .token_contrastive import token_contrastive

    n, m, d = shape
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(rows, d, generator=generator).to(device, dtype) for rows in (n, m))
    target, tau = torch.arange(n, device=device) % m, torch.tensor(0.05, device=device)
    return lambda: token_contrastive(query, key, target, tau, None, None, None, None, True, "mean", True, True)[0]


def _timed(candidate: Config, name: str, dtype: torch.dtype, device: torch.device, call: Callable[[], torch.Tensor],
           expected: float) -> float | None:  # fmt: skip
    """Milliseconds, or None where the candidate does not fit the chip or gives another loss."""
    before = config(chip(), dtype, name)
    install(chip(), dtype, name, candidate)
    try:
        if abs(float(call()) - expected) > 1e-3 * abs(expected):
            return None
        return milliseconds(call, device)
    except Exception as error:
        if type(error).__name__ in ("OutOfResources", "PTXASError", "CompilationError"):
            return None
        raise
    finally:
        install(chip(), dtype, name, before)


def main() -> None:
    """Tune for this machine's GPU and say what was chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each shape class")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("configs.json"))
    options = parser.parse_args()
    for name, entry in retune(seconds=options.seconds, write=options.output).items():
        print(f"{chip()} {name}: {entry}")


if __name__ == "__main__":
    main()
