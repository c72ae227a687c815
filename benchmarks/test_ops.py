"""The same shapes and providers under pytest-benchmark, for its statistics and its comparisons between commits:

    python -m pytest benchmarks -k "token_contrastive and bert-base" --benchmark-autosave
    python -m pytest benchmarks -k "info_nce and ours" --benchmark-compare --benchmark-compare-fail=median:10%

A group is one shape. Here providers run one after the other; for a verdict use `cmlm-fast bench`, which times them in turns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .ops import OPS
from .registry import Op, Provider, Shape

pytest.importorskip("pytest_benchmark")
BODIES = [(op, shape, provider) for op in OPS for shape in op.chosen("quick") for provider in op.providers]


@pytest.mark.parametrize(
    ("op", "shape", "provider"), BODIES, ids=["-".join((o.name, s.label.replace(" ", "_"), p.name)) for o, s, p in BODIES]
)
def test_op(benchmark: Any, op: Op, shape: Shape, provider: Provider) -> None:
    """The answer is checked, then the clock runs."""
    if reason := shape.unfit(torch.device("cpu")):
        pytest.skip(reason)
    torch.manual_seed(0)
    problem = op.build(torch.device("cpu"), **shape.sizes)
    if reason := provider.absence(problem):
        pytest.skip(reason)
    call = provider.make(problem)
    problem.check(provider.name, call())
    benchmark.group = f"{op.name} {shape.label}"
    benchmark(call)
