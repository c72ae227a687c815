"""Freed memory kept from step to step."""

import os
import platform
import subprocess
import sys

import pytest
from test_trainer import make_trainer

from cmlm_fast import memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")

FAULTS = """
import resource, torch
from cmlm_fast.memory import keep_freed_memory
kept = {call}
def step():
    torch.zeros(12_000_000).add_(1)  # 48 MB: glibc would map and unmap it each time
for _ in range(20):  # freed blocks grow together, then all fit
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(kept, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 4)
"""


def _faults(call: str, **environment: str) -> tuple[str, int]:
    clean = {name: value for name, value in os.environ.items() if name not in memory._ENVIRONMENT}
    done = subprocess.run([sys.executable, "-c", FAULTS.format(call=call)], env={**clean, **environment},
                          capture_output=True, text=True, check=True)  # fmt: skip
    kept, faults = done.stdout.split()
    return kept, int(faults)


def test_freed_memory_is_used_again_without_page_faults():
    _, without = _faults("None")
    kept, faults = _faults("keep_freed_memory()")
    assert kept == "True" and faults < 100 < 5_000 < without, (faults, without)


def test_what_the_environment_says_stays():
    assert _faults("keep_freed_memory()", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"


def test_training_on_the_cpu_keeps_it(monkeypatch, tmp_path, tiny_rows, tiny_tokenizer):
    calls = []
    monkeypatch.setattr("cmlm_fast.trainer.keep_freed_memory", lambda: calls.append(1))
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, max_steps=1)
    assert not calls
    trainer.train()
    assert calls
