"""Compiles every Triton kernel ahead of time in every shipped configuration and reports on the code; no GPU is needed.

    python -m benchmarks.triton_static [--chip sm_90] [--write]

The real launchers run on CPU tensors, under a driver that names a chip and compiles instead of launching, so the code is what a
GPU would get. Reported for each kernel: registers, spills, shared memory, matrix instructions, widths of global accesses, and
the blocks that a multiprocessor holds at once. `--write` puts the table into benchmarks/results/static/triton.json, which
tests/test_triton_static.py compares the kernels with; if all chips are compiled, also a digest of the kernels' sources.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import cmlm_fast
from cmlm_fast._library import op

RESULTS = Path(__file__).parent / "results" / "static" / "triton.json"
CHIPS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")

#: Per multiprocessor: registers, threads, blocks, shared memory in bytes (CUDA programming guide, compute capabilities).
LIMITS = {
    "sm_80": {"registers": 65536, "threads": 2048, "blocks": 32, "shared": 164 * 1024},
    "sm_90": {"registers": 65536, "threads": 2048, "blocks": 32, "shared": 228 * 1024},
    "sm_100": {"registers": 65536, "threads": 2048, "blocks": 32, "shared": 228 * 1024},
    "sm_120": {"registers": 65536, "threads": 1536, "blocks": 24, "shared": 100 * 1024},
    "gfx942": {"shared": 64 * 1024},
}
MATRIX = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma)")


class Compiler:
    """Stands in for Triton's driver and names the chip to compile for."""

    def __init__(self, chip: str) -> None:
        from triton.backends.compiler import GPUTarget

        nvidia = chip.startswith("sm_")
        self.target = GPUTarget("cuda", int(chip[3:]), 32) if nvidia else GPUTarget("hip", chip, 64)
        self.device = CHIPS.index(chip)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def pair(dtype: torch.dtype, d: int, n: int = 512, m: int = 512) -> tuple[torch.Tensor, ...]:
    tau = torch.tensor(0.05, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return torch.empty(n, d, dtype=dtype), torch.empty(m, d, dtype=dtype), torch.zeros(n, dtype=torch.int64), tau


def calls(chip: str) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(label, op, arguments) that together launch every kernel in every shipped configuration, with every code-changing option.

    float16, which has bfloat16's configuration, and an odd width are compiled for sm_90 alone; AMD chips get a part.
    """
    from cmlm_fast.kernels.info_nce import most_rows  # imports Triton

    words, start = torch.zeros(512, dtype=torch.int64), torch.zeros(512, dtype=torch.int32)
    plain, ranged = (None,) * 4, (start, start, words, words)
    nvidia = chip.startswith("sm_")
    for d in (768, 128) if nvidia else (768,):
        x, y, target, tau = pair(torch.bfloat16, d)
        for scope, options in (("batch", plain), ("sequence", ranged)):
            args = (x, y, target, tau, *options, True, "mean", True, True)
            yield f"bfloat16 D={d} scope {scope}", "token_contrastive", args
        if d == 768:
            yield f"bfloat16 D={d}", "token_similarity", (x, y, target, tau, *ranged, True)
            for kind, labels, scheme in (("cross", None, "cross"), ("nt_xent", None, "nt_xent"), ("labels", words, "cross")):
                yield f"bfloat16 D={d} {kind}", "info_nce", (x, y, tau, labels, scheme, True, True, "mean", True, True)
    for kind, labels, scheme in (("cross", None, "cross"), ("nt_xent", None, "nt_xent"), ("labels", words, "cross")):
        for dtype in (torch.bfloat16, torch.float32) if nvidia else (torch.bfloat16,):
            rows = most_rows(dtype) // (1 if kind == "cross" else 2)  # of each view
            x, y, _, tau = pair(dtype, 768, rows, rows)
            args = (x, y, tau, None if labels is None else labels[:rows], scheme, True, True, "mean", True, True)
            yield f"{str(dtype)[6:]} B={rows} D=768 {kind}", "info_nce", args
    for dtype in (torch.float32, torch.float64) if nvidia else ():
        yield f"{str(dtype)[6:]} D=768", "token_contrastive", (*pair(dtype, 768), *plain, True, "mean", True, True)
    if chip == "sm_90":
        yield "float16 D=768", "token_contrastive", (*pair(torch.float16, 768), *plain, True, "mean", True, True)
        odd = pair(torch.bfloat16, 333, 300, 500)
        yield "bfloat16 D=333", "token_contrastive", (*odd, *plain, True, "mean", True, True)
    special = torch.tensor([0, 101, 102, 103])
    for sampling in ("bernoulli", "exact"):
        for length, units in ((128, None), (1024, torch.zeros(4096, dtype=torch.int32))):
            ids, cu = torch.zeros(4096, dtype=torch.int64), torch.arange(4096 // length + 1, dtype=torch.int32) * length
            numbers = (103, 30522, 0.15, 0.15 / 0.85, sampling == "exact", 0.8, 0.1, 42, 3)
            label = f"{sampling} L={length}" + ("" if units is None else " units")
            yield label, "complementary_mask", (ids, cu, special, None, units, None, *numbers)
    yield "bfloat16 V=30528", "softmax_loss", (torch.zeros(8, 30528, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.int64))
    bounds = torch.arange(9, dtype=torch.int32) * 32
    for dtype in (torch.bfloat16, torch.float32) if chip == "sm_90" else (torch.bfloat16,):
        # As attention layers pass them: views of [1, H, T, D], and of what projections made.
        q, k, v, grad = torch.zeros(4, 256, 12, 64, dtype=dtype).unbind()
        options = (0.125, 0.1, torch.tensor(5), 0)
        yield f"{str(dtype)[6:]} D=64", "varlen_attention", (q, k, v, bounds, *options)
        yield (f"{str(dtype)[6:]} D=64", "varlen_attention_backward",
               (grad, q, k, v, bounds, torch.zeros(12, 256), *options))  # fmt: skip


def compile_all(chip: str, labels: str) -> dict[str, Any]:
    """Compiled kernels by "op label: kernel", each once, for the calls whose "op label" matches the pattern `labels`."""
    import triton.runtime.driver
    from triton.runtime.jit import JITFunction

    import cmlm_fast.kernels as kernels

    triton.runtime.driver.set_active(Compiler(chip))
    kernels._chip.cache_clear()
    found: dict[str, Any] = {}
    seen: set[str] = set()
    plain, label = JITFunction.run, ""

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = plain(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            name = f"{label}: {self.__name__}"
            while name in found:
                name += " again"
            found[name] = kernel

    JITFunction.run = run
    try:
        for case, name, args in calls(chip):
            label = f"{name} {case}"
            if not re.search(labels, label):
                continue
            op(name, "_triton")(*args)
    finally:
        JITFunction.run = plain
    return found


def tool(name: str, cubin: bytes, *options: str) -> str:
    """Output of a CUDA binary tool that comes with Triton's wheel."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


def width(sass: str, instruction: str) -> int:
    """Bytes of the widest global access by `instruction`, 0 without one."""
    found = [re.search(r"\.(128|64|U16|S16|U8|S8)\b", name) for name in re.findall(rf"\b(?:{instruction})[\w.]*", sass)]
    bits = [int(m[1].lstrip("US")) if m else 32 for m in found]
    return max(bits, default=0) // 8


def occupancy(chip: str, registers: int, shared: int, warps: int) -> int:
    """Blocks that fit on one multiprocessor. A warp gets registers in units of 256; a block reserves 1 KiB of shared memory."""
    limit = LIMITS[chip]
    by_registers = limit["registers"] // (-(-registers * 32 // 256) * 256 * warps)
    return min(by_registers, limit["threads"] // (32 * warps), limit["shared"] // (shared + 1024), limit["blocks"])


def facts(chip: str, kernel: Any) -> dict[str, Any]:
    """The row of one kernel."""
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    if not chip.startswith("sm_"):
        assembly = kernel.asm["amdgcn"]
        # A scalar register spills into lanes of a vector register, which costs instructions but no memory.
        spills, scalar = (sum(int(n) for n in re.findall(rf"{kind}gpr_spill_count:\s*(\d+)", assembly)) for kind in "vs")
        return {"spills": spills, "scalar spills": scalar, "shared": shared, "warps": warps,
                "matrix": sorted(set(MATRIX.findall(assembly)))}  # fmt: skip
    usage = re.search(r"REG:(\d+)", tool("cuobjdump", kernel.asm["cubin"], "--dump-resource-usage"))
    assert usage is not None
    sass, registers = tool("cuobjdump", kernel.asm["cubin"], "-sass"), int(usage[1])
    return {"registers": registers, "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)), "shared": shared, "warps": warps,
            "blocks": occupancy(chip, registers, shared, warps), "matrix": sorted(set(MATRIX.findall(kernel.asm["ptx"]))),
            "loads": width(sass, "LDG|LDGSTS"), "stores": width(sass, "STG")}  # fmt: skip


def table(chip: str, labels: str = "") -> dict[str, dict[str, Any]]:
    """Every kernel's row on one chip, for the calls that `labels` matches."""
    return {name: facts(chip, kernel) for name, kernel in compile_all(chip, labels).items()}


def digest() -> str:
    """A digest of the kernels' sources and their configurations."""
    folder, found = Path(cmlm_fast.__file__).parent / "kernels", hashlib.sha256()
    for path in sorted([*folder.glob("*.py"), *folder.glob("*.json")]):
        found.update(path.name.encode() + b"\n" + path.read_bytes())
    return found.hexdigest()[:16]


def committed() -> dict[str, Any]:
    """What benchmarks/results/static/triton.json holds."""
    nothing = {"triton": "", "digest": "", "chips": {}}
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else nothing
    return found


def main() -> None:
    """Compile for the chips asked for; print JSON or update the committed file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=CHIPS, action="append", help="only these chips (default: all)")
    parser.add_argument("--labels", default="", help="only calls whose label this regular expression matches")
    parser.add_argument("--write", action="store_true", help=f"update {RESULTS.name}")
    parser.add_argument("--output", type=Path, help="write the JSON there")
    options = parser.parse_args()
    if options.write and options.labels:
        parser.error("expected --labels to be left out with --write, which replaces a chip's table")
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("triton_static: expected TRITON_INTERPRET to be unset: interpreted kernels are not compiled")
    os.environ["CMLM_FAST_TRITON_CONFIGS"] = ""  # the shipped entries alone
    import triton

    chips = {chip: table(chip, options.labels) for chip in options.chip or CHIPS}
    rows = {"triton": triton.__version__, "digest": digest(), "chips": chips}
    if options.write:
        before = committed()
        kept = {chip: rows["chips"].get(chip, before["chips"].get(chip, {})) for chip in CHIPS}
        text = dumps({**rows, "chips": kept, "digest": before["digest"] if options.chip else rows["digest"]})
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(text)
    elif options.output:
        options.output.write_text(dumps(rows))
    else:
        print(dumps(rows))


def dumps(rows: dict[str, Any]) -> str:
    """JSON with one line per kernel."""
    chips = []
    for chip, kernels in rows["chips"].items():
        lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in kernels.items())
        chips.append(f"  {json.dumps(chip)}: {{\n{lines}\n  }}")
    head = "".join(f" {json.dumps(name)}: {json.dumps(rows[name])},\n" for name in ("triton", "digest"))
    return f'{{\n{head} "chips": {{\n' + ",\n".join(chips) + "\n }\n}\n"


if __name__ == "__main__":
    main()
