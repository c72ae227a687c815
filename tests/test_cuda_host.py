"""The CUDA kernels run on the CPU (tests/cuda_host): correct in any order of threads, and within their arrays."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_host.build import COMPILER, ROOT, build, environment

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the kernels with")
CHECK = [sys.executable, str(ROOT / "tests" / "cuda_host" / "check.py")]
REFUSE = [sys.executable, str(ROOT / "tests" / "cuda_host" / "refuse.py")]


@pytest.fixture(scope="module")
def library() -> Path:
    return build(ROOT / "build" / "cuda_host" / "_C.so")


def run(command: list[str], library: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    variables = {"PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, env=environment(library, **variables), cwd=ROOT, capture_output=True, text=True)


def checked(command: list[str], library: Path) -> list[tuple[int, int]]:
    """How many checks failed, and of how many, for each thing that was run."""
    result = run(command, library)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    print(result.stdout)
    return [(int(wrong), int(checks)) for wrong, checks in re.findall(r"^(\d+) of (\d+)$", result.stdout, re.MULTILINE)]


def test_every_sample_and_order(library):
    least = {"complementary_mask": 60, "token_similarity": 200, "token_contrastive-tiles": 200, "token_contrastive-rows": 200,
             "info_nce-tiles": 200, "info_nce-rows": 200}  # fmt: skip
    found = checked([*CHECK, *least], library)  # one process: imports take longer than some of the checks
    for (wrong, checks), (what, enough) in zip(found, least.items(), strict=True):
        assert wrong == 0, what
        assert checks > enough, what


def test_wrong_values_are_refused_by_the_kernels(library):
    [(accepted, cases)] = checked(REFUSE, library)
    assert accepted == 0
    assert cases >= 50


def planted(folder: Path, before: str, after: str, kernel: str = "complementary_mask_exact.cuh") -> Path:
    """The mask kernels with one change to their source."""
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc" / "cuda", sources / "cuda")
    source = sources / "cuda" / kernel
    text = source.read_text()
    assert text.count(before) == 1, "what the fault is planted into has changed"
    source.write_text(text.replace(before, after))
    return build(folder / "_C.so", sources, ("complementary_mask",))


def test_harness_finds_a_missing_barrier(tmp_path):
    zeroed = "bins[bin] = 0;\n    __syncthreads();\n"
    faulty = planted(tmp_path, zeroed, zeroed.replace("__syncthreads();", ""))
    [(wrong, checks)] = checked([*CHECK, "complementary_mask"], faulty)
    assert 0 < wrong < checks


def test_harness_finds_an_index_beyond_shared_memory(tmp_path):
    faulty = planted(tmp_path, "slot < size; slot += blockDim.x", "slot <= size; slot += blockDim.x")
    result = run([*CHECK, "complementary_mask"], faulty)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
    assert "mask_exact" in result.stderr


def test_harness_finds_an_index_beyond_an_output(tmp_path):
    guarded = "if (to + k >= begin && to + k < end) x[to + k] = from[k];"
    faulty = planted(tmp_path, guarded, guarded.replace("to + k < end", "to + k <= end"), "complementary_mask.cuh")
    result = run([*CHECK, "complementary_mask"], faulty)
    # Inside the tensor, this overwrites a neighbour's token; past its end, the write is caught.
    assert "heap-buffer-overflow" in result.stderr or not result.stdout.splitlines()[-1].startswith("0 of")


def test_harness_finds_too_little_shared_memory_and_a_barrier_not_all_reach(tmp_path):
    counts = "if (threadIdx.x == 0) {\n    const int k1"
    faulty = planted(tmp_path / "a", counts, counts.replace("{\n", "{\n    __syncthreads();\n"))
    result = run([*CHECK, "complementary_mask"], faulty)
    assert "a barrier or warp operation that not all threads reach" in result.stderr
    faulty = planted(tmp_path / "b", "room<int>(32) + room<uint64_t>(capacity)", "room<uint64_t>(capacity)")
    result = run([*CHECK, "complementary_mask"], faulty)
    assert "shared memory beyond the" in result.stderr
