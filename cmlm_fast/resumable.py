"""A `transformers.Trainer` that survives crashes: checkpoints are whole, and none has a loss that is not finite.

The Trainer writes checkpoint-N in place and deletes old ones by age. Here it writes into a hidden folder, which is sealed
and renamed once all ranks are done; see `checkpoints`.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import SaveStrategy

from . import checkpoints
from .errors import DivergedError

_NEVER = 2**62


class ResumableTrainer(Trainer):
    """The Trainer with whole checkpoints. All ranks must see the same `output_dir`, as with any Trainer."""

    _staging: Path | None = None
    _begin = 0  # the step that this training resumes from
    _asked = False  # a checkpoint was asked for, before an evaluation says whether it is the best
    _postponed: bool | None = None  # between an epoch's last step and its end: whether a checkpoint was asked for
    _diverged: Tensor | None = None  # on the device: the first step with a non-finite loss

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """As the Trainer's. True takes the newest whole checkpoint in `output_dir`.

        Raises:
            ValueError: no whole checkpoint in `output_dir`, or the given one is damaged.
            DivergedError: the loss or a weight is not finite.
        """
        self._diverged = self._postponed = None
        if resume_from_checkpoint is True:
            rule = "to resume from a whole checkpoint-N in output_dir"
            resume_from_checkpoint = str(checkpoints.newest_whole(Path(self.args.output_dir)) or "")
            if not resume_from_checkpoint:
                raise ValueError(f"{type(self).__name__}: expected {rule}, got none in {self.args.output_dir}")
        elif resume_from_checkpoint and (problem := checkpoints.damage(Path(resume_from_checkpoint))):
            rule = f"a whole checkpoint, got {resume_from_checkpoint}: {problem}"
            raise ValueError(f"{type(self).__name__}: expected resume_from_checkpoint to be {rule}")
        if resume_from_checkpoint and self.is_fsdp_enabled:  # before the model is sharded
            self.resume_from(resume_from_checkpoint)
        try:
            result = super().train(resume_from_checkpoint or None, **options)
        finally:
            self.is_in_train = False  # even after an error: later logs do not belong to training
        self._check_finite()
        self._check_weights(self.model)
        return result

    def _init_training_state(self, max_steps: int, steps: int, epochs: int, checkpoint: str | None, trial: Any) -> Any:
        """As the Trainer's, but a resumed run logs, saves and evaluates as often as its own arguments say.

        Its best checkpoint may have moved along with the folder.
        """
        result = super()._init_training_state(max_steps, steps, epochs, checkpoint, trial)
        self.state.compute_steps(self.args, max_steps)
        if checkpoint is not None:
            recorded = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json")).best_model_checkpoint
            if recorded and (moved := Path(checkpoint).parent / Path(recorded).name).is_dir():
                self.state.best_model_checkpoint = str(moved)
        self._begin = self.state.global_step
        return result

    def _load_callback_state(self) -> None:
        """As the Trainer's; a callback that the checkpoint does not know is saved with the next one."""
        super()._load_callback_state()
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())

    def _maybe_log_save_evaluate(self, *args: Any, **options: Any) -> None:
        """As the Trainer's, but a checkpoint at an epoch's last step is written after the end-of-epoch work.

        Otherwise a run that resumes from it would skip that work.
        """
        asked = self.control.should_save or bool(self._postponed)
        if self._postponed is None and self.state.epoch and self.state.epoch == int(self.state.epoch):
            self._postponed, asked = asked, False
        else:
            self._postponed = None
        self.control.should_save = self._asked = asked
        super()._maybe_log_save_evaluate(*args, **options)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As the Trainer's, which with save_strategy "best" saves if this is true; also true if a callback asked to save."""
        best: bool = super()._determine_best_metric(metrics, trial)
        if self._postponed is None:
            return best or self._asked
        if self.args.save_strategy == SaveStrategy.BEST:
            self._postponed |= best
        return False

    def _finalize_training(self, *args: Any, **options: Any) -> Any:
        """As the Trainer's, which with save_total_limit 1 removes all but the best checkpoint.

        If training was stopped, the newest stays as well.
        """
        limit = self.args.save_total_limit
        if self.state.global_step < self.state.max_steps:
            self.args.save_total_limit = None
        try:
            return super()._finalize_training(*args, **options)
        finally:
            self.args.save_total_limit = limit

    def resume_from(self, checkpoint: str) -> None:
        """Hook: load from a whole checkpoint what the Trainer itself does not."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:
            self.resume_from(resume_from_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As the Trainer's, but missing weights are an error, since they would keep their previous values."""
        if missing := load_result.missing_keys:
            rule = "a checkpoint with all of the model's weights"
            raise ValueError(f"{type(self).__name__}: expected {rule}, got one without {', '.join(sorted(missing)[:5])}")
        super()._issue_warnings_after_load(load_result)

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """As the Trainer's; remembers, on the device, when a loss was not finite for the first time."""
        loss = super().training_step(*args, **options)
        step = torch.where(loss.isfinite(), _NEVER, self.state.global_step + 1)
        self._diverged = step if self._diverged is None else torch.minimum(self._diverged, step)
        if loss.device.type == "cpu":  # there is no device to wait for
            self._check_finite()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, after a check that the loss is finite: logging waits for the device anyway."""
        if self.is_in_train:
            self._check_finite()
        super().log(logs, start_time)

    def _check_finite(self) -> None:
        if self._diverged is None:
            return
        step = int(self.accelerator.gather(self._diverged.reshape(1)).min())
        if step < _NEVER:
            raise DivergedError(f"the loss is not finite at step {step}; {self._way_back(step)}")

    def _check_weights(self, model: nn.Module) -> None:
        """A non-finite gradient shows only in the next loss, too late for the checkpoint saved now."""
        finite = [value.isfinite().all() for value in map(_local, model.parameters())]
        bad = (~torch.stack(finite)).any().int() if finite else torch.zeros((), dtype=torch.int32)
        if int(self.accelerator.gather(bad.reshape(1).to(self.args.device)).max()):
            step = self.state.global_step
            raise DivergedError(f"the weights are not finite after step {step}; {self._way_back(step)}")

    def _way_back(self, step: int) -> str:
        before = [path for path in checkpoints.sealed(Path(self.args.output_dir)) if checkpoints.step_of(path) < step]
        return f"{before[-1].name} is from before that" if before else "there is no checkpoint from before that"

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return folder if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_finite()
        self._check_weights(model)
        folder, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        staging, best = folder / f"{checkpoints.STAGING}{name}", self.state.best_global_step
        save = super()._save_checkpoint
        try:
            self._on_all_ranks(lambda: shutil.rmtree(staging, ignore_errors=True) if self.args.should_save else None)
            self._staging = staging
            # The Trainer would wait for all ranks once the model is written, even for one that failed to write it, and look
            # for the best checkpoint in the hidden folder.
            self.state.best_global_step = None
            self._on_all_ranks(lambda: save(model, trial))
            if best and best == self.state.global_step:  # a checkpoint of another step may belong to another run
                self.state.best_model_checkpoint = str(folder / f"checkpoint-{best}")
            self.state.best_global_step = best
            self._on_all_ranks(lambda: self._put_in_place(staging / name, folder / name) if self.args.should_save else None)
        finally:
            self._staging, self.state.best_global_step = None, best
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))

    def _put_in_place(self, written: Path, target: Path) -> None:
        self.state.save_to_json(str(written / "trainer_state.json"))  # now with the best checkpoint
        checkpoints.seal(written, checkpoints.next_number(target.parent))
        checkpoints.publish(written, target)
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        checkpoints.rotate(target.parent, limit, best)

    def _on_all_ranks(self, action: Callable[[], None]) -> None:
        """Run `action()`, then wait for all ranks, and raise on all of them if one failed."""
        error = None
        try:
            action()
        except Exception as caught:
            error = caught
            if self.is_fsdp_enabled:  # other ranks may be in the middle of a gather: the launcher ends them
                raise
        failed = torch.tensor([int(error is not None)], device=self.args.device)
        failed = self.accelerator.gather(failed).sum()
        if error is not None:
            raise error
        if int(failed):
            raise OSError(errno.EIO, "another rank could not write its part of the checkpoint")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # otherwise it would upload a folder that is about to be renamed
            super()._push_from_checkpoint(checkpoint_folder)


def _local(parameter: Tensor) -> Tensor:
    """This rank's shard of a parameter."""
    local: Tensor = getattr(parameter, "to_local", lambda: parameter)()
    return local.detach()
