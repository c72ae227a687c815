"""The protocol of the few-shot evaluation: what each cell is fine-tuned with, how texts are held out, who has dropout."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_lm, make_tokenizer
from datasets import Dataset, DatasetDict
from test_fewshot import with_settings
from test_fewshot_experiment import experiment, files  # noqa: F401  (a fixture)
from transformers import AutoTokenizer

from cmlm_fast import CMLMConfig, CMLMModel
from cmlm_fast.backends import named_backend
from cmlm_fast.data import CMLMDataCollator
from cmlm_fast.demo_assets import demo_model_path
from cmlm_fast.fewshot import draw, grid, post_training, starting
from cmlm_fast.fewshot.cells import read_cells
from cmlm_fast.fewshot.finetune import FewShotScore
from cmlm_fast.fewshot.methods import METHODS, Contrast, find_method
from cmlm_fast.fewshot.tables import rows_of
from cmlm_fast.fewshot.task import hold_out
from cmlm_fast.masking import Masker


def test_every_cell_is_trained_as_it_was_described(tiny_checkpoint, files, tmp_path, monkeypatch):  # noqa: F811
    tuned, trained, real = [], [], post_training.CMLMTrainingArguments

    def fine_tune(path, texts, labels, test_texts, test_labels, **options):
        tuned.append((list(texts), options))
        return FewShotScore(0.5, 0.5, 1.0)

    monkeypatch.setattr(grid, "fine_tune", fine_tune)
    monkeypatch.setattr(starting, "check_dropout", lambda *args: None)
    monkeypatch.setattr(post_training, "CMLMTrainingArguments", lambda *a, **o: trained.append(o) or real(*a, **o))
    made = experiment(tiny_checkpoint, files, tmp_path / "out", methods=("scl", "tapt"), shots=(2,), draws=2, seed=7,
                      batch_size=9, warmup=0.3, learning_rate=1e-4, fine_tune_batch_size=5, epochs=0.1, max_steps=-1,
                      fine_tune_learning_rate=3e-4, bf16=True)  # fmt: skip
    made.run()
    checked = made.check().task
    for (texts, options), (d, name) in zip(tuned, [(d, name) for d in (0, 1) for name in ("scl", "tapt")], strict=True):
        assert texts == [checked.texts[i] for i in draw(checked.labels, 2, 7 + d)]
        assert options == {"epochs": 2.0, "learning_rate": 3e-4, "batch_size": 5, "max_length": 32, "seed": 7 + d,
                           "bf16": True, "contrast": METHODS[name].contrast}  # fmt: skip
    names = ("seed", "warmup_steps", "learning_rate", "per_device_train_batch_size", "bf16", "max_steps")
    rest = (0.3, 1e-4, 9, True, math.ceil(0.1 * math.ceil(len(checked.texts) / 9)))
    assert [tuple(options[name] for name in names) for options in trained] == [(7, *rest), (8, *rest)]


def test_a_cell_holds_what_was_scored_and_done(tiny_checkpoint, files, tmp_path, monkeypatch):  # noqa: F811
    said, backends = [], []
    score = FewShotScore(0.75, 0.5, 3.0)
    monkeypatch.setattr(grid, "fine_tune", lambda *args, **options: backends.append(named_backend()) or score)
    made = experiment(tiny_checkpoint, files, tmp_path / "out", methods=("ft", "tapt"), shots=(2,), draws=1, seed=7,
                      backend="reference", baseline="tapt", keep_models=True, cache_dir=str(tmp_path / "models"))  # fmt: skip
    ft, tapt = made.run(said.append)
    for cell in (ft, tapt):
        assert (cell["accuracy"], cell["macro_f1"], cell["fine_tune_seconds"]) == score
        assert (cell["setup"]["seed"], cell["setup"]["max_length"]) == (7, 32)
    assert "texts, 2 per class, draw 0, tapt: accuracy 0.7500, macro-F1 0.5000, 3 s" in said
    assert backends == ["reference"] * 2 and named_backend() is None
    assert "schedule" in tapt and "schedule" not in ft and not (tmp_path / "out" / "models").exists()
    (kept,) = (folder for folder in (tmp_path / "models").iterdir() if not folder.name.startswith("start-"))
    done = json.loads((kept / post_training.FACTS).read_text())
    assert (tapt["post_train_seconds"], tapt["steps"], tapt["encoder_tokens"]) == tuple(
        done[name] for name in ("seconds", "steps", "encoder_tokens"))  # fmt: skip
    assert 0 < done["seconds"] < 60 and done["encoder_tokens"] > 100 * done["steps"] > 0
    assert "against tapt" in (tmp_path / "out" / "results.md").read_text()


def test_methods_are_what_they_are_called():
    objectives = {"ft": None, "scl": None, "tapt": CMLMConfig.from_preset("tapt"), "cmlm": CMLMConfig.from_preset("balanced"),
                  "cmlm-paper": CMLMConfig.from_preset("paper"), "cmlm-no-token": CMLMConfig(token_weight=0.0),
                  "cmlm-no-sequence": CMLMConfig(sequence_weight=0.0), "cmlm-no-mlm": CMLMConfig(mlm_weight=0.0),
                  "cmlm-independent": CMLMConfig(complementary=False), "cmlm-bernoulli": CMLMConfig(sampling="bernoulli"),
                  "cmlm-whole-word": CMLMConfig(),
                  **dict.fromkeys(("simcse", "seq-eda", "cssl"), CMLMConfig.from_preset("simcse"))}  # fmt: skip
    assert {name: method.objective for name, method in METHODS.items()} == objectives
    assert {name: method.second for name, method in METHODS.items() if method.second != "masked"} == {
        "seq-eda": "eda", "cssl": "paraphrase"}  # fmt: skip
    assert [name for name, method in METHODS.items() if method.whole_word] == ["cmlm-whole-word"]
    assert METHODS["scl"].contrast == Contrast(weight=0.9, temperature=0.3)  # of the paper


def test_fine_tuning_alone_is_one_method_under_every_schedule(tiny_checkpoint, files, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(grid, "fine_tune", lambda *args, **options: FewShotScore(0.5, 0.5, 1.0))
    for steps in (1, 2):
        experiment(tiny_checkpoint, files, tmp_path / "out", methods=("ft", "tapt"), shots=(2,), draws=1, max_steps=steps).run()
    rows = rows_of(read_cells(tmp_path / "out" / "cells.jsonl"))
    assert [row.method.partition(" #")[0] for row in rows] == ["ft", "tapt", "tapt"] and rows[0].method == "ft"
    assert [row.compared for row in rows] == [0, 1, 1]


def test_each_setting_of_the_fine_tuning_is_another_setup(tiny_checkpoint, files, tmp_path):  # noqa: F811
    changes = ({}, {"seed": 1}, {"max_length": 30}, {"bf16": True}, {"fine_tune_epochs": 3.0})
    setups = [experiment(tiny_checkpoint, files, tmp_path / "out", **change).check().setup for change in changes]
    assert len({json.dumps(setup, sort_keys=True) for setup in setups}) == len(changes)


def test_a_model_made_by_an_interrupted_run_is_kept_where_the_next_one_keeps_models(tiny_checkpoint, files, tmp_path):  # noqa: F811
    def stop(line):
        if "post-trained" in line:
            raise KeyboardInterrupt

    options = {"methods": ("tapt",), "shots": (2,), "draws": 1}
    with pytest.raises(KeyboardInterrupt):
        experiment(tiny_checkpoint, files, tmp_path / "out", **options).run(stop)
    experiment(tiny_checkpoint, files, tmp_path / "out", keep_models=True, **options).run()
    assert len(list((tmp_path / "out" / "models").iterdir())) == 2


def test_each_side_is_its_own_split_and_a_task_has_a_name(tiny_checkpoint, sentences, files, tmp_path):  # noqa: F811
    def part(texts):
        return Dataset.from_dict({"text": texts, "label": ["ab"[i % 2] for i in range(len(texts))]})

    both = str(tmp_path / "both")
    DatasetDict(train=part(sentences[:30]), test=part(sentences[30:50])).save_to_disk(both)
    task = experiment(tiny_checkpoint, {"train": both, "test": both}, tmp_path / "out", shots=(2,)).check().task
    assert task.texts == sentences[:30] and task.test_texts == sentences[30:50]
    other = shutil.copy(files["train"], tmp_path / "trec.tsv")
    for train, name in ((files["train"], tmp_path.name), (str(other), "trec")):
        made = replace(experiment(tiny_checkpoint, {**files, "train": train}, tmp_path / "out"), name=None)
        assert made.check().name == name


def test_a_start_hangs_on_the_seed_of_its_head_and_the_side_of_truncation(tiny_tokenizer, files, tmp_path):  # noqa: F811
    encoder = tmp_path / "encoder"
    make_lm().base_model.save_pretrained(encoder)
    tiny_tokenizer.save_pretrained(encoder)

    def start(seed):
        return experiment(str(encoder), files, tmp_path / "out", seed=seed).check().start.id

    before = start(1)
    assert before == start(1) != start(2)
    with_settings(encoder, "tokenizer_config.json", truncation_side="left")
    assert start(1) != before


def test_second_texts_are_cut_and_changed_as_much_as_is_said(sentences, tiny_tokenizer):
    rows = Dataset.from_dict({"text": sentences[:4], "paraphrase": [" ".join(sentences)] * 4})
    texts = post_training.UnlabelledTexts(rows, tiny_tokenizer, max_length=32)
    assert {len(ids) for ids in texts.paraphrases["partner_input_ids"]} == {32}
    eda = post_training._partner(METHODS["seq-eda"], texts, CMLMModel(make_lm()), 0)
    assert (eda.share, eda.max_length) == (0.1, 32)


@pytest.mark.parametrize("settings", [{"return_dict": False}, {"output_hidden_states": True}, {"output_attentions": True}])
def test_a_start_whose_configuration_returns_more_or_else_is_a_start(settings, tiny_checkpoint, files, tmp_path):  # noqa: F811
    with_settings(tiny_checkpoint, "config.json", **settings)
    methods = ("ft", "tapt", "seq-eda")
    cells = experiment(tiny_checkpoint, files, tmp_path / "out", methods=methods, shots=(2,), draws=1, max_steps=1).run()
    assert [cell["method"] for cell in cells] == list(methods)


@pytest.mark.parametrize("packed", [True, False])
def test_an_encoder_that_returns_tuples_is_post_trained(packed, tiny_rows, tiny_tokenizer):
    model = CMLMModel(make_lm(return_dict=False))
    batch = CMLMDataCollator(tiny_tokenizer, packed=packed)([tiny_rows[i] for i in range(4)])
    assert model(**Masker(tiny_tokenizer)(batch, model, seed=0, step=0)).loss.isfinite()


def test_a_start_is_the_same_one_whatever_is_done_with_it(tiny_checkpoint, files, tmp_path):  # noqa: F811
    tokenizer = make_tokenizer()
    tokenizer(["a text"], truncation=True, max_length=64, padding=True)  # is in tokenizer.json from now on
    tokenizer.save_pretrained(tiny_checkpoint)
    found = {experiment(tiny_checkpoint, files, tmp_path / "out", methods=methods).check().start.id
             for methods in (("ft",), ("ft", "cmlm-whole-word"))}  # fmt: skip
    assert len(found) == 1


def test_what_a_tokenizer_does_beside_its_file_is_of_the_start_where_it_is_unusual(tiny_checkpoint, files, tmp_path):  # noqa: F811
    found = set()
    for settings in ({}, {"mask_token": "[UNK]"}, {"model_input_names": ["input_ids", "attention_mask"]}):
        copy = shutil.copytree(tiny_checkpoint, tmp_path / str(len(found)))
        with_settings(copy, "tokenizer_config.json", **settings)
        found.add(experiment(str(copy), files, tmp_path / "out").check().start.id)
    assert len(found) == 3
    assert starting._unusual(AutoTokenizer.from_pretrained(demo_model_path())) == []  # as for the cells in benchmarks/results


def test_a_paraphrase_of_a_repeat_is_taken_and_one_of_a_blank_text_is_not(tiny_checkpoint, files, tmp_path):  # noqa: F811
    heading, *lines = [line.split("\t") for line in Path(files["train"]).read_text().splitlines()]
    rows = [[text, label, ""] for text, label, _ in lines]

    def checked(*more):
        Path(files["train"]).write_text("\n".join(map("\t".join, [heading, *rows, *more])) + "\n")
        options = {"methods": ("cssl",), "text_column": "text", "paraphrase_column": "turned"}
        return experiment(tiny_checkpoint, files, tmp_path / "out", **options).check()

    with pytest.raises(ValueError, match="expected paraphrase_column to be a column with a text beside one of train, got '"):
        checked(["", rows[0][1], "a paraphrase"])
    (pair,) = checked([*rows[3][:2], "a paraphrase"], [*rows[3][:2], "another"])._unlabelled.paraphrases
    tokenizer = make_tokenizer()
    assert [pair["input_ids"], pair["partner_input_ids"]] == tokenizer([rows[3][0], "a paraphrase"])["input_ids"]


@pytest.mark.parametrize(("rows", "rule"), [(2, "so large that"), (10, "so large that"), (98, "so small that")])
def test_a_validation_that_loses_a_class_is_refused(rows, rule):
    dataset = Dataset.from_dict({"text": [f"t{i}" for i in range(100)], "label": ["a"] * 97 + ["b"] * 3})
    with pytest.raises(ValueError, match=f"expected validation to be {rule}.*, got {rows}, which leaves none of b"):
        hold_out(dataset, rows, 0)
    kept, held = hold_out(dataset, 34, 0)
    assert set(kept["label"]) == set(held["label"]) == {"a", "b"} and len(held) == 34


def test_repeats_in_train_are_told(tiny_checkpoint, files, tmp_path, caplog):  # noqa: F811
    lines = Path(files["train"]).read_text().splitlines()
    text, label, turned = lines[1].split("\t")
    other = next(line.split("\t")[1] for line in lines[2:] if line.split("\t")[1] != label)
    Path(files["train"]).write_text("\n".join([*lines, lines[1], f"{text}\t{other}\t{turned}"]) + "\n")
    experiment(tiny_checkpoint, files, tmp_path / "out", methods=("ft",)).check()
    assert "2 texts of train are repeats, 1 of them with another label" in caplog.text


def test_a_folder_of_a_checkpoint_is_left_alone(tiny_checkpoint, files):  # noqa: F811
    with pytest.raises(ValueError, match="expected output_dir to be a folder that holds no checkpoint, got "):
        experiment(tiny_checkpoint, files, tiny_checkpoint).check()


@pytest.mark.parametrize("kind", ["bert", "albert", "distilbert", "electra", "modernbert"])
def test_dropout_of_a_head_is_none_of_the_encoder(kind):
    lm = make_lm(kind)  # some configurations name dropouts of heads that are not there
    methods = {"simcse": find_method("simcse")}
    with pytest.raises(ValueError, match="one with dropout for method simcse"):
        starting.check_dropout(kind, lm, methods)
    lm.config.attention_dropout = 0.1
    starting.check_dropout(kind, lm, methods)


def cell(method, d, score, dataset="a", **more):
    return {"dataset": dataset, "method": method, "shots": 4, "draw": d, "accuracy": score, "macro_f1": score,
            "fine_tune_seconds": 1.0, "post_train_seconds": 2.0, "encoder_tokens": 3, "setup_id": dataset,
            "method_id": method, **more}  # fmt: skip


def test_paraphrases_of_each_data_set_are_one_method():
    cells = [cell("ft", d, 0.5, name) for name in "ab" for d in range(3)]
    cells += [cell("cssl", d, 0.6, name, method_id=f"cssl{name}", paraphrases=name) for name in "ab" for d in range(3)]
    assert [row.difference for row in rows_of(cells) if row.dataset == "all" and row.method == "cssl"] == [pytest.approx(0.1)]


def test_a_difference_is_of_the_draws_that_both_have():
    cells = [cell("ft", 0, 0.5), cell("ft", 2, 0.6), *(cell("cmlm", d, 0.7 + d / 100) for d in range(3))]
    (row,) = [row for row in rows_of(cells) if row.method == "cmlm"]
    assert (row.draws, row.compared, row.difference) == (3, 2, pytest.approx((0.2 + 0.12) / 2))
