"""What can go wrong in a run of `cmlm-fast post-train`, for tests/test_crash.py: `python tests/crash_runs.py FOLDER`.

Processes and signals are real, and so is the full disk if mounting is allowed. For each case, FOLDER/cases.json gets its exit
code, its output and what the folder then holds.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chaos
import torch
from chaos import newest_step, prepare
from conftest import make_sentences
from forks import fork, fork_ranks, wait
from rank_runs import use_fsdp2
from safetensors.torch import load_file
from transformers import TrainerCallback

from cmlm_fast import checkpoints, trainer
from cmlm_fast.cli import main

STEPS = 12
_INIT = trainer.CMLMTrainer.__init__


def command(arguments: tuple[str, ...], *more: object) -> Callable[[], None]:
    def run() -> None:
        sys.argv = ["cmlm-fast", *arguments, *map(str, more)]
        main()

    return run


def with_callback(callback: TrainerCallback) -> None:
    """Give every trainer of this (forked) process one more callback."""
    def init(self: Any, *arguments: Any, callbacks: Any = (), **options: Any) -> None:
        _INIT(self, *arguments, callbacks=[*callbacks, callback], **options)

    trainer.CMLMTrainer.__init__ = init  # type: ignore[method-assign]


class At(TrainerCallback):
    """Does something once a step is done, or once its checkpoint is saved."""

    def __init__(self, step: int, action: Callable[[], None], saved: bool = False) -> None:
        self.step, self.action, self.saved = step, action, saved

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and not self.saved:
            self.action()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.saved:
            self.action()


class Cases:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[str, Any] = {}
        base = prepare(folder)
        position = base.index("--save-total-limit")
        self.arguments = (*base[:position], *base[position + 2:], "--max-steps", str(STEPS))

    def run(self, name: str, *more: object, before: Callable[[], None] | None = None, output: str | None = None) -> None:
        """Run once in a separate process, and keep what it left."""
        log, out = self.folder / f"{name}.log", self.folder / (output or name)
        action = command(self.arguments, "--output-dir", out, *more)
        process = fork(lambda: (before and before(), action()), log)
        self.keep(name, wait(process), log, out)

    def keep(self, name: str, code: Any, log: Path, out: Path) -> None:
        text = log.read_text(errors="replace") if log.exists() else ""
        self.found[name] = {"code": code, "output": text, "files": sorted(path.name for path in out.glob("*")),
                            "whole": [path.name for path in checkpoints.checkpoints(out) if not checkpoints.damage(path)],
                            "equal": self.equal(out)}  # fmt: skip

    def equal(self, out: Path) -> bool | None:
        """Whether the final weights are those of the undisturbed run; None if there are none."""
        whole = self.folder / "whole"
        if not (out / "model.safetensors").exists():
            return None
        pairs = [[load_file(path / name) for path in (whole, out)] for name in ("model.safetensors", "contrast.safetensors")]
        return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)

    def signalled(self, number: signal.Signals) -> None:
        name = number.name
        log, out = self.folder / f"{name}.log", self.folder / name
        process = fork(command(self.arguments, "--output-dir", out), log)
        while newest_step(out) < 4:
            time.sleep(0.005)
        os.kill(process, number)
        self.keep(name, wait(process), log, out)
        self.run(f"{name} resumed", "--resume", output=name)

    def damaged(self) -> None:
        """Killed at step 9; checkpoint-8 is then truncated, then changed in one byte; then checkpoint-6 is damaged too."""
        out = self.folder / "damaged"
        self.run("killed", before=lambda: with_callback(At(9, lambda: os.kill(os.getpid(), signal.SIGKILL))), output="damaged")
        victim = out / "checkpoint-8" / "optimizer.pt"
        content = victim.read_bytes()
        victim.write_bytes(content[:-100])
        self.run("truncated", "--resume", before=lambda: with_callback(At(7, lambda: os._exit(9))), output="damaged")
        victim.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
        self.run("changed", "--resume", before=lambda: with_callback(At(7, lambda: os._exit(9))), output="damaged")
        (out / "checkpoint-6" / "model.safetensors").unlink()
        self.run("all damaged", "--resume", output="damaged")

    def diverged(self) -> None:
        def poison() -> None:
            before = trainer.CMLMTrainer.compute_loss

            def compute_loss(self: Any, *arguments: Any, **options: Any) -> Any:
                loss = before(self, *arguments, **options)
                return loss * float("nan") if self.state.global_step == 6 else loss

            trainer.CMLMTrainer.compute_loss = compute_loss  # type: ignore[method-assign]

        self.run("diverged", "--logging-steps", "5", before=poison)

    def disks(self) -> None:
        """A private tmpfs, filled up after the first checkpoint and emptied again; and a read-only one."""
        def mount(folder: Path, options: str) -> None:
            if ctypes.CDLL(None, use_errno=True).unshare(0x20000):  # CLONE_NEWNS
                os._exit(77)
            folder.mkdir(exist_ok=True)
            for arguments in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", options, "none", str(folder)]):
                if subprocess.run(["mount", *arguments], capture_output=True).returncode:
                    os._exit(77)

        disk = self.folder / "disk"

        def full() -> None:
            mount(disk, "size=24m")

            def fill() -> None:
                with open(disk / "filler", "wb", buffering=0) as file:
                    try:
                        while file.write(bytes(4096)):
                            pass
                    except OSError:
                        pass

            inner = Cases.__new__(Cases)
            inner.folder, inner.arguments, inner.found = self.folder, self.arguments, {}
            inner.run("disk full", before=lambda: with_callback(At(2, fill, saved=True)), output="disk/out")
            (disk / "filler").unlink()
            inner.run("disk free again", "--resume", output="disk/out")
            (self.folder / "disk.json").write_text(json.dumps(inner.found))

        log = self.folder / "disk.log"
        code = wait(fork(full, log))
        assert code in (0, 77), log.read_text()  # 77: mounting is not allowed
        if code == 0:
            self.found |= json.loads((self.folder / "disk.json").read_text())
            self.run("read-only", before=lambda: mount(disk, "ro"), output="disk/out")

    def long_line(self) -> None:
        """A line of 10 MB between the others."""
        text = self.folder / "long.txt"
        sentences = make_sentences()
        line = (" ".join(sentences) + " ") * (10_000_000 // len(" ".join(sentences)) + 1)
        text.write_text("\n".join([*sentences[:50], line, *sentences[50:100]]) + "\n", encoding="utf-8")
        self.run("long line", "--train-file", text, "--max-steps", "2", "--eval-share", "0", "--save-steps", "0")

    def ranks(self) -> None:
        """Two ranks: a bad input, a signal to one of them, and a full disk for the one that writes."""
        def run(name: str, *more: object, after: Callable[[list[int], Path], None] | None = None,
                before: Callable[[], None] | None = None) -> None:  # fmt: skip
            out, log = self.folder / name, self.folder / f"{name}.log"
            action = command(self.arguments, "--output-dir", out, *more)
            processes = fork_ranks(2, lambda: (before and before(), action()), log)
            if after:
                after(processes, out)
            codes = [wait(process) for process in processes]
            joined = self.folder / f"{name}.all"
            joined.write_text("".join(log.with_suffix(f".{rank}").read_text() for rank in range(2)))
            self.keep(name, codes, joined, out)

        def stop_one(processes: list[int], out: Path) -> None:
            while newest_step(out) < 2:
                time.sleep(0.01)
            os.kill(processes[1], signal.SIGTERM)

        def small_files() -> None:
            if os.environ["RANK"] == "0":
                with_callback(At(2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)), saved=True))

        run("ranks bad input", "--train-file", "missing.txt")
        run("ranks wrong usage", "--batch-size", "many")
        run("ranks stopped", after=stop_one)
        run("ranks full disk", before=small_files)
        run("ranks whole", "--max-steps", "4")
        run("ranks fsdp", "--max-steps", "4", before=use_fsdp2)


def run_all(folder: Path) -> None:
    cases = Cases(folder)
    cases.run("whole")
    cases.signalled(signal.SIGTERM)
    cases.signalled(signal.SIGINT)
    cases.damaged()
    cases.diverged()
    cases.disks()
    cases.long_line()
    cases.ranks()
    kills = folder / "kills"
    kills.mkdir()
    cases.found["kills"] = chaos.kill_loop(kills, kills=3, steps=16, seed=0)
    (folder / "cases.json").write_text(json.dumps(cases.found, indent=1))


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
