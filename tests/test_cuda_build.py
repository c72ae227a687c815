"""The compiled CUDA library, inspected without a GPU: architectures, no spills, tensor cores in place, no growth."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
import torch

from benchmarks.static_cuda import COUNTED_ARCH, LIBRARY, RESULTS, compiler, cuobjdump, measure, portable_code

if shutil.which("nvcc") is None and not LIBRARY.exists():
    pytest.skip("no nvcc to compile the CUDA kernels with", allow_module_level=True)
if cuobjdump() is None:
    pytest.skip("no cuobjdump (CUDA toolkit or triton) to read machine code with", allow_module_level=True)

RECORDED = json.loads(RESULTS.read_text())


@pytest.fixture(scope="module")
def table():
    assert LIBRARY.exists(), "nvcc is there, but _C_cuda was not built: see CMLM_FAST_CUDA"
    return measure()


def kernels(table):
    return [(arch, name, row) for arch, rows in table.items() for name, row in rows.items()]


def test_compiled_for_every_architecture_and_as_ptx(table):
    assert set(table) == {"sm_80", "sm_90a", "sm_100", "sm_120"}
    assert portable_code() == ["sm_100"]
    names = set(table["sm_80"])
    assert all(set(rows) == names for rows in table.values())
    for name in ("mask_exact", "mask_bernoulli", "contrast_forward", "contrast_gradient", "contrast_rows", "similarity_scores"):
        assert any(kernel.startswith(name) for kernel in names), name


def test_no_register_is_spilled(table):
    assert [(arch, name) for arch, name, row in kernels(table) if row["stack"]] == []
    assert [name for name, row in table[COUNTED_ARCH].items() if row["local_loads"] or row["local_stores"]] == []


def test_a_spill_would_be_seen(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc to compile a kernel that spills")
    source, binary = tmp_path / "spills.cu", tmp_path / "spills.fatbin"
    source.write_text(
        """
        __global__ void __launch_bounds__(1024, 2) spills(float* x) {  // 32 registers for 64 numbers
          float at[64];
          for (int i = 0; i < 64; ++i) at[i] = x[i * 1024 + threadIdx.x];
          __syncthreads();
          for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = at[63 - i];
        }
        """
    )
    subprocess.run([nvcc, f"-arch={COUNTED_ARCH}", "-fatbin", "-o", str(binary), str(source)], check=True)
    row = measure(binary)[COUNTED_ARCH]["spills"]
    assert row["stack"] > 0 and row["local_loads"] > 0 and row["local_stores"] > 0


def test_16_bit_tiles_use_tensor_cores_and_asynchronous_copies(table):
    for name, row in table[COUNTED_ARCH].items():
        tiled = name.startswith(("contrast_forward", "contrast_gradient"))
        assert bool(row["tensor_core"]) == (tiled and bool(re.search("Bf16|Fp16", name))), name
        assert bool(row["async_copies"]) == tiled, name


def test_resources_are_those_recorded(table):
    if compiler() != RECORDED["nvcc"]:
        pytest.skip(f"recorded with CUDA {RECORDED['nvcc']}, compiled with {compiler()}")
    assert table == RECORDED["kernels"], "resources changed: look at them, then python -m benchmarks.static_cuda"


def test_every_symbol_is_torchs_or_the_systems():
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm to read symbols with")
    listed = subprocess.run([nm, "-D", "--undefined-only", str(LIBRARY)], check=True, capture_output=True, text=True).stdout
    wanted = {line.split()[-1] for line in listed.splitlines() if re.search(r" (aoti_|torch_)\w+$", line)}
    torch_cpu = f"{torch.__path__[0]}/lib/libtorch_cpu.so"
    exported = subprocess.run([nm, "-D", "--defined-only", torch_cpu], check=True, capture_output=True, text=True).stdout
    missing = wanted - {line.split()[-1] for line in exported.splitlines()}
    # These two are in libtorch_cuda; `make cuda-link` checks them.
    of_cuda = {"aoti_torch_get_current_cuda_stream", "torch_get_current_cuda_blas_handle"}
    assert missing - of_cuda == set()
    assert of_cuda <= wanted
    others = [line for line in listed.splitlines() if " U " in line and not re.search(r"@|aoti_|torch_", line)]
    assert others == []
