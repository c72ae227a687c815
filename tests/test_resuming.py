"""An interrupted and resumed run ends like an uninterrupted one, whatever it evaluates, logs and saves, in any folder."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import make_lm
from test_trainer import history, make_trainer, weights
from transformers import EarlyStoppingCallback, TrainerCallback

from cmlm_fast import CMLMConfig, CMLMModel, checkpoints
from cmlm_fast.callbacks import StopOnSignal
from cmlm_fast.data.share import share_loader
from cmlm_fast.errors import DivergedError

DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
EPOCHS = {"max_steps": -1, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 3}  # three steps an epoch


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def cut():
    raise KeyboardInterrupt


@pytest.fixture
def make(tmp_path, tiny_rows, tiny_tokenizer):
    def one(name, *callbacks, rows=24, **options):
        held = options.pop("held", tiny_rows.select(range(60, 76)))
        trainer = make_trainer(tmp_path / name, tiny_rows.select(range(rows)), tiny_tokenizer, held=held,
                               lm=make_lm(**options.pop("lm", DROPOUT)), **options)  # fmt: skip
        for callback in callbacks:
            trainer.add_callback(callback)
        return trainer

    return one


def evaluated(trainer):
    return [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]


@pytest.mark.parametrize("options", [
    {"eval_strategy": "epoch"}, {"eval_strategy": "steps", "eval_steps": 2},
    {"eval_strategy": "epoch", "lr_scheduler_type": "reduce_lr_on_plateau", "greater_is_better": True, "save_total_limit": 1,
     "metric_for_best_model": "loss", "lr_scheduler_kwargs": {"patience": 0}},
])  # fmt: skip
@pytest.mark.parametrize("step", [4, 6])
def test_evaluations_of_a_resumed_run_are_those_of_an_uncut_one(step, options, make, tmp_path):
    whole = make("whole", **EPOCHS, **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make("cut", At(step + 1, cut), **EPOCHS, **options).train()
    resumed = make("cut", **EPOCHS, **options)
    resumed.train(resume_from_checkpoint=True)
    assert evaluated(resumed) == evaluated(whole) and len(evaluated(whole)) >= 3
    assert all(history(resumed, name) == history(whole, name) for name in ("loss", "learning_rate"))
    assert all(map(torch.equal, weights(resumed), weights(whole)))


def test_what_is_logged_for_an_epoch_is_in_its_checkpoint(make):
    options = {**EPOCHS, "logging_strategy": "epoch"}
    with pytest.raises(KeyboardInterrupt):
        make("run", At(4, cut), **options).train()
    resumed = make("run", **options)
    resumed.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [3, 6, 9]


def test_an_evaluation_changes_nothing_of_the_training(make):
    found = []
    for name, options in (("without", {}), ("with", {"eval_strategy": "steps", "eval_steps": 2})):
        run = make(name, max_steps=5, **options)
        run.train()
        found.append(weights(run))
    assert all(map(torch.equal, *found))


def test_a_new_run_in_the_folder_of_another_is_resumed_as_itself(make, tmp_path):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2,
               "lr_scheduler_type": "constant"}  # fmt: skip
    make("used", learning_rate=1e-2, **options).train()
    whole = make("new", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make("used", At(5, cut), **options).train()
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "used")] == ["checkpoint-2", "checkpoint-4"]
    resumed = make("used", **options)
    resumed.train(resume_from_checkpoint=True)
    assert all(map(torch.equal, weights(resumed), weights(whole)))


def test_a_resumed_run_saves_and_logs_as_often_as_its_own_arguments_say(make, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make("run", At(5, cut), max_steps=8, save_strategy="steps", save_steps=4, logging_steps=4).train()
    resumed = make("run", max_steps=8, save_strategy="steps", save_steps=1, logging_steps=1)
    resumed.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [4, 5, 6, 7, 8]
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "run")] == [f"checkpoint-{n}" for n in range(4, 9)]


def test_a_callback_that_the_checkpoint_does_not_know_is_saved_with_the_next(make, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
               "load_best_model_at_end": True}  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        make("run", At(3, cut), **options).train()
    resumed = make("run", EarlyStoppingCallback(3), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6 and "EarlyStoppingCallback" in resumed.state.stateful_callbacks


@pytest.mark.parametrize("step", [2, 3, 4])  # 3 ends an epoch; at all of them the score is worse than the first
def test_a_signal_saves_also_where_a_checkpoint_must_be_the_best(step, make, tmp_path):
    options = {"max_steps": 9, "save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1,
               "metric_for_best_model": "loss", "greater_is_better": True}  # fmt: skip
    with StopOnSignal() as stop:
        make("run", stop, At(step, lambda: os.kill(os.getpid(), signal.SIGTERM)), **options).train()
    stopped_at = checkpoints.checkpoints(tmp_path / "run")[-1]
    assert stop.stopped is signal.SIGTERM and checkpoints.step_of(stopped_at) in (step, step + 1)


def test_a_signal_leaves_its_checkpoint_also_beside_the_best_alone(make, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
               "metric_for_best_model": "loss", "greater_is_better": True, "save_total_limit": 1}  # fmt: skip
    with StopOnSignal() as stop:
        trainer = make("run", stop, At(3, lambda: os.kill(os.getpid(), signal.SIGTERM)), **options)
        trainer.train()
    left = [checkpoints.step_of(path) for path in checkpoints.checkpoints(tmp_path / "run")]
    assert trainer.args.save_total_limit == 1 and trainer.state.best_global_step == 2 and left in ([2, 3], [2, 4])
    trainer = make("run", stop, **options)
    with stop:  # no longer knows of the earlier signal
        trainer.train(resume_from_checkpoint=True)
    assert stop.stopped is None and trainer.state.global_step == 6
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "run")] == ["checkpoint-2"]


def test_the_best_is_none_of_another_run(make, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "metric_for_best_model": "loss",
               "greater_is_better": True}  # fmt: skip
    make("run", max_steps=1, save_steps=1, learning_rate=0.1, **options).train()
    trainer = make("run", max_steps=2, save_steps=2, **options)
    trainer.train()
    assert trainer.state.best_global_step == 1 and trainer.state.best_model_checkpoint is None
    moved = make("run", max_steps=2, save_steps=1, **options)
    moved.train()
    (tmp_path / "run").rename(tmp_path / "moved")
    resumed = make("moved", max_steps=3, save_steps=1, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "moved" / "checkpoint-1")


def test_a_best_checkpoint_at_an_epochs_end_knows_what_is_logged_there(make):
    options = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "logging_strategy": "epoch", "max_steps": -1,
               "num_train_epochs": 2, "metric_for_best_model": "loss"}  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        make("run", At(4, cut), **options).train()
    resumed = make("run", **options)
    resumed.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [3, 6]


def test_what_is_pushed_during_a_training_is_the_whole_model(make, tmp_path, monkeypatch):
    class Hub:
        def create_repo(self, *args, **options):
            return SimpleNamespace(repo_id="user/model")

        def upload_folder(self, folder_path, **options):
            pushed.append({path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()})
            return SimpleNamespace(done=lambda: True, result=lambda: None)

    pushed = []
    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    config = CMLMConfig.from_preset("paper", projection=8, learn_temperature=True)
    options = {"save_strategy": "steps", "save_steps": 2, "push_to_hub": True, "hub_model_id": "user/model"}
    make("run", config=config, max_steps=4, **options).train()
    for step, files in zip((2, 4), pushed, strict=True):
        (tmp_path / f"pushed-{step}").mkdir()
        for name, contents in files.items():
            (tmp_path / f"pushed-{step}" / name).write_bytes(contents)
        found, saved = (CMLMModel.from_pretrained(tmp_path / name) for name in (f"pushed-{step}", f"run/checkpoint-{step}"))
        assert found.cmlm == config and all(map(torch.equal, found.state_dict().values(), saved.state_dict().values()))


def test_ctrl_c_saves_also_where_workers_read_the_rows(make, tmp_path):
    def press():  # a terminal signals every process
        workers = active_children()
        assert workers
        for process in (*(worker.pid for worker in workers), os.getpid()):
            os.kill(process, signal.SIGINT)
        time.sleep(1)  # a worker that ended would be noticed now

    with StopOnSignal() as stop:
        make("run", At(2, press), stop, max_steps=9, save_strategy="steps", save_steps=5, dataloader_num_workers=2).train()
    assert stop.stopped is signal.SIGINT
    assert checkpoints.step_of(checkpoints.checkpoints(tmp_path / "run")[-1]) == 2 and not active_children()


def test_the_last_entry_is_of_what_the_training_saw(make):
    whole = make("tokens", rows=60, max_steps=4, max_tokens=300, logging_steps=4)
    sequences = []
    mask = whole.mask
    whole.mask = lambda batch, step: (sequences.append(len(batch["sample_ids"])), mask(batch, step))[1]
    result = whole.train()
    rate = result.metrics["train_samples_per_second"] * result.metrics["train_runtime"]
    assert sum(sequences) != 4 * 8 and rate == pytest.approx(sum(sequences), rel=0.01)
    with pytest.raises(KeyboardInterrupt):
        make("run", At(3, cut), max_steps=6, save_strategy="steps", save_steps=2).train()
    resumed = make("run", max_steps=6)
    result = resumed.train(resume_from_checkpoint=True)
    assert result.training_loss == result.metrics["train_loss"] == pytest.approx(sum(history(resumed, "loss")[2:]) / 4)
    assert result.metrics["train_samples_per_second"] * result.metrics["train_runtime"] == pytest.approx(4 * 8, rel=0.01)


def test_an_evaluation_leaves_a_cached_contrast_its_dropout(make):
    options = {"contrastive_batch_size": 16, "gradient_accumulation_steps": 2, "max_steps": 3}
    plain = make("plain", **options)
    plain.train()
    scored = make("scored", eval_strategy="steps", eval_steps=1, **options)
    scored.train()
    assert history(plain, "loss") == history(scored, "loss")
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(scored), strict=True))


def test_weights_that_are_not_finite_are_not_saved(make, tmp_path):
    trainer = make("run", save_strategy="steps", save_steps=2)
    trainer.add_callback(At(2, lambda: next(trainer.model.parameters()).data.fill_(float("nan"))))
    with pytest.raises(DivergedError, match="weights are not finite after step 2; there is no checkpoint from before that"):
        trainer.train()
    assert not list((tmp_path / "run").glob("*checkpoint*"))


def test_evaluations_of_other_data_are_of_them(make, tiny_rows):
    held, other = tiny_rows.select(range(60, 76)), tiny_rows.select(range(100, 116))
    usual = make("usual", held=held)
    expected = [usual.evaluate(rows)["eval_loss"] for rows in (held, other)]
    kept = make("kept", held=held, dataloader_num_workers=1, dataloader_persistent_workers=True)
    assert [kept.evaluate(rows)["eval_loss"] for rows in (None, other, None)] == [expected[0], expected[1], expected[0]]
    with pytest.raises(ValueError, match="expected eval_dataset to hold a sequence, got none"):
        usual.evaluate(held.select([]))


def test_a_stream_is_scored_by_the_sequence(make, tiny_rows):
    trainer = make("run")
    held = trainer.eval_dataset
    counted, streamed = (trainer.evaluate(rows) for rows in (held, held.to_iterable_dataset()))
    rate = streamed["eval_samples_per_second"] * streamed["eval_runtime"]
    assert rate == pytest.approx(len(held), rel=0.02) and streamed["eval_loss"] == pytest.approx(counted["eval_loss"])


def test_ddp_looks_for_idle_parameters_where_an_objective_has_them(make):
    trainers = [make("run", config=config) for config in (CMLMConfig(), CMLMConfig.from_preset("seq"), CMLMConfig())]
    trainers[1].args = trainers[0].args  # one trainer's arguments, given to another
    trainers[1].create_accelerator_and_postprocess()
    assert [t.accelerator.ddp_handler.find_unused_parameters for t in trainers] == [False, True, False]
    assert all(trainer.args.ddp_find_unused_parameters is None for trainer in trainers)
    assert all(trainer.accelerator.ddp_handler.gradient_as_bucket_view for trainer in trainers)


def test_split_batches_are_refused_where_ranks_would_share_them(make):
    args = SimpleNamespace(world_size=2, accelerator_config=SimpleNamespace(split_batches=True))
    with pytest.raises(ValueError, match="expected accelerator_config to be one without split_batches"):
        share_loader(make("run").get_train_dataloader(), args)


def test_the_best_at_an_epochs_last_step_is_saved(make, tmp_path):
    trainer = make("run", save_strategy="best", eval_strategy="steps", eval_steps=1, max_steps=-1, num_train_epochs=2,
                   metric_for_best_model="loss", learning_rate=1e-3)  # fmt: skip
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = [step for step in losses if all(losses[step] < losses[before] for before in losses if before < step)]
    assert 3 in best  # the last step of an epoch
    assert [checkpoints.step_of(path) for path in checkpoints.checkpoints(tmp_path / "run")] == best


def test_a_training_may_follow_one_that_diverged(tmp_path, tiny_rows, tiny_tokenizer, monkeypatch):
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "compute_loss", lambda model, *rest, **_: torch.nan * sum(p.sum() for p in model.parameters()))
        with pytest.raises(DivergedError):
            trainer.train()
    trainer.model.load_state_dict(CMLMModel(make_lm()).state_dict())
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))


def test_the_first_log_of_a_resumed_run_is_that_of_the_uncut_one(tmp_path, tiny_rows, tiny_tokenizer):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 4, "logging_first_step": True}
    whole, resumed = (make_trainer(tmp_path, tiny_rows, tiny_tokenizer, **options) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert history(whole, "alignment")[1:] == history(resumed, "alignment")[1:]
