"""Callbacks of a run: one progress line, one JSON line per log entry, training time, and stopping on a signal."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from .checkpoints import replacing, step_of
from .errors import Stopped


class QuietProgress(ProgressCallback):
    """The Trainer's progress bar, with the newest loss at its end instead of a line for each entry."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the loss and its parts at the end of the bar."""
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {name: f"{logs[name]:.3f}" for name in ("loss", "mlm", "token", "sequence") if name in logs}
            self.training_bar.set_postfix(shown)

    def close(self) -> None:
        """Close the bars of an interrupted run, so that a message gets its own line."""
        for bar in (self.training_bar, self.prediction_bar):
            if bar is not None:
                bar.close()


class TrainingTime(TrainerCallback, ExportableState):
    """Seconds of training, including those before a resume, which the checkpoint's trainer_state.json records.

    Args:
        checkpoint: folder checkpoint-N that the run resumes from, or None.
    """

    def __init__(self, checkpoint: Path | None) -> None:
        self._before, self._begin = 0.0, time.perf_counter()
        if checkpoint is not None:
            saved = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["stateful_callbacks"]
            if type(self).__name__ in saved:  # earlier versions did not save it
                self._before = saved[type(self).__name__]["attributes"]["seconds"]

    def seconds(self) -> float:
        """Seconds until now."""
        return self._before + time.perf_counter() - self._begin

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock here: loading and scoring do not count as training."""
        self._begin = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """The state that the Trainer saves with a checkpoint."""
        return {"args": {}, "attributes": {"seconds": self.seconds()}}


class MetricsFile(TrainerCallback):
    """Write every log entry as one line of JSON; a resumed run first drops the lines that it will write again.

    It runs after the callbacks that decide on checkpoints: each checkpoint gets an entry at its step, so that later entries
    average over the same steps if a run resumes from it.

    Args:
        path: metrics.jsonl.
        checkpoint: folder checkpoint-N that the run resumes from, or None.
    """

    def __init__(self, path: Path, checkpoint: Path | None) -> None:
        self.path = path
        self._begin = step_of(checkpoint) if checkpoint is not None else 0
        if checkpoint is not None and path.exists():
            kept, ended = [], None
            for entry in self.entries():
                if entry["step"] <= self._begin and entry["step"] != ended:
                    kept.append(_line(entry))
                if "train_runtime" in entry:  # a training's last line, before its final scores
                    ended = entry["step"]
            with replacing(path) as draft:
                draft.write_text("".join(kept), encoding="utf-8")

    def entries(self) -> list[dict[str, Any]]:
        """All entries, including those from before a resume."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may leave a partial last line

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log whenever a checkpoint is saved."""
        control.should_log |= control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Append one line; none for a training that had nothing left to do."""
        idle = "train_runtime" in (logs or ()) and 0 < self._begin == state.global_step
        if state.is_world_process_zero and logs and not idle:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line({"step": state.global_step, **logs}))

    def first_evaluation(self) -> dict[str, float]:
        """The scores before training, from the run that this one resumes; empty if there are none."""
        return next((entry for entry in self.entries() if entry["step"] == 0 and "eval_loss" in entry), {})


def _line(entry: dict[str, Any]) -> str:
    # JSON cannot express the gradient norm of a step that was skipped because float16 overflowed.
    finite = {name: value for name, value in entry.items() if not isinstance(value, float) or math.isfinite(value)}
    return json.dumps({**dict.fromkeys(entry), **finite}) + "\n"


class StopOnSignal(TrainerCallback):
    """On SIGINT or SIGTERM, finish the training step, save a checkpoint and end; `stopped` then names the signal.

    A context manager: inside it but outside of training, a signal raises `Stopped` at once. So does a second Ctrl-C in a run
    of one process (with several, the launcher forwards a signal that the terminal has already sent). All ranks stop after the
    same step: they agree on it while the step runs, over gloo, without waiting for a device.

    Attributes:
        stopped: the signal that ended a training, or arrived while it ended.
        defer: set it for a training without checkpoints: a signal then waits even after training, until `release`.

    Example:
        >>> with StopOnSignal() as stop:
        ...     CMLMTrainer(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[stop]).train()
        ...     print(stop.stopped)
    """

    def __init__(self) -> None:
        self.stopped: signal.Signals | None = None
        self.defer = False
        self._received, self._process = 0, os.getpid()
        self._training = False
        self._before: dict[int, Any] = {}
        self._group: Any = None
        self._agreement: tuple[torch.Tensor, Any] | None = None

    def __enter__(self) -> StopOnSignal:
        self.stopped, self._received = None, 0  # or the signal that ended an earlier training would end the next
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)  # None: a handler that Python did not set

    def release(self) -> None:
        """The trained model is saved: on all ranks, raise `Stopped` for a signal pending on any; later ones act at once."""
        self.defer = self._training = False
        if number := self._of_any_rank():
            raise Stopped(number)

    def _of_any_rank(self) -> signal.Signals | None:
        number = torch.tensor(self._received)
        if self._group is not None:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
        return signal.Signals(int(number)) if number else None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # in a forked worker, which ends
            if number == signal.SIGINT and self._training:
                return  # a loader's worker: Ctrl-C reaches all processes, but the step still needs it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        again = self._received == number == signal.SIGINT and not dist.is_initialized()
        if again or not self._training:
            raise Stopped(signal.Signals(number))
        self._received = self._received or number

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From now on, a signal waits for the end of the step."""
        self._training = True
        if args.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the other ranks, without waiting for their answer."""
        if self._group is not None:
            flag = torch.tensor(self._received)
            self._agreement = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop if any rank received a signal."""
        number = self._received
        if self._agreement is not None:
            flag, work = self._agreement
            work.wait()
            number = int(flag)
        if number:
            self.stopped = signal.Signals(number)
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Signals act at once again, or wait for `release`. One that arrived after the last step ends the run."""
        self.stopped = self._of_any_rank() or self.stopped
        self._training = self.defer
