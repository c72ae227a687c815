"""What a run shows and writes as it goes: one progress line, one JSON line for each log entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback


class QuietProgress(ProgressCallback):
    """The Trainer's progress bar; the newest loss stands behind it instead of a line for each entry."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the parts of the loss at the end of the bar."""
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {name: f"{logs[name]:.3f}" for name in ("loss", "mlm", "token", "sequence") if name in logs}
            self.training_bar.set_postfix(shown)


class MetricsFile(TrainerCallback):
    """Writes every log entry as one line of JSON; a resumed run first drops what it will write again.

    Args:
        path: metrics.jsonl.
        checkpoint: folder checkpoint-N that the run goes on from, or None.
    """

    def __init__(self, path: Path, checkpoint: Path | None) -> None:
        self.path = path
        if checkpoint is not None and path.exists():
            last = int(checkpoint.name.rpartition("-")[2])
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= last]
            path.write_text("".join(f"{line}\n" for line in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Append one line."""
        if state.is_world_process_zero and logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    def first_evaluation(self) -> dict[str, float]:
        """The scores before training, of the run that this one resumes; empty where there are none."""
        if not self.path.exists():
            return {}
        lines = (json.loads(line) for line in self.path.read_text().splitlines())
        return next((line for line in lines if line["step"] == 0 and "eval_loss" in line), {})
