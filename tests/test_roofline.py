"""The roofline table is as committed, and counts the launches that the launchers make."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from benchmarks.roofline import CHIPS, DOCUMENT, SHAPES, floor, launches

ROOT = Path(__file__).parent.parent
COUNTS = """
import json, sys
from benchmarks.roofline import CHIPS, SHAPES, document, launched
launches = [launched(shape, CHIPS[chip]) for chip in ("A100", "B200") for shape in SHAPES]
print(json.dumps({"document": document(), "launches": launches}))
"""


@pytest.fixture(scope="module")
def made():
    """The document and the launches by shape, made in a separate process, since Triton interprets in this one."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", COUNTS], cwd=ROOT, capture_output=True, text=True,
                         env={**environment, "PYTHONPATH": str(ROOT)}, timeout=240)  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_table_is_up_to_date(made):
    assert made["document"] == DOCUMENT.read_text(encoding="utf-8"), "python -m benchmarks.roofline --write"


def test_the_model_counts_the_launches_that_are_made(made):
    found = iter(made["launches"])
    for chip in ("A100", "B200"):
        for shape in SHAPES:
            counts = next(found)
            for launch in launches(shape, CHIPS[chip]):
                rows = shape.n * (2 if shape.scheme == "nt_xent" else 1)
                if launch.kernel == "info_nce_small" and rows > 32 and chip == "B200" and triton.__version__ < "3.8":
                    assert launch.kernel not in counts  # that Triton compiles it only for fewer rows: kernels/info_nce.py
                    continue
                assert counts[launch.kernel] == launch.count, (chip, shape.name, launch.kernel)


def test_floors_are_those_of_hand_computed_work():
    mask = next(shape for shape in SHAPES if shape.op == "complementary_mask" and shape.n == 2**24)
    assert floor(mask, CHIPS["H200"]) == pytest.approx(25 * 2**24 / 4.8e12)
    large = SHAPES[0]
    done = sum(launch.count * launch.operations for launch in launches(large, CHIPS["H100"]))
    assert large.counted == 6 * 8192 * 65536 * 768 and done == 8 * 8192 * 65536 * 768
    # Bound by the matrix units, except for a few per cent.
    assert 1.0 < floor(large, CHIPS["H100"]) / (done / 989e12) < 1.05
    a100, h100, h200, b200 = (floor(large, CHIPS[name]) for name in ("A100", "H100", "H200", "B200"))
    assert b200 < h200 <= h100 < a100
