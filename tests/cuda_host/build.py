"""Compiles csrc/cuda/*.cu with the host compiler against tests/cuda_host, into a library that CMLM_FAST_LIBRARY can name.

    python tests/cuda_host/build.py OUT.so [SOURCES] [--plain]

Its ops register for CPU tensors, so every test of the `cpp` backend then runs the CUDA kernels.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
TORCH = Path(torch.__file__).parent
SUFFIXES = (".h", ".cuh", ".cu", ".py")
COMPILER = os.environ.get("CXX") or shutil.which("g++")


def build(out: Path, sources: Path = ROOT / "csrc", ops: tuple[str, ...] = (), sanitize: bool = True) -> Path:
    """The library `out` of the ops in `sources`/cuda (all of them by default), rebuilt if a source is newer than it.

    If several processes want the same library, one builds it and the others wait.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(out, sources, ops, sanitize)


def _build(out: Path, sources: Path, ops: tuple[str, ...], sanitize: bool) -> Path:
    kernels = sorted((sources / "cuda").glob("*.cu"))
    kernels = [kernel for kernel in kernels if not ops or kernel.stem in ops]
    parts = [part for folder in (sources, HERE, ROOT / "csrc") for part in folder.rglob("*")]
    if out.exists() and out.stat().st_mtime > max(part.stat().st_mtime for part in parts if part.suffix in SUFFIXES):
        return out
    flags = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror",
             "-Wno-unknown-pragmas", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{HERE}", f"-I{sources}",
             f"-I{ROOT / 'csrc'}", "-isystem", str(TORCH / "include")]  # fmt: skip
    checks = ["-fsanitize=address"] if sanitize else []

    def compile_one(kernel: Path) -> str:
        made = str(out.with_suffix(f".{kernel.stem}.o"))
        subprocess.run([str(COMPILER), "-x", "c++", *flags, *checks, "-c", str(kernel), "-o", made], check=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, kernels))
    subprocess.run(
        [str(COMPILER), "-shared", *checks, *objects, "-o", str(out), str(TORCH / "lib" / "libtorch_cpu.so")], check=True
    )
    for made in objects:
        Path(made).unlink()
    return out


def environment(library: Path, **more: str) -> dict[str, str]:
    """What a Python process needs to load `library`. Python itself is not instrumented, hence the preloaded runtime."""
    runtime = [subprocess.check_output([str(COMPILER), f"-print-file-name={name}"], text=True).strip()
               for name in ("libasan.so", "libstdc++.so.6")]  # fmt: skip
    return {**os.environ, "CMLM_FAST_LIBRARY": str(library), "LD_PRELOAD": " ".join(runtime), "OMP_NUM_THREADS": "1",
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", **more}  # fmt: skip


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--plain"]
    source = Path(arguments[1]) if len(arguments) > 1 else ROOT / "csrc"
    build(Path(arguments[0]), source, sanitize="--plain" not in sys.argv)
