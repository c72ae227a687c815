"""Killed, stopped, out of space, damaged, diverged: a run prints one line, loses nothing, and ends as if nothing happened."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from forks import fork, wait
from transformers.trainer_callback import TrainerControl, TrainerState

from cmlm_fast import checkpoints
from cmlm_fast.callbacks import MetricsFile, StopOnSignal, TrainingTime
from cmlm_fast.errors import DiskError, Stopped
from cmlm_fast.output import REPORTS, SUMMARY, check_output, finished_run, open_output, staged, what_is_kept


@pytest.fixture(scope="module")
def cases(script_folder):
    return json.loads((script_folder("crash_runs") / "cases.json").read_text())


def messages(case):
    """What the run printed besides progress bars and tables."""
    lines = [line.rpartition("\r")[2] for line in case["output"].splitlines()]
    return [line for line in lines if re.match(r"error: |stopped|.* is damaged|Traceback", line)]


def test_a_run_killed_at_random_moments_ends_in_the_same_bits(cases):
    # The long version is `make chaos`.
    found = cases["kills"]
    assert found["kills"] == 3 and found["equal"] and not found["left_over"]


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_finishes_the_step_saves_and_says_so(name, code, cases):
    stopped, resumed = cases[name], cases[f"{name} resumed"]
    newest = stopped["whole"][-1]
    assert stopped["code"] == code and "config.json" not in stopped["files"]
    assert messages(stopped) == [f"stopped by {name}; {newest} is whole, continue with --resume"]
    assert resumed["code"] == 0 and resumed["equal"] and not messages(resumed)


def test_a_damaged_checkpoint_is_passed_over_in_one_line(cases):
    assert cases["killed"]["code"] == -9 and cases["killed"]["whole"] == ["checkpoint-6", "checkpoint-8"]
    for name, words in (("truncated", r"optimizer.pt has \d+ bytes instead of \d+"),
                        ("changed", "optimizer.pt has other bytes than were written")):  # fmt: skip
        case = cases[name]
        assert case["code"] == 9 and len(messages(case)) == 1, case["output"]
        assert re.search(rf"checkpoint-8 is damaged \({words}\) and passed over$", messages(case)[0])
    case = cases["all damaged"]
    assert case["code"] == 2 and len(messages(case)) == 3, case["output"]
    assert "checkpoint-6 is damaged (model.safetensors is missing)" in messages(case)[1]
    rule = "a whole checkpoint-N to resume from (--overwrite starts over)"
    assert messages(case)[-1].startswith(f"error: expected output_dir to hold {rule}, got ")


def test_a_loss_that_is_not_finite_names_its_step_and_saves_nothing(cases):
    case = cases["diverged"]
    assert case["code"] == 2
    assert messages(case) == ["error: the loss is not finite at step 7; checkpoint-6 is from before that"]
    assert case["whole"] == ["checkpoint-4", "checkpoint-6"] and "config.json" not in case["files"]


def test_a_full_disk_keeps_the_last_checkpoint(cases):
    if "disk full" not in cases:
        pytest.skip("mounting a file system is not allowed here")
    case = cases["disk full"]
    assert case["code"] == 2 and case["whole"] == ["checkpoint-2"]
    assert case["files"] == ["checkpoint-2", "metrics.jsonl", "settings.json"]
    assert len(messages(case)) == 1, case["output"]
    assert re.match(r"error: could not write to .*; checkpoint-2 is whole, continue with --resume$", messages(case)[0])
    assert cases["disk free again"]["code"] == 0 and cases["disk free again"]["equal"]


def test_a_read_only_disk_is_one_line(cases):
    if "read-only" not in cases:
        pytest.skip("mounting a file system is not allowed here")
    case = cases["read-only"]
    assert case["code"] == 2 and len(messages(case)) == 1
    assert "expected output_dir to be writable" in messages(case)[0] and "Read-only file system" in messages(case)[0]


def test_a_line_of_ten_megabytes_is_text_like_any_other(cases):
    case = cases["long line"]
    assert case["code"] == 0 and not messages(case), case["output"]
    assert int(re.search(r"sequences trained on\D+([\d,]+)", case["output"])[1].replace(",", "")) > 10_000_000 / 32 / 8


def test_of_two_ranks_one_speaks_and_both_stop(cases):
    for name, words in (("ranks bad input", "error: expected train_file to be an existing file or folder, got missing.txt"),
                        ("ranks full disk", "could not write to")):  # fmt: skip
        case = cases[name]
        assert case["code"] == [2, 2] and len(messages(case)) == 1 and words in messages(case)[0], case["output"]
    assert not cases["ranks bad input"]["files"]
    assert cases["ranks full disk"]["whole"] == ["checkpoint-2"]
    usage = cases["ranks wrong usage"]
    assert usage["code"] == [2, 2] and usage["output"].count("Invalid value for '--batch-size'") == 1
    case = cases["ranks stopped"]  # rank 1 got the signal
    assert case["code"] == [143, 143] and len(messages(case)) == 1
    assert messages(case)[0] == f"stopped by SIGTERM; {case['whole'][-1]} is whole, continue with --resume"
    for name in ("ranks whole", "ranks fsdp"):
        case = cases[name]
        assert case["code"] == [0, 0], case["output"]
        assert case["output"].count("sequences trained on") == case["output"].count("perplexity") == 1
        assert {"model.safetensors", "summary.json", "curves.png"} < set(case["files"])


def test_a_signal_after_the_last_step_ends_the_run():
    stop, arguments = StopOnSignal(), SimpleNamespace(world_size=1)
    with stop:
        stop.on_train_begin(arguments, None, None)
        os.kill(os.getpid(), signal.SIGTERM)
        stop.on_train_end(arguments, None, None)
        assert stop.stopped is signal.SIGTERM
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_handler_that_python_did_not_set_makes_room_for_the_default():
    with StopOnSignal() as stop:
        before, stop._before = stop._before, {signal.SIGTERM: None}  # what signal.signal returns for such a handler
    try:
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_worker_that_is_ended_says_nothing(tmp_path):
    with StopOnSignal():
        worker = fork(lambda: time.sleep(60), tmp_path / "log")
        while not (tmp_path / "log").exists():
            time.sleep(0.01)
        os.kill(worker, signal.SIGTERM)
        assert wait(worker) == -signal.SIGTERM and not (tmp_path / "log").read_text()


def make_checkpoint(folder, step, number=0):
    path = folder / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    (path / "weights.bin").write_bytes(bytes(range(256)) * step)
    (path / "inner" / "shard.bin").write_bytes(b"shard")
    checkpoints.seal(path, number)
    return path


def test_damage_says_what_differs(tmp_path, caplog):
    old, new = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 10)
    assert checkpoints.newest_whole(tmp_path) == new and not caplog.text
    (new / "inner" / "shard.bin").write_bytes(b"shart")
    assert checkpoints.damage(new) == "inner/shard.bin has other bytes than were written"
    (new / "inner" / "shard.bin").unlink()
    assert checkpoints.damage(new) == "inner/shard.bin is missing"
    assert check_output(tmp_path, overwrite=False, resume=True) == old and len(caplog.records) == 1
    (old / "manifest.json").write_text("{")
    assert checkpoints.damage(old) == "manifest.json is missing or cannot be read"
    with pytest.raises(ValueError, match="expected output_dir to hold a whole checkpoint-N to resume from"):
        check_output(tmp_path, overwrite=False, resume=True)


def test_rotation_keeps_the_newest_the_best_and_what_was_never_sealed(tmp_path):
    for number, step in enumerate((2, 20, 4, 6, 8), 1):  # 20 is from an earlier run
        assert checkpoints.next_number(tmp_path) == number
        make_checkpoint(tmp_path, step, number)
    (tmp_path / "checkpoint-1").mkdir()
    names = lambda: [path.name for path in checkpoints.checkpoints(tmp_path)]  # noqa: E731
    checkpoints.rotate(tmp_path, None)
    checkpoints.rotate(tmp_path, 5, keep=str(tmp_path / "checkpoint-8"))  # is among those kept anyway
    assert names() == [f"checkpoint-{n}" for n in (2, 20, 4, 6, 8, 1)]
    checkpoints.rotate(tmp_path, 3, keep=os.path.relpath(tmp_path / "checkpoint-2"))
    assert names() == [f"checkpoint-{n}" for n in (2, 6, 8, 1)]
    checkpoints.rotate(tmp_path, 1, keep=str(tmp_path / "checkpoint-2"))  # with a limit of 1, the newest stays besides the best
    assert names() == [f"checkpoint-{n}" for n in (2, 8, 1)]
    assert not list(tmp_path.glob(f"{checkpoints.STAGING}*"))


def test_a_folder_in_use_is_seen_to_be(tmp_path):
    folder = make_checkpoint(tmp_path, 4)
    with checkpoints.in_use(folder) as one:
        with checkpoints.in_use(folder) as two:
            assert not two()
        assert one()
        checkpoints.discard(folder)
    with checkpoints.in_use(folder) as gone:
        assert gone is None


def test_an_output_folder_takes_what_was_begun_and_keeps_nothing_of_another_model(tmp_path):
    for name in ("settings.json", "metrics.jsonl"):
        (tmp_path / name).write_text('{"token_weight": 0.3}')
    (tmp_path / f"{checkpoints.STAGING}checkpoint-1").mkdir()  # killed while its first checkpoint was written
    assert check_output(tmp_path, overwrite=False, resume=False) is None
    own = ("notes.txt", "vocab.csv", "model_of_mine.safetensors", "1_raw_data", "tokenizer_experiments")  # the user's
    for name in ("1_Pooling", *own[3:]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "inside").write_text("old")
    for name in ("contrast.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json", "model.safetensors", *own[:3]):
        (tmp_path / name).write_text("old")
    (tmp_path / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": ".."}]')
    with staged(tmp_path) as staging:
        (staging / "model.safetensors").write_text("new")
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(checkpoints.STAGING)}
    assert left == {"settings.json", "metrics.jsonl", "model.safetensors", *own}
    assert (tmp_path / "1_raw_data" / "inside").read_text() == "old"
    assert (tmp_path / "model.safetensors").read_text() == "new"


def test_a_second_ctrl_c_does_not_wait_for_the_step():
    with StopOnSignal() as stop:
        stop.on_train_begin(SimpleNamespace(world_size=1), None, None)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_new_run_takes_nothing_of_an_earlier_one_and_a_full_disk_leaves_no_folder(tmp_path, monkeypatch):
    def full(file, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("settings.json", "metrics.jsonl", SUMMARY):
        (tmp_path / name).write_text('{"token_weight": 0.3}')
    (tmp_path / REPORTS).mkdir()
    with pytest.raises(ValueError, match="new or empty"):  # a finished run
        check_output(tmp_path, overwrite=False, resume=False)
    with open_output(tmp_path, 1, fresh=False):
        assert (tmp_path / SUMMARY).exists()
    with open_output(tmp_path, 1, fresh=True):
        assert {path.name for path in tmp_path.iterdir()} == {REPORTS}
    (tmp_path / "settings.json").write_text('{"token_weight": 0.3}')
    assert check_output(tmp_path, overwrite=False, resume=False) is None  # a run that was only begun, with its reports
    monkeypatch.setattr("cmlm_fast.output._fill", full)
    new = tmp_path / "a" / "b"
    with pytest.raises(DiskError, match="room for 3 MB, got No space"), open_output(new, 3_000_000, fresh=True):
        pass
    assert not new.parent.exists()


def test_a_folder_is_of_one_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("cmlm_fast.output._PATIENCE", 0.2)
    (tmp_path / f"{checkpoints.STAGING}checkpoint-4").mkdir()
    with open_output(tmp_path, 1, fresh=False):
        assert not (tmp_path / f"{checkpoints.STAGING}checkpoint-4").exists()
        (tmp_path / f"{checkpoints.STAGING}checkpoint-6").mkdir()
        code = "from pathlib import Path; from cmlm_fast.output import open_output; import sys\n"
        code += "with open_output(Path(sys.argv[1]), 1, fresh=True): pass"
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert f"expected output_dir to be used by no other run, got {tmp_path}" in other.stderr
        with pytest.raises(ValueError, match="used by no other run"), open_output(tmp_path, 1, fresh=True):
            pass
        assert (tmp_path / f"{checkpoints.STAGING}checkpoint-6").exists()
    with open_output(tmp_path, 1, fresh=True):
        assert not list(tmp_path.iterdir())


def test_the_room_of_checkpoints_that_go_counts(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("cmlm_fast.output._fill", lambda file, size: asked.append(size))
    held = sum(path.stat().st_size for path in make_checkpoint(tmp_path, 4).rglob("*") if path.is_file())
    for size, fresh in ((held + 7, False), (held + 7, True), (5, True)):
        with open_output(tmp_path, size, fresh=fresh):
            assert (tmp_path / "checkpoint-4").exists() is not fresh
    assert asked == [held + 7, 7, 5]


def test_what_is_kept_is_a_sealed_checkpoint(tmp_path):
    make_checkpoint(tmp_path, 4)
    (make_checkpoint(tmp_path, 6) / "manifest.json").write_text("")
    assert what_is_kept(tmp_path) == "checkpoint-4 is whole, continue with --resume"


def test_metrics_of_a_finished_run_are_written_once_more_not_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    # The first leg was stopped after step 1; the second reached the end at step 2.
    entries = [{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.0}, {"step": 1, "train_runtime": 1.0},
               {"step": 2, "loss": 1.9}, {"step": 2, "train_runtime": 1.0}, {"step": 2, "eval_loss": 2.5}]  # fmt: skip
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    MetricsFile(path, tmp_path / "checkpoint-2")
    assert [json.loads(line) for line in path.read_text().splitlines()] == entries[:-1]


@pytest.mark.parametrize("step", [3, 5])
def test_a_leg_that_trains_nothing_leaves_the_training_s_line_alone(step, tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", tmp_path / "checkpoint-3")
    metrics.on_log(None, SimpleNamespace(is_world_process_zero=True, global_step=step), None, {"train_runtime": 0.01})
    assert metrics.path.exists() == (step > 3)


def test_a_line_of_metrics_is_json_whatever_a_number_is(tmp_path):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    metrics = MetricsFile(tmp_path / "metrics.jsonl", None)
    state = SimpleNamespace(is_world_process_zero=True, global_step=3)
    metrics.on_log(None, state, None, {"loss": 1.5, "grad_norm": float("inf"), "epoch": 1})
    line = json.loads(metrics.path.read_text(), parse_constant=refuse)
    assert line == {"step": 3, "loss": 1.5, "grad_norm": None, "epoch": 1} and metrics.entries() == [line]
    metrics.path.write_text('{"step": 3, "grad_norm": NaN}\n')  # from an earlier version
    MetricsFile(metrics.path, tmp_path / "checkpoint-3")
    assert json.loads(metrics.path.read_text(), parse_constant=refuse) == {"step": 3, "grad_norm": None}


def test_what_is_renamed_into_place_is_on_the_disk_before_and_the_summary_comes_last(tmp_path, monkeypatch):
    events, flush, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(Path(os.readlink(f"/proc/self/fd/{file}")).name), flush(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(f"-> {Path(new).name}"), replace(old, new)))
    checkpoints.publish(make_checkpoint(tmp_path / "new", 4), tmp_path / "checkpoint-4")
    written = {"weights.bin", "inner", "shard.bin", "manifest.json", "checkpoint-4"}
    assert set(events[:5]) == written and events[5:] == ["-> checkpoint-4", tmp_path.name]
    events.clear()
    names = {"summary.json", "model.safetensors", "config.json", "tokenizer_config.json"}
    with staged(tmp_path) as staging:
        for name in names:
            (staging / name).write_text(json.dumps({"files": sorted(names)}))
    assert names < set(events[:5]) and set(events[5:-3]) == {f"-> {name}" for name in names - {"summary.json"}}
    assert events[-3:] == [tmp_path.name, "-> summary.json", tmp_path.name] and finished_run(tmp_path) is not None
    (tmp_path / "model.safetensors").unlink()  # the run made it, but it is gone
    assert finished_run(tmp_path) is None


def test_a_checkpoint_knows_how_long_it_was_trained(tmp_path, tiny_rows, tiny_tokenizer):
    from test_trainer import make_trainer

    spent = TrainingTime(None)
    spent._before = 1_000.0
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, save_strategy="steps", save_steps=2, max_steps=2)
    trainer.add_callback(spent)
    trainer.train()
    assert 1_000 < TrainingTime(tmp_path / "checkpoint-2").seconds() < spent.seconds() + 60


def test_publish_replaces_a_folder_of_that_name(tmp_path):
    old = make_checkpoint(tmp_path, 4)
    (tmp_path / "new").mkdir()
    new = make_checkpoint(tmp_path / "new", 4)
    (new / "more.txt").write_text("more")
    checkpoints.publish(new, old)
    assert (old / "more.txt").exists() and sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "new"]


@pytest.mark.parametrize("best", [False, True])
def test_the_trainer_keeps_its_best_checkpoint(best, tmp_path, tiny_rows, tiny_tokenizer):
    from test_trainer import make_trainer

    # The loss falls, and "greater is better" makes the first checkpoint the best one.
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "max_steps": 6}
    if best:
        options |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True,
                    "metric_for_best_model": "eval_mlm", "learning_rate": 1e-2}  # fmt: skip
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, held=tiny_rows.select(range(40)), **options)
    trainer.train()
    kept = [path.name for path in checkpoints.checkpoints(tmp_path)]
    assert kept == (["checkpoint-2"] if best else ["checkpoint-6"])
    if best:
        assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"expected resume_from_checkpoint to be a whole checkpoint, got .*missing"):
        trainer.train(str(tmp_path / "checkpoint-9"))


@pytest.mark.parametrize("how", ["moved", "relative"])
def test_the_best_checkpoint_is_kept_after_a_resume_elsewhere(how, tmp_path, tiny_rows, tiny_tokenizer, monkeypatch):
    from test_trainer import make_trainer

    monkeypatch.chdir(tmp_path)
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 1,
               "load_best_model_at_end": True, "metric_for_best_model": "eval_mlm", "greater_is_better": True,
               "learning_rate": 1e-2}  # fmt: skip
    held = tiny_rows.select(range(40))
    make_trainer(tmp_path / "run", tiny_rows, tiny_tokenizer, held=held, max_steps=3, **options).train()
    if how == "moved":
        (tmp_path / "run").rename(tmp_path / "later")
    folder = tmp_path / "later" if how == "moved" else Path("run")
    again = make_trainer(folder, tiny_rows, tiny_tokenizer, held=held, max_steps=5, **options)
    again.train(resume_from_checkpoint=True)
    assert [path.name for path in checkpoints.checkpoints(folder)] == ["checkpoint-1", "checkpoint-5"]
    assert again.state.best_model_checkpoint == str(folder / "checkpoint-1")
    scores = [entry["eval_mlm"] for entry in again.state.log_history if "eval_mlm" in entry]
    assert again.evaluate()["eval_mlm"] == pytest.approx(scores[0]) != scores[-1]


def test_seconds_are_those_of_the_training():
    spent = TrainingTime(None)
    spent._begin -= 100.0
    spent.on_train_begin(None, None, None)
    assert spent.seconds() < 50


def test_what_is_saved_is_logged(tmp_path):
    control = TrainerControl(should_save=True)
    MetricsFile(tmp_path / "metrics.jsonl", None).on_step_end(None, TrainerState(), control)
    assert control.should_log
