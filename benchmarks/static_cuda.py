"""What the CUDA library was compiled to, read from its machine code; no GPU is needed.

    python -m benchmarks.static_cuda [LIBRARY]     writes benchmarks/results/static/cuda.json

Per kernel and architecture: registers per thread and bytes of stack (where registers spill to); on Hopper also loads and
stores of local memory, tensor core instructions (HMMA), and copies that bypass registers (LDGSTS, from cp.async).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "cmlm_fast" / "_C_cuda.so"
RESULTS = ROOT / "benchmarks" / "results" / "static" / "cuda.json"
COUNTED_ARCH = "sm_90a"  # reading instructions takes seconds per architecture
COUNTED = {"tensor_core": "HMMA", "async_copies": "LDGSTS", "local_loads": "LDL", "local_stores": "STL"}


def cuobjdump() -> str | None:
    """The program that reads machine code, from the CUDA toolkit or the triton package."""
    found = shutil.which("cuobjdump")
    triton = find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


def _dump(library: Path, *options: str) -> str:
    program = cuobjdump()
    if program is None:
        raise RuntimeError("benchmarks.static_cuda: expected cuobjdump (CUDA toolkit or triton) to be there, got none")
    return subprocess.run([program, *options, str(library)], check=True, capture_output=True, text=True).stdout


def _readable(mangled: set[str]) -> dict[str, str]:
    """Maps each mangled name to one like 'contrast_forward<TokenContrast<float>>'."""
    names = sorted(mangled)
    plain = subprocess.run(["c++filt", *names], check=True, capture_output=True, text=True).stdout.splitlines()
    short = (re.sub(r"^void |cmlm::|\(.*\)$", "", name).replace(" >", ">") for name in plain)
    return dict(zip(names, short, strict=True))


def measure(library: Path = LIBRARY) -> dict[str, dict[str, dict[str, int]]]:
    """{architecture: {kernel: {what: number}}}."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    arch = kernel = ""
    for line in _dump(library, "-res-usage").splitlines():
        if found := re.match(r"\s*arch = (\S+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            kernel = found[1]
        elif "REG:" in line and kernel:
            numbers = dict(re.findall(r"([A-Z]+):(\d+)", line))
            table.setdefault(arch, {})[kernel] = {
                "registers": int(numbers["REG"]), "stack": int(numbers["STACK"]) + int(numbers["LOCAL"])}  # fmt: skip
    named = {instruction: what for what, instruction in COUNTED.items()}
    for row in table.get(COUNTED_ARCH, {}).values():
        row.update(dict.fromkeys(COUNTED, 0))
    seen = re.compile(rf"^\s*Function : (\S+)|\s({'|'.join(named)})[. ]", re.MULTILINE)
    for found in seen.finditer(_dump(library, "-sass", "-arch", COUNTED_ARCH)):
        kernel = found[1] or kernel
        if found[2]:
            table[COUNTED_ARCH][kernel][named[found[2]]] += 1
    readable = _readable({name for kernels in table.values() for name in kernels})
    return {a: {readable[name]: row for name, row in sorted(rows.items())} for a, rows in sorted(table.items())}


def portable_code(library: Path = LIBRARY) -> list[str]:
    """Architectures whose PTX the library carries, for GPUs that come later."""
    return sorted(set(re.findall(r"(sm_\w+)\.ptx", _dump(library, "-lptx"))))


def compiler() -> str:
    """The CUDA version that the library was compiled with."""
    from cmlm_fast._build import build_info

    return str(build_info()["cuda"])


def main() -> None:
    library = Path(sys.argv[1]) if len(sys.argv) > 1 else LIBRARY
    table: dict[str, Any] = {"nvcc": compiler(), "ptx": portable_code(library), "kernels": measure(library)}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    # One kernel per line.
    text = json.dumps(table, indent=1)
    text = re.sub(r"\{\s+(\"registers\"[^}]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text)
    RESULTS.write_text(text + "\n")


if __name__ == "__main__":
    main()
