"""Runs everything that needs a GPU, in less than nine minutes: `make gpu` (`make gpu DRY=1` without one).

    python -m benchmarks.gpu [--dry] [--out DIR] [--step NAME ...]

STEPS lists what runs, in order; a new step is one entry. Each has a budget in seconds and is stopped when that is used up. A
step that fails fails the run, but later steps still run. A step's output goes to DIR/<name>.log. What it writes to
DIR/<name>.txt is shown in the summary, which comes last and whose outcomes are kept in DIR/gpu.json; measurements also go to
DIR/<device>.json, for benchmarks/results. Nothing is installed: the machine's own Python, compiler and tools are used, the
extension is built in place, and no GPU setting is touched.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from .gpu_results import collect

ROOT = Path(__file__).resolve().parent.parent
PYTHON = (sys.executable, "-W", "ignore")
# What only a GPU shows comes first, in case the step is stopped; the reference, plain PyTorch, is left to the CPU.
SWEEPS = ("tests/test_cuda_gpu.py", "tests/test_training_gpu.py", "tests/test_varlen_attention.py", "tests/test_parity.py",
          "tests/test_registration.py", "tests/test_compiling.py", "tests/test_mlm_cross_entropy.py", "tests/test_attention.py",
          "-k", "not reference-cuda")  # fmt: skip
# The host spends most time compiling. Workers take few tests at a time, else one would get all of the first files'.
PARALLEL = ("-n", str(min(os.cpu_count() or 1, 14)), "--maxschedchunk", "2") if find_spec("xdist") else ()
DOCTOR = "from rich.console import Console; from cmlm_fast.doctor import print_report; print_report(Console())"
LIMIT = 539  # seconds, all budgets together
DRY_PATIENCE = 6  # multiplies a dry run's budgets: it may be on two cores, where the build takes minutes


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: names its files in the output folder.
        command: run in the repository; {out} stands for the output folder.
        seconds: its budget.
        gpu: whether it needs a GPU.
        asked: runs only if --step names it, and does not count in the run's time.
        beside: runs alongside the next steps, until the first one without `beside` ends; takes no time of its own.
    """

    name: str
    command: tuple[str, ...]
    seconds: int
    gpu: bool = True
    asked: bool = False
    beside: bool = False


def sanitizer(tool: str) -> Step:
    """The CUDA kernels on every sample under one of compute-sanitizer's tools."""
    command = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", tool, "--kernel-name", "kns=cmlm",
               "--error-exitcode", "1", *PYTHON, "-m", "benchmarks.gpu_samples")  # fmt: skip
    return Step(tool, command, 300, asked=True)


STEPS = (
    Step("build", (*PYTHON, "setup.py", "-q", "build_ext", "--inplace"), 64, gpu=False),
    Step("doctor", (*PYTHON, "-c", DOCTOR), 8, gpu=False),
    *(Step(f"compile-{case}", (*PYTHON, "-m", "benchmarks.bench_train_gpu", "--compile", "--case", case), 130, beside=True)
      for case in ("bert-base", "roberta-base")),
    # -v names failures at once, in case the step is stopped.
    Step("tests", (*PYTHON, "-m", "pytest", "-v", "-m", "gpu", *PARALLEL, *SWEEPS), 130),
    Step("tune", (*PYTHON, "-m", "cmlm_fast.kernels.tune", "--seconds", "24", "--output", "{out}/triton.json"), 70, asked=True),
    Step("ops", (*PYTHON, "-m", "benchmarks.bench_gpu", "--out", "{out}"), 80),
    Step("layers", (*PYTHON, "-m", "benchmarks.bench_layers_gpu", "--out", "{out}"), 42),
    Step("train", (*PYTHON, "-m", "benchmarks.bench_train_gpu", "--seconds", "150", "--out", "{out}", "--trace"), 195),
    Step("bench", (*PYTHON, "-m", "benchmarks", "--device", "cuda", "--seconds", "0.3", "--output", "{out}/bench.json"), 300,
         asked=True),
    Step("profile", ("ncu", "--clock-control", "none", "--set", "basic", "--section", "MemoryWorkloadAnalysis",
                     "--kernel-name", "regex:^(contrast_rows|contrast_columns|mask_bernoulli)$",
                     *PYTHON, "-m", "benchmarks.bench_gpu", "--once"), 20),
    sanitizer("memcheck"),
    sanitizer("racecheck"),
    sanitizer("synccheck"),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of a step: "ok", "failed (code)", "stopped after its budget" or "needs a GPU"."""

    step: str
    outcome: str
    seconds: float = 0.0


def start(step: Step, out: Path, patience: int = 1) -> Callable[[], Outcome]:
    """Start a step in its own process group, so that no child outlives its budget; the returned call waits for its end."""
    command = [part.replace("{out}", str(out)) for part in step.command]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "CMLM_FAST_TRITON_CONFIGS": str(out / "triton.json")}
    begin, seconds = time.perf_counter(), patience * step.seconds
    with (out / f"{step.name}.log").open("w") as log:
        try:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                                       stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        except OSError as error:  # no such program
            log.write(str(error))
            absent = Outcome(step.name, f"failed ({error.strerror}: {command[0]})")
            return lambda: absent

    def finish() -> Outcome:
        try:
            code = process.wait(max(begin + seconds - time.perf_counter(), 0))
            outcome = "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome = f"stopped after its {seconds} s"
        return Outcome(step.name, outcome, round(time.perf_counter() - begin, 1))

    return finish


def summarise(outcomes: list[Outcome], out: Path) -> bool:
    """Print what failed, what the steps found, and the table of steps; True if none failed."""
    bad = [outcome for outcome in outcomes if outcome.outcome not in ("ok", "needs a GPU")]
    for outcome in bad:
        lines = (out / f"{outcome.step}.log").read_text(errors="replace").splitlines()
        print(f"\n--- {outcome.step}: end of {outcome.step}.log", *lines[-25:], sep="\n")
    for outcome in outcomes:
        found = out / f"{outcome.step}.txt"
        if found.exists():
            print(f"\n--- {outcome.step}", found.read_text().rstrip(), sep="\n")
    print()
    for outcome in outcomes:
        print(f"{outcome.step:<16}{outcome.seconds:>7.1f} s  {outcome.outcome}")
    (out / "gpu.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return not bad


def main() -> None:
    """Run the steps, print the summary, and exit with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="run what needs no GPU, print what else would run")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results (default: out)")
    parser.add_argument("--step", action="append", choices=[step.name for step in STEPS], help="only this step")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not options.dry:
        import torch

        if not torch.cuda.is_available():
            sys.exit("make gpu: expected a GPU that PyTorch can use; make gpu DRY=1 runs what needs none")
        major, minor = torch.cuda.get_device_capability()
        suffix = "a" if (major, minor) == (9, 0) else ""
        os.environ.setdefault("CMLM_FAST_CUDA_ARCHS", f"{major}{minor}{suffix}-real")  # for this GPU alone
    outcomes: list[Outcome] = []
    beside: list[Callable[[], Outcome]] = []
    patience = DRY_PATIENCE if options.dry else 1
    for step in STEPS:
        if step.name not in options.step if options.step else step.asked:
            continue
        for suffix in ("txt", "json"):  # of an earlier run
            (out / f"{step.name}.{suffix}").unlink(missing_ok=True)
        print(f"{step.name} ({step.seconds} s): {shlex.join(step.command).replace('{out}', str(out))}", flush=True)
        if step.gpu and options.dry:
            outcomes.append(Outcome(step.name, "needs a GPU"))
            continue
        beside.append(start(step, out, patience))
        if not step.beside:
            outcomes += [finish() for finish in beside]
            beside = []
    outcomes += [finish() for finish in beside]
    measured = any(outcome.step in ("ops", "layers", "train") and outcome.outcome != "needs a GPU" for outcome in outcomes)
    if measured and (kept := collect(out)) is not None:
        print(f"results: {kept}")
    sys.exit(0 if summarise(outcomes, out) else 1)


if __name__ == "__main__":
    main()
