"""The same cases under pytest-benchmark, for its comparisons between commits:

    python -m pytest benchmarks -k token_contrastive --benchmark-autosave
    python -m pytest benchmarks -k token_contrastive --benchmark-compare --benchmark-compare-fail=median:10%
"""

from __future__ import annotations

from typing import Any

import pytest

from .cases import CASES, Case

pytest.importorskip("pytest_benchmark")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_ours(benchmark: Any, case: Case) -> None:
    """Building the case checks that the op is right; then the clock runs."""
    benchmark.group = case.op
    benchmark(case.build().providers["ours"])
