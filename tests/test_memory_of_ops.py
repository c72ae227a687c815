"""What the contrasts hold besides inputs and gradients: never all scores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cmlm_fast import available

CODE = """
import torch
from benchmarks.memory import peak_bytes
from cmlm_fast import info_nce, token_contrastive

torch.manual_seed(0)
torch.set_num_threads(1)
rows = {n: torch.randn(n, 16, requires_grad=True) for n in (2000, 8000, 32000)}

def pairs(n, m):
    token_contrastive(rows[n], rows[m], torch.arange(n), backend="cpp").backward()

def views(n):
    info_nce(rows[n], rows[n].detach(), backend="cpp").backward()

pairs(2000, 8000)  # threads and libraries are there
print(peak_bytes(lambda: pairs(2000, 32000), torch.device("cpu")), peak_bytes(lambda: views(8000), torch.device("cpu")))
"""


@pytest.mark.skipif(available("info_nce", "cpu")["cpp"] is not None, reason="no compiled CPU kernels")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system tells no peak")
def test_scores_are_never_all_in_memory():
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, cwd=root)
    assert run.returncode == 0, run.stderr
    for peak, scores in zip(map(int, run.stdout.split()), (2000 * 32000, 8000 * 8000), strict=True):
        assert 2**20 < peak < scores * 4 / 2  # half of them in float32
