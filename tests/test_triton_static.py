"""Triton kernels compiled ahead of time for chips that need not be here: no spills, matrix instructions, 16-byte accesses.

Each kernel's numbers must be those in benchmarks/results/static/triton.json. After an intended change, run
`python -m benchmarks.triton_static --write`. Compiling everything takes minutes, so if the table was made from these sources
with this triton, each kernel is compiled in one configuration for one chip, and its rows show that the table is right.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from benchmarks.triton_static import CHIPS, LIMITS, committed, digest

NVIDIA = [chip for chip in CHIPS if chip.startswith("sm_")]
INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "sm_120": "mma.sync",
               "gfx942": "v_mfma"}
#: The calls compiled in that case, which together launch every kernel.
SOME = r"bfloat16 D=768 scope|B=64 D=768 cross|similarity|_mask .* L=128|softmax|attention.* bfloat16"
#: Triton before 3.8 makes less use of Blackwell: the smallest info_nce has at most 32 rows, too few for its tensor memory, and
#: float64 is multiplied without matrix units.
OLD = ("sm_100",) if triton.__version__ < "3.8" else ()
MATRIX_KERNELS = ("statistics", "weights", "products", "scores", "info_nce_small")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Every chip's table, made in separate processes, since Triton interprets in this one."""
    before = committed()
    up_to_date = (before["triton"], before["digest"]) == (triton.__version__, digest())
    folder = tmp_path_factory.mktemp("static")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    runs = {}
    for chips in (("sm_90",),) if up_to_date else (("sm_80", "sm_100", "gfx942"), ("sm_90", "sm_120")):
        output = folder / f"{chips[0]}.json"
        options = [*(f"--chip={chip}" for chip in chips), f"--labels={SOME if up_to_date else ''}"]
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.triton_static", *options, f"--output={output}"]
        runs[output] = subprocess.Popen(command, env=environment, cwd=Path(__file__).parent.parent,
                                        stderr=subprocess.PIPE, text=True)  # fmt: skip
    tables = dict(before["chips"])
    for output, run in runs.items():
        message = run.communicate(timeout=1800)[1]
        assert run.returncode == 0, message
        for chip, rows in json.loads(output.read_text())["chips"].items():
            tables[chip] = {**tables[chip], **rows} if up_to_date else rows
    return tables


def kernel_of(name):
    return name.split(": ")[1].removesuffix(" again")


def test_what_is_compiled_each_time_holds_every_kernel():
    kernels = [(name, kernel_of(name)) for name in committed()["chips"]["sm_90"]]
    assert {kernel for name, kernel in kernels if re.search(SOME, name)} == {kernel for _, kernel in kernels}


@pytest.mark.parametrize("chip", NVIDIA)
def test_no_kernel_spills_and_each_fits(compiled, chip):
    for name, row in compiled[chip].items():
        allowed = 2 if chip in OLD and kernel_of(name) == "info_nce_small" else 0  # instructions, which spill one register
        assert row["spills"] <= allowed, name
        assert row["shared"] + 1024 <= LIMITS[chip]["shared"] and row["blocks"] >= 1, name


@pytest.mark.parametrize("chip", CHIPS)
def test_matrix_units_do_the_products(compiled, chip):
    rows = {name: row for name, row in compiled[chip].items() if kernel_of(name) in MATRIX_KERNELS}
    assert len(rows) >= 10
    for name, row in rows.items():
        if "float32" in name:
            expected = []  # IEEE products: the matrix units round float32 to tf32
        elif "float64" in name:
            expected = [] if chip in ("sm_120", *OLD) else ["mma.sync"]  # sm_120 has few float64 units
        else:
            expected = ["mma.sync" if chip in OLD and kernel_of(name) == "info_nce_small" else INSTRUCTION[chip]]
        assert row["matrix"] == expected, name


@pytest.mark.parametrize("chip", NVIDIA)
def test_global_accesses_are_16_bytes_wide(compiled, chip):
    for name, row in compiled[chip].items():
        kernel = kernel_of(name)
        if "D=333" in name or (kernel in ("exact", "bounds", "merge", "finish")):
            continue  # rows at any address, sequences at any place, a few numbers per row
        assert row["loads"] == 16, name
        if kernel not in ("statistics", "inverse_norms"):  # which write a few numbers per row
            assert row["stores"] == 16, name


@pytest.mark.parametrize("chip", CHIPS)
def test_nothing_differs_from_the_committed_table(compiled, chip):
    before = committed()
    if before["triton"] != triton.__version__:
        pytest.skip(f"the table is of triton {before['triton']}, this is {triton.__version__}")
    assert before["digest"] == digest(), "other sources than the table's: python -m benchmarks.triton_static --write"
    differing = [name for name in {**before["chips"][chip], **compiled[chip]}
                 if before["chips"][chip].get(name) != compiled[chip].get(name)]  # fmt: skip
    assert not differing
