"""The command line on a real file: what it writes, resumes and refuses; a bad input gives one line and leaves nothing."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_lm
from datasets import Dataset
from rich.console import Console
from transformers.integrations import TensorBoardCallback
from typer.testing import CliRunner

from cmlm_fast import CMLMConfig, CMLMModel, CMLMTrainer, report, use_backend
from cmlm_fast.backends import named_backend
from cmlm_fast.callbacks import QuietProgress, StopOnSignal
from cmlm_fast.cli import Preset, app, post_train_command
from cmlm_fast.config import PRESETS
from cmlm_fast.errors import DiskError, Stopped
from cmlm_fast.options import PostTrainOptions
from cmlm_fast.output import finished_run
from cmlm_fast.pooling import read_pooling, write_pooling
from cmlm_fast.post_train import prepare, run
from cmlm_fast.same_run import check_settings, fingerprint_of_tokens, fingerprint_of_weights, settings_of

QUICK = ("--max-steps", "4", "--batch-size", "8", "--logging-steps", "2", "--save-steps", "2", "--max-length", "32",
         "--no-bf16")  # fmt: skip


def cli(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def post_train(checkpoint, file, folder, *more):
    return cli("post-train", "--model", checkpoint, "--train-file", file, "--output-dir", folder, *QUICK, *more)


@pytest.mark.parametrize("columns", ["80", "100"])
def test_help_shows_every_option_whole(columns):
    command = [sys.executable, "-m", "cmlm_fast", "post-train", "--help"]
    text = subprocess.check_output(command, text=True, env={**os.environ, "COLUMNS": columns})
    names = [f"--{name.replace('_', '-')}" for name in signature(post_train_command).parameters]
    assert len(names) > 40 and {*names, "--no-exclude-same-token"} <= set(text.split())
    text = subprocess.check_output([*command[:3], "--help"], text=True, env={**os.environ, "COLUMNS": columns})
    assert "report. Needs the repository: bench --help." in " ".join(text.replace("│", "").split())


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_backend_is_that_chosen_outside_where_no_option_names_one(tiny_checkpoint, sentence_file, tmp_path, monkeypatch):
    seen, train = [], CMLMTrainer.train
    monkeypatch.setattr(CMLMTrainer, "train",
                        lambda *args, **options: (seen.append(named_backend()), train(*args, **options))[1])
    with use_backend("reference"):
        for name, more in (("outside", ()), ("named", ("--backend", "auto"))):
            result = post_train(tiny_checkpoint, sentence_file, tmp_path / name, "--max-steps", "1", "--eval-share", "0", *more)
            assert result.exit_code == 0, result.output
    assert seen == ["reference", None]


def test_a_fingerprint_is_of_scalars_too():
    model = CMLMModel(make_lm())
    model.lm.register_buffer("scale", torch.ones(()))
    before = fingerprint_of_weights(model)
    model.lm.scale += 1
    assert fingerprint_of_weights(model) != before


def test_post_train_writes_a_model_scores_and_curves(tiny_checkpoint, sentence_file, tmp_path):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    folder = tmp_path / "out"
    result = post_train(tiny_checkpoint, sentence_file, folder, "--preset", "paper", "--token-weight", "0.7", "--whole-word")
    assert result.exit_code == 0, result.output
    summary = json.loads((folder / "summary.json").read_text())
    objective = summary["options"]["objective"]
    assert (objective["token_weight"], objective["complement_rate"], objective["mlm_views"]) == (0.7, 0.7, "first")
    assert summary["texts"] == {"rows": 420, "empty": 0, "duplicates": 0, "kept": 420} and summary["steps"] == 4
    before, after = summary["held_out_before_after"]["perplexity"]
    assert 0 < after < before
    assert {"step": 2}.items() <= next(line for line in lines(folder) if "loss" in line).items()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    model, start = (AutoModelForMaskedLM.from_pretrained(path) for path in (folder, tiny_checkpoint))
    assert not torch.equal(model.get_input_embeddings().weight, start.get_input_embeddings().weight)
    assert AutoTokenizer.from_pretrained(folder).mask_token == "[MASK]"
    assert not list(folder.glob(".saving*")) and "perplexity" in result.output


def test_curves_draw_single_points_and_the_scores_before_training(tiny_checkpoint, sentence_file, tmp_path, monkeypatch):
    drawn, new = [], report.new_figure
    monkeypatch.setattr(report, "new_figure", lambda *a, **k: (drawn.append(new(*a, **k)), drawn[-1])[1])
    assert post_train(tiny_checkpoint, sentence_file, tmp_path / "out", "--logging-steps", "4").exit_code == 0
    found = {line.get_label(): line for axes in drawn[0].axes for line in axes.get_lines()}
    assert list(found["token retrieval, held out"].get_xdata()) == [0, 4]
    single = [line for line in found.values() if len(line.get_xdata()) == 1]
    assert single and all(line.get_marker() == "o" for line in single)


def test_a_picture_that_fails_costs_no_weights(tiny_checkpoint, sentence_file, tmp_path, monkeypatch, caplog):
    def fails(entries, path):
        path.write_bytes(b"half")
        raise RuntimeError("no fonts")

    monkeypatch.setattr("cmlm_fast.post_train.plot_curves", fails)
    assert post_train(tiny_checkpoint, sentence_file, tmp_path / "out").exit_code == 0
    files = set(json.loads((tmp_path / "out" / "summary.json").read_text())["files"])
    assert {"model.safetensors", "cmlm_config.json"} <= files and "curves.png" not in files
    assert "no curves.png: no fonts" in caplog.text and not (tmp_path / "out" / "curves.png").exists()


def test_a_run_that_ended_before_its_first_checkpoint_is_begun_again(tiny_checkpoint, sentence_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text('{"token_weight": 0.3}\n')
    (tmp_path / "out" / "metrics.jsonl").write_text("{}\n")
    assert post_train(tiny_checkpoint, sentence_file, tmp_path / "out").exit_code == 0
    assert all("step" in line for line in lines(tmp_path / "out"))


def test_resume_goes_on_and_ends_like_a_run_that_was_not_cut(tiny_checkpoint, sentence_file, tmp_path):
    from safetensors.torch import load_file

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert post_train(tiny_checkpoint, sentence_file, whole).exit_code == 0
    code = f"""
import os, sys
from transformers import TrainerCallback
from cmlm_fast import trainer
class Crash(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3: os._exit(9)
before = trainer.CMLMTrainer.__init__
trainer.CMLMTrainer.__init__ = lambda self, *a, callbacks=(), **k: before(self, *a, callbacks=[*callbacks, Crash()], **k)
from cmlm_fast.cli import app
app({["post-train", "--model", tiny_checkpoint, "--train-file", sentence_file, "--output-dir", str(cut), *QUICK]!r})
"""
    crashed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert crashed.returncode == 9, crashed.stderr
    assert (cut / "checkpoint-2").is_dir() and not (cut / "config.json").exists()
    refused = post_train(tiny_checkpoint, sentence_file, cut)
    assert refused.exit_code == 2 and "new or empty (or give --overwrite or --resume)" in refused.output
    for options, words in ((("--seed", "1"), "expected seed to be 42, as in the run to resume, got 1"),
                           (("--gradient-accumulation", "2"), "expected ranks × batch_size × gradient_accumulation to be "),
                           (("--batch-size", "4"), "expected batch_size to be "),
                           (("--token-temperature", "0.3"), "expected token_temperature to be "),
                           (("--eval-share", "0.3"), "expected eval_share to be "),
                           (("--max-length", "20"), "expected max_length to be ")):  # fmt: skip
        other = post_train(tiny_checkpoint, sentence_file, cut, "--resume", *options)
        assert other.exit_code == 2 and words in other.stderr.replace("\n", " "), (options, other.stderr)
    turned = tmp_path / "turned.txt"
    turned.write_text("\n".join(reversed(Path(sentence_file).read_text().splitlines())) + "\n")
    model = CMLMModel.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        model.lm.get_input_embeddings().weight.mul_(1.01)
    shutil.copytree(tiny_checkpoint, tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    for name, start, texts in (("train_file", tiny_checkpoint, turned), ("model", tmp_path / "other", sentence_file)):
        other = post_train(start, texts, cut, "--resume")
        assert f"expected {name} to be what it was in the run to resume" in other.stderr.replace("\n", " "), other.stderr
    result = post_train(tiny_checkpoint, sentence_file, cut, "--resume")
    assert result.exit_code == 0, result.output
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)
    steps = [line["step"] for line in lines(cut) if "loss" in line]
    assert steps == [2, 4] == [line["step"] for line in lines(whole) if "loss" in line]
    first, again = (json.loads((folder / "summary.json").read_text()) for folder in (whole, cut))
    assert first["held_out_before_after"] == again["held_out_before_after"]
    state = json.loads((cut / "checkpoint-2" / "trainer_state.json").read_text())
    assert again["train_seconds"] > state["stateful_callbacks"]["TrainingTime"]["attributes"]["seconds"] > 0


def test_a_finished_run_is_left_as_it_is(tiny_checkpoint, sentence_file, tmp_path, caplog):
    folder = tmp_path / "out"
    assert post_train(tiny_checkpoint, sentence_file, folder).exit_code == 0
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    result = post_train(tiny_checkpoint, sentence_file, folder, "--resume")
    assert result.exit_code == 0 and "holds a finished run: nothing is left to do" in caplog.text, result.output
    assert "optimizer steps" in result.stdout and files == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    caplog.clear()
    model, logged = (folder / "model.safetensors").read_bytes(), lines(folder)
    # Files that were lost, or that a run was killed before writing.
    for gone in (["model.safetensors"], ["tokenizer.json", "curves.png"], ["model.safetensors", "summary.json"]):
        for name in gone:
            (folder / name).unlink()
        result = post_train(tiny_checkpoint, sentence_file, folder, "--resume")
        assert result.exit_code == 0 and not caplog.text and (folder / "model.safetensors").read_bytes() == model
        assert all((folder / name).exists() for name in gone)
        again = lines(folder)  # the last line holds scores and their seconds
        assert again[:-1] == logged[:-1] and again[-1]["eval_loss"] == logged[-1]["eval_loss"]


def test_a_finished_run_without_its_checkpoints_is_finished(tiny_checkpoint, sentence_file, tmp_path, caplog):
    assert post_train(tiny_checkpoint, sentence_file, tmp_path / "out", "--save-steps", "0").exit_code == 0
    result = post_train(tiny_checkpoint, sentence_file, tmp_path / "out", "--save-steps", "0", "--resume")
    assert result.exit_code == 0 and "holds a finished run: nothing is left to do" in caplog.text, result.output


def test_paths_and_reports_of_python_stay_in_the_folder(tiny_checkpoint, sentence_file, tmp_path, monkeypatch):
    folders = []

    class Writer:
        def __init__(self, log_dir):
            folders.append(log_dir)

        def __getattr__(self, name):
            return lambda *args, **options: None

    def start(callback, tb_writer=None):
        callback.tb_writer, callback._SummaryWriter, callback.logging_dir = None, Writer, None

    monkeypatch.setattr(TensorBoardCallback, "__init__", start)
    options = PostTrainOptions(model=Path(tiny_checkpoint), train_file=Path(sentence_file), output_dir=tmp_path / "out",
                               max_steps=2, batch_size=8, max_length=32, save_steps=0, report_to="tensorboard")  # fmt: skip
    summary = run(prepare(options))
    assert summary["options"]["output_dir"] == str(tmp_path / "out") and finished_run(tmp_path / "out") is not None
    assert folders and all(Path(folder).parent == tmp_path / "out" / "runs" for folder in folders)


def test_columns_and_pairs(tiny_checkpoint, sentences, tmp_path):
    path = tmp_path / "pairs.tsv"
    rows = "".join(f"{i}\t{a}\t{b}\n" for i, (a, b) in enumerate(zip(sentences[:60], sentences[60:120], strict=True)))
    path.write_text("id\tquestion\tanswer\n" + rows)
    result = post_train(tiny_checkpoint, path, tmp_path / "out", "--text-column", "question", "--text-pair-column", "answer")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["texts"]["kept"] == 60


@pytest.mark.filterwarnings("error:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("options", [("--max-tokens", "600"), ("--batch-size", "8", "--contrastive-batch-size", "32"),
                                     ("--gradient-checkpointing",)])  # fmt: skip
def test_batches_by_tokens_large_contrasts_and_recomputed_activations(options, tiny_checkpoint, sentence_file, tmp_path):
    result = post_train(tiny_checkpoint, sentence_file, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    losses = [line["loss"] for line in lines(tmp_path / "out") if "loss" in line]
    assert losses and all(0 < loss < 20 for loss in losses)


def bad_inputs(tiny_checkpoint, sentence_file, tmp_path, tokenizer):
    """Label -> (changed arguments, words of the error)."""
    def file(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    bare = tmp_path / "no-tokenizer"
    make_lm().save_pretrained(bare)
    unmasked = tmp_path / "no-mask-token"
    make_lm().save_pretrained(unmasked)
    tokenizer.save_pretrained(unmasked)
    settings = json.loads((unmasked / "tokenizer_config.json").read_text())
    settings.pop("mask_token")
    (unmasked / "tokenizer_config.json").write_text(json.dumps(settings))
    small = tmp_path / "few-rows"
    make_lm(vocabulary=150).save_pretrained(small)
    tokenizer.save_pretrained(small)
    summaries = []
    for i, content in enumerate([b"{}", b"[]", b"3", b'{"files": []}', b'{"files": ["config', b"\xff\xfe"]):
        (tmp_path / f"summary-{i}").mkdir()
        summaries.append(file(f"summary-{i}/summary.json", content).parent)
    csv = file("table.csv", b"id,body,title\n1,one text,a\n2,two text,b\n")
    return {
        "rate": (["--rate", "1.5"], "expected rate to be in [0, 1], got 1.5"),
        "temperature": (["--token-temperature", "nan"], "expected token_temperature to be finite and > 0, got nan"),
        "epochs": (["--epochs", "0"], "expected epochs to be finite and > 0, got 0"),
        "share": (["--eval-share", "1"], "expected eval_share to be in [0, 1), got 1.0"),
        "backend": (["--backend", "fast"], "expected backend to be auto or one of"),
        "absent": (["--backend", "cpp" if torch.cuda.is_available() else "cuda"], "to be one that runs here, got 'c"),
        "warm-up": (["--warmup", "1.5"], "expected warmup to be a share below 1 or a whole number of steps, got 1.5"),
        "length": (["--max-length", "500"], "expected max_length to be <= 140, the positions the model has, got 500"),
        "scheduler": (["--scheduler", "steep"], "expected scheduler to be one of"),
        "schedule": (["--scheduler", "warmup_stable_decay"], "expected scheduler to be one of linear, cosine"),
        "reports": (["--report-to", "nowhere"], "expected report_to to be none or a service that is installed, got nowhere: "),
        "no length": (["--max-length", "0"], "expected max_length to be"),
        "no contrast": (["--preset", "tapt", "--contrastive-batch-size", "64"],
                        "expected contrastive_batch_size to be given with a sequence_weight > 0 only, got 64"),
        "vocabulary": (["--model", small], "expected model to be one whose tokenizer has at most 150 ids, the rows of its"),
        "tokens": (["--max-tokens", "20"], "expected max_tokens to be >= "),
        "budget": (["--contrastive-batch-size", "16", "--max-tokens", "64"],
                   "expected contrastive_batch_size to be left out with max_tokens, got 16"),
        "contrast": (["--contrastive-batch-size", "7"], "expected contrastive_batch_size to be a multiple of batch_size = "),
        "precision": (["--bf16", "--fp16"], "expected bf16 and fp16 to be at most one of them, got both"),
        "norms": (["--no-bf16", "--low-precision-layer-norm"],
                  "expected low_precision_layer_norm to be used with bf16 or fp16, got float32"),
        "file": (["--train-file", "missing.txt"], "expected train_file to be an existing file or folder, got missing.txt"),
        "suffix": (["--train-file", file("texts.doc", b"a")], "a saved datasets folder or a file ending in"),
        "empty": (["--train-file", file("empty.txt", b"")], "expected train_file to be a file that is not empty"),
        "blank": (["--train-file", file("blank.txt", b"\n \n")], "expected train_file to be one with a text that is not blank"),
        "whole": (["--eval-share", "0.9999"], "expected eval_share to be small enough to leave a text to train on, got"),
        "bytes": (["--train-file", file("latin.txt", b"caf\xe9\n")], "expected train_file to be a UTF-8 file, got"),
        "which": (["--train-file", csv], "expected text_column to be given, unless a column is named text"),
        "column": (["--train-file", csv, "--text-column", "text"], "expected text_column to be one of the columns"),
        "model": (["--model", tmp_path / "nothing"], "expected model to be"),
        "no tokenizer": (["--model", bare], "expected model to be a folder, or a hub id that can be reached, with a tokenizer"),
        "no mask": (["--model", unmasked], "expected model to be one whose tokenizer has a mask token"),
        "both": (["--resume", "--overwrite"], "expected at most one of overwrite and resume, got both"),
        **{f"resume {folder}": (["--resume", "--output-dir", folder], "output_dir to hold a whole checkpoint-N to resume from")
           for folder in (tmp_path / "out", *summaries)},
    }  # fmt: skip


def test_bad_input_is_one_line_and_writes_nothing(tiny_checkpoint, sentence_file, tmp_path, tiny_tokenizer):
    cases = bad_inputs(tiny_checkpoint, sentence_file, tmp_path, tiny_tokenizer)
    before = sorted(tmp_path.rglob("*"))
    for label, (arguments, words) in cases.items():
        result = post_train(tiny_checkpoint, sentence_file, tmp_path / "out", *arguments)
        assert result.exit_code == 2, (label, result.output)
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and words in errors[0] and "Traceback" not in result.stderr, (label, result.stderr)
        assert sorted(tmp_path.rglob("*")) == before, label


def test_a_folder_that_is_not_empty_is_kept(tiny_checkpoint, sentence_file, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("settings.json", "thesis.txt"):
        (folder / name).write_text("years of work")
        result = post_train(tiny_checkpoint, sentence_file, folder)
        assert result.exit_code == 2 and "expected output_dir to be new or empty" in result.stderr
        assert (folder / name).read_text() == "years of work"
    (folder / "checkpoint-500").mkdir()  # without a manifest: another program's
    assert post_train(tiny_checkpoint, sentence_file, folder, "--overwrite").exit_code == 0
    assert (folder / "thesis.txt").read_text() == "years of work" and (folder / "checkpoint-500").is_dir()


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [50_000, 250_000])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(size, tiny_checkpoint, sentence_file, tmp_path):
    # A limit on file size fails writes as a full disk does: at once, or only when the (larger) checkpoint is written.
    out = tmp_path / "out"
    command = [sys.executable, "-c", "from cmlm_fast.cli import main; main()", "post-train", "--model", tiny_checkpoint,
               "--train-file", sentence_file, "--output-dir", str(out), *QUICK]  # fmt: skip
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment,
                            preexec_fn=lambda: limit_files(size))  # fmt: skip
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in result.stderr and "File too large" in errors[0]
    assert not (out / "config.json").exists() and not list(out.glob("checkpoint-*")) and not list(out.glob(".saving*"))


def test_from_python(tiny_checkpoint, sentence_file, tmp_path):
    options = PostTrainOptions(model=tiny_checkpoint, train_file=sentence_file, output_dir=str(tmp_path / "out"), max_steps=2,
                               eval_share=0.0, save_steps=0, bf16=False)  # fmt: skip
    summary = run(prepare(options))
    assert summary["steps"] == 2 and summary["held_out_before_after"] == {}
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert issubclass(DiskError, OSError)


@pytest.mark.parametrize("when", ["scored", "ended"])
def test_a_training_without_checkpoints_is_saved_whatever_comes_behind_its_last_step(when, tiny_checkpoint, sentence_file,
                                                                                   tmp_path, monkeypatch):  # fmt: skip
    def tell_after(step, function):
        def run_with_signal(trainer, *args, **options):
            state = args[1] if args else trainer.state
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return function(trainer, *args, **options)

        return run_with_signal

    owner, name = {"scored": (CMLMTrainer, "evaluate"), "ended": (StopOnSignal, "on_train_end")}[when]
    monkeypatch.setattr(owner, name, tell_after(2, getattr(owner, name)))
    with pytest.raises(Stopped, match="stopped by SIGTERM; the trained model is saved, without scores"):
        run(prepare(PostTrainOptions(tiny_checkpoint, sentence_file, str(tmp_path / "out"), max_steps=2, save_steps=0,
                                     bf16=False, eval_share=0.1)))  # fmt: skip
    assert (tmp_path / "out" / "model.safetensors").exists()
    summary = finished_run(tmp_path / "out")
    assert (summary["steps"], summary["held_out_before_after"]) == (2, {})


def test_the_command_line_offers_all_of_the_objective():
    offered = signature(post_train_command).parameters
    assert {field.name for field in fields(CMLMConfig)} <= set(offered)
    assert {preset.value for preset in Preset} == set(PRESETS)


def test_options_reach_the_trainer_and_decide_what_may_be_resumed(tiny_checkpoint, sentence_file, tmp_path):
    base = PostTrainOptions(tiny_checkpoint, sentence_file, str(tmp_path / "out"), max_length=32, bf16=False)
    before = prepare(base)
    for name, value, argument in (("warmup", 0.3, "warmup_steps"), ("scheduler", "cosine", "lr_scheduler_type"),
                                  ("weight_decay", 0.2, "weight_decay"), ("learning_rate", 3e-4, "learning_rate"),
                                  ("epochs", 4.0, "num_train_epochs"), ("seed", 5, "seed"),
                                  ("max_tokens", 500, "max_tokens")):  # fmt: skip
        made = prepare(replace(base, **{name: value}))
        assert getattr(made.arguments, argument) == value and made.settings[name] == value != before.settings[name], name
    assert (made.settings["ranks"], before.settings.get("ranks")) == (1, None)  # batches by tokens depend on the ranks
    plain, low = (prepare(replace(base, bf16=True, low_precision_layer_norm=value)) for value in (False, True))
    assert low.arguments.low_precision_layer_norm
    earlier = {name: value for name, value in plain.settings.items() if name != "low_precision_layer_norm"}
    (tmp_path / "settings.json").write_text(json.dumps(earlier))  # from a run before the option existed
    check_settings(tmp_path, plain.settings)
    with pytest.raises(ValueError, match="expected low_precision_layer_norm to be False, as in the run to resume, got True"):
        check_settings(tmp_path, low.settings)


def test_ranks_may_change_where_the_sequences_of_a_step_do_not():
    def settings(ranks, accumulation, contrasted=None, max_tokens=None):
        options = PostTrainOptions("model", "texts.txt", "out", contrastive_batch_size=contrasted, max_tokens=max_tokens)
        of_ranks = {"world_size": ranks, "gradient_accumulation_steps": accumulation, "bf16": False, "fp16": False}
        return settings_of(options, CMLMConfig(), SimpleNamespace(**of_ranks))

    assert settings(1, 4) == settings(2, 2) == settings(4, 1) != settings(2, 4)
    assert settings(1, 4, contrasted=128) == settings(2, 2, contrasted=64) != settings(2, 2, contrasted=128)
    assert settings(1, 2, max_tokens=4096) != settings(2, 1, max_tokens=4096)  # ranks change how an epoch is cut into batches


def test_a_fingerprint_of_tokens_says_where_a_sequence_ends():
    cut = [[[1, 2], [3]], [[1], [2, 3]], [[1, 2], [4]]]
    assert len({fingerprint_of_tokens(Dataset.from_dict({"input_ids": rows})) for rows in cut}) == 3


def test_brackets_in_a_folder_s_name_are_no_markup(capsys):
    report.print_table(Console(width=100), "Run", {"written to": "out/run[bold]/x[/y]:smile:"})
    assert "out/run[bold]/x[/y]:smile:" in capsys.readouterr().out


def test_the_tables_of_a_run_name_each_number(capsys):
    summary = {"texts": {"rows": 10, "empty": 1, "duplicates": 2}, "sequences": {"train": 6, "held_out": 3}, "steps": 4,
               "train_seconds": 5.5, "options": {"output_dir": "out"},
               "held_out_before_after": {"token_retrieval": (0.25, 0.75)}}  # fmt: skip
    report.print_summary(summary)
    lines = [" ".join(re.findall(r"[\w.]+", line)) for line in capsys.readouterr().out.splitlines()]
    facts = ("texts read 10", "empty 1", "duplicates 2", "sequences trained on 6", "sequences held out 3", "optimizer steps 4",
             "seconds 5.5", "written to out", "before after", "token retrieval 0.25 0.75")  # fmt: skip
    assert [line for line in lines if line in facts] == list(facts)


def test_the_demo_does_as_it_is_told_and_its_picture_shows_before_and_after(tmp_path, monkeypatch):
    told, figures, new = [], [], report.new_figure
    monkeypatch.setattr("cmlm_fast.demo.run_demo", lambda folder, **options: told.append((folder, options)))
    assert cli("demo", "--steps", 7, "--draws", 2, "--shots", 3, "--output-dir", tmp_path).exit_code == 0
    assert told == [(tmp_path, {"steps": 7, "draws": 2, "shots": 3})]
    monkeypatch.setattr(report, "new_figure", lambda *a, **o: figures.append(new(*a, **o)) or figures[-1])
    scores = {"perplexity": [30.0, 10.0], "token_retrieval": [0.1, 0.2], "sequence_retrieval": [0.3, 0.4]}
    accuracy = {"as it came": [0.5], "post-trained": [0.75]}
    result = {"held_out_before_after": scores, "shots": 2, "few_shot": {"accuracy": accuracy}}
    report.plot_demo({"steps": 2, "train_seconds": 1.0}, result, tmp_path / "demo.png")
    *bars, last = figures[0].axes
    assert [[bar.get_height() for bar in axes.patches] for axes in bars] == list(scores.values())
    assert [list(line.get_ydata()) for line in last.get_lines()] == [[0.5, 0.75]]
    report.plot_curves([{"step": 1, "token_retrieval": 0.0}, {"step": 2, "token_retrieval": 0.5}], tmp_path / "curves.png")
    assert [list(line.get_ydata()) for axes in figures[1].axes for line in axes.get_lines()] == [[0.0, 0.5]]


def test_the_bar_shows_the_newest_loss_and_its_parts():
    progress, shown = QuietProgress(), []
    progress.training_bar = SimpleNamespace(set_postfix=shown.append)
    progress.on_log(None, None, None, {"loss": 1.5, "mlm": 1.0, "token": 0.25, "learning_rate": 9.0})
    progress.on_log(None, None, None, {"eval_loss": 3.0})
    assert shown == [{"loss": "1.500", "mlm": "1.000", "token": "0.250"}]


def test_the_demo_draws_before_it_trains_or_writes(tmp_path):
    result = cli("demo", "--shots", "5000", "--output-dir", tmp_path / "demo")
    assert result.exit_code == 2 and "error: expected shots to be <= " in result.stderr, result.output
    assert not (tmp_path / "demo").exists()


def test_doctor_names_every_op_and_reason(monkeypatch):
    monkeypatch.setenv("CMLM_FAST_BACKEND", "[/x]")
    result = cli("doctor")
    assert result.exit_code == 0, result.output
    for word in ("[/x]", "complementary_mask", "token_contrastive", "token_similarity", "info_nce", "torch", "Triton"):
        assert word in result.output


def test_pooling_files_come_along(sentence_file, tmp_path):
    from sentence_transformers import SentenceTransformer

    from cmlm_fast.demo_assets import demo_model_path

    folder = tmp_path / "out"
    result = post_train(demo_model_path(), sentence_file, folder, "--max-steps", "1", "--eval-share", "0", "--save-steps", "0")
    assert result.exit_code == 0, result.output
    model = SentenceTransformer(str(folder), device="cpu")
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
    assert Path(folder / "1_Pooling" / "config.json").exists() and model.encode("a film").shape == (384,)


def test_pooling_files_of_earlier_names_and_other_modules_come_along(tmp_path):
    files = {"sentence_roberta_config.json": b"{}", "1_CNN/cnn_config.json": b"[]",
             "2_Dense/config.json": b"{}", "2_Dense/pytorch_model.bin": b"weights"}  # fmt: skip
    modules = json.dumps([{"path": path} for path in ("", "1_CNN", "2_Dense", "3_Normalize")]).encode()
    for name, contents in {**files, "modules.json": modules}.items():
        (tmp_path / "start" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "start" / name).write_bytes(contents)
    (tmp_path / "out").mkdir()
    write_pooling(read_pooling(tmp_path / "start"), tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files
    assert (tmp_path / "out" / "3_Normalize").is_dir()


def test_a_seed_decides_also_what_the_checkpoint_lacks(tmp_path, tiny_tokenizer, sentence_file):
    make_lm().base_model.save_pretrained(tmp_path / "encoder")
    tiny_tokenizer.save_pretrained(tmp_path / "encoder")

    def start(seed: int) -> list[torch.Tensor]:
        options = PostTrainOptions(str(tmp_path / "encoder"), sentence_file, str(tmp_path / "out"), max_length=32, seed=seed,
                                   objective={"projection": 8})  # fmt: skip
        return list(prepare(options).model.parameters())

    one, again, other = start(1), start(1), start(2)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
