"""Puts what `make gpu` measured into one file, <device>.json, in the form that benchmarks/results keeps.

    python -m benchmarks.gpu_results OUT [--commit HASH]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "inf-cl")


def versions() -> dict[str, str]:
    """Versions of the measured packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def head() -> str:
    """The checked-out commit; "" outside a repository or without git."""
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def collect(out: Path, commit: str | None = None) -> Path | None:
    """Write OUT/<device>.json and return its path; None if there is nothing to put into it.

    It holds those of OUT/ops.json, layers.json and train.json that measured `commit` (or do not know which commit).
    """
    commit = head() if commit is None else commit
    files = {name: out / f"{name}.json" for name in ("ops", "layers", "train")}
    parts: dict[str, Any] = {}
    for name, file in files.items():
        with contextlib.suppress(OSError, ValueError):  # absent, or cut off because its step was stopped
            parts[name] = json.loads(file.read_text())
    parts = {name: part for name, part in parts.items() if part["commit"] in ("", commit)}
    if not parts:
        return None
    device = next(iter(parts.values()))["device"]
    found: dict[str, Any] = {"device": device, "commit": commit, "versions": versions()}
    found["versions"]["torch"] = next(iter(parts.values()))["torch"]
    if "ops" in parts:
        found |= {"ceilings": parts["ops"]["ceilings"], "ops": parts["ops"]["rows"]}
    if "layers" in parts:
        found |= {"layers": parts["layers"]["rows"]}
    if "train" in parts:
        found |= {"train_rate": parts["train"]["rate"], "train": parts["train"]["rows"]}
    path = out / (re.sub(r"\W+", "-", device.lower()) + ".json")
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def main() -> None:
    """Write the file and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of `make gpu`")
    parser.add_argument("--commit", help="the measured commit; default: the one checked out")
    options = parser.parse_args()
    print(collect(options.out, options.commit))


if __name__ == "__main__":
    main()
