"""The CPU kernels of every instruction set that this machine has, not only of the one chosen by default."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cmlm_fast import _library

pytestmark = pytest.mark.skipif("_C" in _library.load_errors, reason="no compiled CPU kernels")
ALL = ("baseline", "avx2", "avx512")


def python(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CMLM_FAST_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=Path(__file__).parent, timeout=600
    )


@pytest.mark.parametrize("isa", ALL)
def test_every_sample_is_right(isa):
    own = python("", "-c", "import torch, cmlm_fast; print(torch.ops.cmlm_fast._isa())").stdout.strip()
    if ALL.index(isa) >= ALL.index(own):
        pytest.skip("test_parity runs these" if isa == own else f"this machine has no {isa}")
    run = python(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_parity.py", "-k", "equals_the_truth and cpp")
    assert run.returncode == 0, run.stdout[-5000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) > 250


@pytest.mark.parametrize("isa", ALL)
def test_the_named_one_is_taken(isa):
    run = python(isa, "-c", "import torch, cmlm_fast; print(torch.ops.cmlm_fast._isa())")
    assert run.stdout.strip() == isa or f"one that this machine has, got {isa}" in run.stderr


def test_one_that_is_not_is_an_error_of_the_op_and_told_by_doctor():
    code = "import torch, cmlm_fast; z = torch.eye(4); cmlm_fast.info_nce(z, z, backend='cpp')"
    words = "expected CMLM_FAST_ISA to be baseline, avx2 or avx512, and one that this machine has, got sse9"
    run = python("sse9", "-c", code)
    assert run.returncode == 1 and f"RuntimeError: cmlm_fast: {words}" in run.stderr
    told = python("sse9", "-c", "from cmlm_fast.doctor import _isa; print(_isa())")
    assert words in told.stdout
