"""Runs ops' CUDA kernels on the CPU over all samples: results must be right, and bit-identical in every order of threads.

    CMLM_FAST_LIBRARY=... python tests/cuda_host/check.py OP[-tiles | -rows] ...

Prints each finding and then, one line per argument, the number of findings and of checks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from cmlm_fast import available
from cmlm_fast._library import contracts, op
from cmlm_fast.testing import errors_vs_eager, poisoned_memory, value_and_gradients

ORDERS = ("1", "2")  # seeds of the thread order; bits are compared
CPU = torch.device("cpu")


def off_16_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy that starts off the boundary that 16-byte loads need."""
    base = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    base[1:] = tensor.flatten()
    return base[1:].view(tensor.shape)


def mask_samples(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Sequences longer than shared memory was sized for, with and without units, and misaligned addresses."""
    generator = torch.Generator().manual_seed(3)
    samples = dict(contracts["complementary_mask"].samples(dtype, CPU))
    ids, cu, special, _, _, _, *rest = samples["exact-ragged"]
    lengths = torch.tensor([1500, *[1] * 40])
    cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    ids = torch.randint(0, 1000, (int(cu[-1]),), generator=generator).to(dtype)
    eligible = torch.rand(ids.shape, generator=generator) < 0.7
    units = torch.randint(0, 400, ids.shape, generator=generator).int()
    yield "long-among-short", (ids, cu, special, eligible, None, None, *rest)
    yield "long-units", (ids, cu, special, eligible, units, None, *rest)
    for label in ("exact-units", "bernoulli-units", "exact-ragged"):
        yield f"{label}-off", tuple(off_16_bytes(a) if torch.is_tensor(a) else a for a in samples[label])


def row_samples(name: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Misaligned rows, rows so long that they take several slices, and so many that several blocks share their columns."""
    samples = dict(contracts[name].samples(dtype, CPU))
    label = "cross-65" if name == "info_nce" else "63x1000"
    first, second, *rest = samples[label]
    if name != "info_nce":  # still more columns than one pass has weights for
        second, rest[0] = second[:280], rest[0].clamp_max(279)
    yield f"{label}-off", (off_16_bytes(first), off_16_bytes(second), *rest)
    generator = torch.Generator().manual_seed(4)
    wide = [torch.randn(rows.shape[0], 208, generator=generator, dtype=torch.float64).to(dtype) for rows in (first, second)]
    yield f"{label}-wide", (*wide, *rest)
    if name != "info_nce":
        many = [torch.randn(n, 24, generator=generator, dtype=torch.float64).to(dtype) for n in (130, 200)]
        target = torch.arange(130)
        target[:70] = -100  # a tile of queries that want no key
        yield "ignored-tile", (*many, target, rest[1], None, None, None, None, *rest[6:])


def samples(name: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield from contracts[name].samples(dtype, CPU)
    yield from mask_samples(dtype) if name == "complementary_mask" else row_samples(name, dtype)


def findings(name: str, dtype: torch.dtype, args: tuple[Any, ...]) -> Iterator[str | None]:
    """For each check of one sample: what is wrong, or None."""
    exact, results = contracts[name].exact, []
    for order in ORDERS if exact or dtype != torch.float64 else ORDERS[:1]:
        os.environ["CMLM_HOST_ORDER"] = order
        with poisoned_memory():
            results.append(op(name)(*args) if exact else value_and_gradients(op(name), name, args))
    if exact:
        yield None if all(map(torch.equal, op(name, "_reference")(*args), results[0])) else "differs from the reference"
    else:
        for what, ours, eager in errors_vs_eager(name, "", args, ours=results[0]):
            yield None if ours <= 2 * eager else f"{what}: error {ours:.3g} against float64, eager's {eager:.3g}"
    if len(results) > 1:
        yield None if all(map(torch.equal, *results)) else "depends on the order of threads"


def check(name: str, path: str) -> None:
    assert available(name)["cpp"] is None, available(name)["cpp"]
    os.environ["CMLM_HOST_PATH"] = path
    checks = wrong = 0
    for dtype in contracts[name].dtypes:
        for label, args in samples(name, dtype):
            for finding in findings(name, dtype, args):
                checks += 1
                if finding is not None:
                    wrong += 1
                    print(f"{name} {label} {dtype}: {finding}")
    print(f"{wrong} of {checks}", flush=True)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        check(*argument.partition("-")[::2])
