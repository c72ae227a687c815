"""Is B slower than A? Compares results files, or git refs timed in interleaved pairs; a change must exceed noise and threshold.

For refs, each side is checked out and built in a temporary folder, and one worker process per side times the same shapes in the
order A, B, B, A, …, so that machine drift hits both. Workers are launched several times, since where a process happens to lie
in memory can cost a few percent. The ratio of medians comes with a 95 % bootstrap interval over launches and rounds; slower
means that the whole interval is above 1 + threshold.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .results import Results

ROOT = Path(__file__).parents[1]
RESAMPLES = 1000
SAMPLE_BATCHES = 3  # of timing.py's batches in a sample, about 15 ms together
SETTLE = 0.02  # seconds until the other process's threads have stopped spinning for work
LAUNCHES = (3, 6)  # at least; at most, while the interval straddles the threshold
Launches = list[tuple[list[float], list[float]]]


@dataclass(frozen=True)
class Change:
    """B's time divided by A's on one shape, with its interval and verdict."""

    name: str
    a: float
    b: float
    ratio: float
    low: float
    high: float
    verdict: str  # slower, faster, same, unclear


def judge(name: str, launches: Launches, threshold: float) -> Change:
    """The change, given each launch's samples (of A, of B)."""
    draw = random.Random(0)
    resampled = (_medians(_resampled(launches, draw)) for _ in range(RESAMPLES))
    drawn = sorted(b / a for a, b in resampled)
    (a, b), low, high = _medians(launches), drawn[RESAMPLES // 40], drawn[-1 - RESAMPLES // 40]
    slower, faster = low > 1 + threshold, high < 1 / (1 + threshold)
    inside = low > 1 / (1 + threshold) and high < 1 + threshold
    verdict = "slower" if slower else "faster" if faster else "same" if inside else "unclear"
    return Change(name, a, b, b / a, low, high, verdict)


def _medians(launches: Launches) -> tuple[float, float]:
    """Medians of all samples of A and of B, which one disturbed launch moves little."""
    a, b = (median(x for pair in launches for x in pair[side]) for side in (0, 1))
    return a, b


def _resampled(launches: Launches, draw: random.Random) -> Launches:
    """Launches drawn with replacement, and within each its rounds (A and B of a round together, if they are paired)."""
    chosen = draw.choices(launches, k=len(launches))
    found = []
    for a, b in chosen:
        rows = draw.choices(range(len(a)), k=len(a))
        others = rows if len(a) == len(b) else draw.choices(range(len(b)), k=len(b))
        found.append(([a[i] for i in rows], [b[i] for i in others]))
    return found


def compare_files(a: Results, b: Results, threshold: float) -> list[Change]:
    """Compare every row that both files have. These are two runs: a machine change between them counts as a code change."""
    before = {row.key: row for row in a.rows}
    pairs = [(before[row.key], row) for row in b.rows if row.key in before]
    if not pairs:
        raise ValueError("compare: expected the two files to have rows in common, got none")
    return [judge(" ".join(new.key), [(old.samples, new.samples)], threshold) for old, new in pairs]


def compare_refs(a: str, b: str, plan: Sequence[tuple[str, str]], seconds: float, threshold: float, device: str = "cpu",
                 say: Callable[[str], None] = print) -> list[Change]:  # fmt: skip
    """Build both refs ("." is the working tree) and time the automatic choice of each (op, shape) of the plan."""
    samples: dict[tuple[str, str], Launches] = {key: [] for key in plan}
    absent: dict[tuple[str, str], str] = {}
    changes: dict[tuple[str, str], Change] = {}
    with tempfile.TemporaryDirectory(prefix="cmlm-fast-compare-") as folder:
        sides = [side(ref, Path(folder) / name, device, say) for ref, name in ((a, "a"), (b, "b"))]
        for launch in range(LAUNCHES[1]):
            open_keys = [
                key for key in plan if key not in absent and (key not in changes or changes[key].verdict == "unclear")
            ]
            if launch >= LAUNCHES[0] and not open_keys:
                break
            say(f"launch {launch + 1}: {len(open_keys)} shapes")
            with Worker(sides[0], device) as worker_a, Worker(sides[1], device) as worker_b:
                for key in open_keys:
                    try:
                        samples[key].append(rounds(worker_a, worker_b, key, seconds / LAUNCHES[0]))
                    except ValueError as error:
                        absent[key] = str(error)
                    if launch + 1 >= LAUNCHES[0] and key not in absent:
                        changes[key] = judge(" ".join(key), samples[key], threshold)
    for key, reason in absent.items():
        say(f"not compared: {' '.join(key)}: {reason}")
    if not changes:
        raise ValueError("compare: expected a shape that both refs can run, got none")
    return list(changes.values())


def rounds(worker_a: Worker, worker_b: Worker, key: tuple[str, str], seconds: float) -> tuple[list[float], list[float]]:
    """Samples of both, taken in turns; the side that begins alternates."""
    repeats = max(worker.ask("make", *key) for worker in (worker_a, worker_b))
    repeats *= SAMPLE_BATCHES
    found: tuple[list[float], list[float]] = ([], [])
    while sum(map(sum, found)) * repeats < seconds or len(found[0]) < 5:
        order = (0, 1) if len(found[0]) % 2 == 0 else (1, 0)
        for i in order:
            time.sleep(SETTLE)
            found[i].append((worker_a, worker_b)[i].ask("sample", repeats))
    return found


class Worker:
    """A process that times shapes with the package of one side."""

    def __init__(self, folder: Path, device: str) -> None:
        command = [sys.executable, "-m", "benchmarks.worker", device]
        environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)  # fmt: skip

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def ask(self, *request: Any) -> Any:
        """The worker's answer; `ValueError` with its reason if it has none."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"compare: a worker ended with exit code {self.process.wait()}")
        answer = json.loads(line)
        if "reason" in answer:
            raise ValueError(answer["reason"])
        return answer["value"]


def side(ref: str, folder: Path, device: str, say: Callable[[str], None]) -> Path:
    """A folder from which the ref's `cmlm_fast` and this suite are imported. The suite is the same for both sides."""
    folder.mkdir()
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    tree = ROOT
    if ref != ".":
        tree = folder / "tree"
        archive = subprocess.run(["git", "-C", ROOT, "archive", ref], capture_output=True)
        if archive.returncode != 0:
            raise ValueError(f"compare: expected a git ref, got {ref!r}: {archive.stderr.decode().strip()}")
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            # Python has `filter` from 3.11.4 and 3.10.12 on, and from 3.12 on warns without it; the archive is git's own.
            files.extractall(tree, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    build(ref, tree, device, say)
    (folder / "cmlm_fast").symlink_to(tree / "cmlm_fast")
    return folder


def build(ref: str, tree: Path, device: str, say: Callable[[str], None]) -> None:
    """Build a tree's libraries unless they are current; a checked-out tree takes the working tree's if sources are equal."""
    libraries = list((ROOT / "cmlm_fast").glob("*.so"))
    if not libraries:
        say("the working tree has no compiled kernels: the Python code is compared")
        return
    sources = ("csrc", "CMakeLists.txt", "setup.py")
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file())
    built = all(path.stat().st_mtime > newest for path in libraries)
    if tree == ROOT and built:
        return
    if built and subprocess.run(["git", "-C", ROOT, "diff", "--quiet", ref, "--", *sources]).returncode == 0:
        for library in libraries:
            shutil.copy2(library, tree / "cmlm_fast")
        return
    say(f"building {ref}")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**os.environ, **({"CMLM_FAST_CUDA": "0"} if device == "cpu" and tree != ROOT else {})}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"compare: expected {ref} to build, got:\n{done.stderr[-2000:]}")
