"""Claims whose violation would leave the other tests green: what an evaluation sees, which step is measured, who gets what."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import make_lm
from datasets import Dataset
from test_complementary_mask import philox
from test_fewshot_experiment import experiment, files  # noqa: F401
from test_modeling import batch_of
from test_trainer import history, make_trainer

from cmlm_fast import CMLMConfig, CMLMModel, info_nce, token_contrastive, token_similarity
from cmlm_fast.data import CMLMDataCollator, tokenize_texts
from cmlm_fast.encoding import row_bounds
from cmlm_fast.fewshot import fine_tune, finetune, post_training
from cmlm_fast.fewshot.methods import METHODS
from cmlm_fast.fewshot.paired import PairCollator, PairedModel
from cmlm_fast.layers import use_fast_layers
from cmlm_fast.masking import EVALUATION_STEP
from cmlm_fast.ops._philox import position_shift


class MadeError(Exception):
    """Raised to end a training once its trainer is made."""


def test_a_shift_is_of_its_word_of_philox():
    for sample in (0, 7, 2**40 + 5, -3):
        words = philox(0xFFFFFFFF, 5, sample & 0xFFFFFFFF, (sample >> 32) & 0xFFFFFFFF, 9, 1)
        assert position_shift(torch.tensor([sample]), 6, 2**32 + 9, 5).item() == words[3] * 7 >> 32


def test_dropout_drops_its_share_and_others_each_time():
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Dropout(0.3))
    use_fast_layers(layer)
    one, two = (layer(torch.ones(500, 64)) != 0 for _ in range(2))
    assert one.double().mean().item() == pytest.approx(0.7, abs=0.02)
    assert (one & two).double().mean().item() == pytest.approx(0.49, abs=0.02)


def test_what_is_left_out_has_the_value_that_is_said(tiny_tokenizer):
    tokenizer, seen = copy.deepcopy(tiny_tokenizer), []
    text = " ".join(["fox"] * 700)
    for most in (10**30, 300):  # the first is what transformers gives a tokenizer without a length
        tokenizer.model_max_length = most
        left_out, given = (tokenize_texts([text], tokenizer, **said) for said in ({}, {"max_length": min(most, 512)}))
        assert left_out["input_ids"][:] == given["input_ids"][:]
        seen.append(max(map(len, left_out["input_ids"])))
    assert 300 < seen[0] <= 512 and seen[1] <= 300
    torch.manual_seed(0)
    one, two = torch.randn(2, 6, 8)
    by_number = torch.arange(6)
    assert token_contrastive(one, two, by_number) == token_contrastive(one, two, by_number, temperature=0.05)
    assert info_nce(one, two) == info_nce(one, two, temperature=0.05)
    assert torch.equal(token_similarity(one, two), token_similarity(one, two, temperature=0.05))


@pytest.mark.parametrize("packed", [True, False])
def test_what_is_not_eligible_is_no_part_of_a_pairs_vectors(packed, tiny_rows, tiny_tokenizer):
    model = PairedModel(make_lm(), CMLMConfig.from_preset("simcse")).eval()
    collator = PairCollator(CMLMDataCollator(tiny_tokenizer, packed=packed), lambda row: tiny_rows[row["sample_id"] + 50])
    batch = collator([tiny_rows[i] for i in range(6)])
    batch |= {"role": torch.zeros_like(batch["input_ids"]), "special_ids": torch.tensor(tiny_tokenizer.all_special_ids)}
    ids = batch["input_ids"]
    out = ids[~torch.isin(ids, batch["special_ids"])][:1]
    by_mask = model(**batch, eligible=ids != out).loss
    by_id = model(**{**batch, "special_ids": torch.cat([batch["special_ids"], out])}).loss
    torch.testing.assert_close(by_mask, by_id)
    assert abs(by_mask - model(**batch).loss) > 1e-4


def test_what_is_not_eligible_is_as_good_as_special(tiny_rows, tiny_tokenizer):
    model = CMLMModel(make_lm(), CMLMConfig(token_temperature=0.2)).eval()
    batch = batch_of(tiny_rows, tiny_tokenizer, model.cmlm)
    ids = batch["input_ids"]
    out = ids[(batch["role"] == 0) & ~torch.isin(ids, batch["special_ids"])][:1]
    keep = ids != out
    batch["role"] = torch.where(keep, batch["role"], 0)
    by_mask = model(**batch, eligible=keep).sums
    by_id = model(**{**batch, "special_ids": torch.cat([batch["special_ids"], out])}).sums
    torch.testing.assert_close(by_mask, by_id)
    assert (by_mask[1:] - model(**batch).sums[1:]).abs().min() > 1e-4


def test_the_held_out_loss_is_weighted(tmp_path, tiny_rows, tiny_tokenizer):
    config, held = CMLMConfig(mlm_weight=0.5), tiny_rows.select(range(8))
    scores = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, held=held, config=config).evaluate()
    parts = zip((0.5, config.token_weight, config.sequence_weight), ("mlm", "token", "sequence"), strict=True)
    assert scores["eval_loss"] == pytest.approx(sum(weight * scores[f"eval_{part}"] for weight, part in parts))
    assert scores["eval_uniformity"] < 0


def test_an_evaluation_between_two_logs_changes_neither(tmp_path, tiny_rows, tiny_tokenizer):
    found = []
    for options in ({}, {"held": tiny_rows.select(range(8)), "eval_strategy": "steps", "eval_steps": 3}):
        trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, logging_steps=4, **options)
        trainer.train()
        found.append([history(trainer, name) for name in ("mlm", "token", "sequence")])
    assert found[0] == [pytest.approx(values) for values in found[1]]


def test_no_step_of_a_training_has_the_masks_of_an_evaluation(tmp_path, tiny_rows, tiny_tokenizer):
    trainer, seen = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, held=tiny_rows.select(range(8))), []
    make = trainer.mask
    trainer.mask = lambda batch, step: seen.append(step) or make(batch, step)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert seen == [EVALUATION_STEP, 0, 1, 2, 3, EVALUATION_STEP] and EVALUATION_STEP == 2**32 - 1


def test_words_are_masked_alike_packed_and_padded(tmp_path, sentences, tiny_tokenizer):
    rows, roles = tokenize_texts(Dataset.from_dict({"text": sentences[:40]}), tiny_tokenizer, whole_word=True), []
    for packed in (True, False):
        trainer = make_trainer(tmp_path, rows, tiny_tokenizer, config=CMLMConfig(rate=0.5), packed=packed)
        batch = trainer.mask(trainer.data_collator([rows[i] for i in range(10)]), 3)
        role = batch["role"]
        parts = ([role[a:b] for a, b in pairwise(batch["cu_seqlens"].tolist())] if packed else
                 [row[seen.bool()] for row, seen in zip(role, batch["attention_mask"], strict=True)])  # fmt: skip
        roles.append({i: part.tolist() for i, part in zip(batch["sample_ids"].tolist(), parts, strict=True)})
    assert roles[0] == roles[1]


def test_batches_by_tokens_are_shared_out_to_the_ranks(tmp_path, tiny_rows, tiny_tokenizer):
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, max_tokens=300)
    real, seen = trainer.args, []
    for rank in (0, 1):
        trainer.args = copy.copy(real)
        trainer.args.__class__ = type("Ranked", (type(real),), {"process_index": rank, "world_size": 2})
        seen += [i for batch in trainer.get_train_dataloader() for i in batch["sample_ids"].tolist()]
    assert sorted(seen) == list(range(len(tiny_rows)))


@pytest.mark.parametrize(("kind", "pooling"), [("bert", "mean"), ("roberta", "mean"), ("bert", "cls")])
def test_pairs_of_texts_are_the_same_packed_and_padded(kind, pooling, tiny_rows, tiny_tokenizer):
    model, sums = PairedModel(make_lm(kind), CMLMConfig.from_preset("simcse", pooling=pooling)).eval(), []
    for packed in (True, False):
        collator = PairCollator(CMLMDataCollator(tiny_tokenizer, packed=packed), lambda row: tiny_rows[row["sample_id"] + 9])
        batch = collator([dict(tiny_rows[i]) for i in (0, 7, 100)])
        batch["role"], batch["special_ids"] = torch.zeros_like(batch["input_ids"]), torch.tensor([0, 2, 3, 4])
        sums.append(model(**batch).sums)
    torch.testing.assert_close(*sums)


def test_a_checkpoint_names_the_best_one_where_it_is(tmp_path, tiny_rows, tiny_tokenizer):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
               "metric_for_best_model": "mlm"}  # fmt: skip
    make_trainer(tmp_path, tiny_rows, tiny_tokenizer, held=tiny_rows.select(range(16)), **options).train()
    for step in (2, 4):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_global_step"] in (2, 4)
        assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{state['best_global_step']}")


def test_measures_are_those_of_the_logged_step(tmp_path, tiny_rows, tiny_tokenizer):
    found = []
    for options in ({}, {"logging_steps": 2}, {"logging_steps": 3, "logging_first_step": True}):
        trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, **options)
        trainer.train()
        found.append({entry["step"]: entry["alignment"] for entry in trainer.state.log_history if "alignment" in entry})
    for steps, logged in (((2, 4), found[1]), ((1, 3), found[2])):
        assert logged == {step: found[0][step] for step in steps}


def test_a_mean_over_tokens_is_added_up_in_float32():
    model, random = CMLMModel(make_lm(), CMLMConfig.from_preset("seq")), torch.Generator().manual_seed(0)
    hidden = torch.randn(4096, 8, generator=random).add(4).bfloat16()
    bounds = torch.tensor([0, 4096], dtype=torch.int32)
    (mean,) = model._pool(hidden, torch.ones(4096, dtype=torch.bool), bounds, bounds[:1])
    torch.testing.assert_close(mean, hidden.double().mean(0).bfloat16(), rtol=0.01, atol=0)


def test_a_cell_is_another_with_every_setting_it_depends_on(tiny_checkpoint, files, tmp_path):  # noqa: F811
    def key(**changes):
        options = {"methods": ("tapt",), "shots": (2,), "draws": 1, "max_steps": 5, **changes}
        return experiment(tiny_checkpoint, files, tmp_path / "out", **options).check()._id("tapt", 2, 0)

    settings = {"max_length": 30, "bf16": True, "seed": 3, "epochs": 2, "max_steps": 6, "batch_size": 9, "learning_rate": 1e-5,
                "warmup": 0.3, "fine_tune_epochs": 3, "fine_tune_batch_size": 3, "fine_tune_learning_rate": 1e-5}  # fmt: skip
    keys = [key(), *(key(**{name: value}) for name, value in settings.items())]
    assert len(set(keys)) == len(settings) + 1


def test_macro_f1_weighs_every_class_that_is_tested_alike(tiny_checkpoint, sentences, monkeypatch):
    # Everything is predicted as "a", whose precision is 3/4; "c" is not among the test labels.
    monkeypatch.setattr(finetune.np, "argmax", lambda scores, axis: np.zeros(len(scores), dtype=np.int64))
    test = ["a", "a", "a", "b"]
    score = fine_tune(tiny_checkpoint, sentences[:6], ["a", "b", "c"] * 2, sentences[6:10], test, epochs=1)
    assert score.accuracy == 0.75 and score.macro_f1 == pytest.approx((2 * 0.75 / 1.75 + 0) / 2)
    # One is predicted as "c", which is still not among the test labels.
    monkeypatch.setattr(finetune.np, "argmax", lambda scores, axis: np.array([2, 0, 0, 0]))
    score = fine_tune(tiny_checkpoint, sentences[:6], ["a", "b", "c"] * 2, sentences[6:10], ["a"] * 4, epochs=1)
    assert score.accuracy == 0.75 and score.macro_f1 == pytest.approx(2 * 0.75 / 1.75)


def test_a_fine_tuning_is_told_contrast_seed_and_length(tiny_checkpoint, sentences, monkeypatch):
    make_lm().bfloat16().save_pretrained(tiny_checkpoint)  # weights are trained in float32 regardless

    def trainer(contrast, model, arguments, train_dataset, **options):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert contrast == METHODS["scl"].contrast is not None and arguments.seed == 5
        assert {len(row["input_ids"]) for row in train_dataset} == {6}
        raise MadeError

    monkeypatch.setattr("cmlm_fast.fewshot.contrast.ContrastTrainer", trainer)
    with pytest.raises(MadeError):
        fine_tune(tiny_checkpoint, sentences[:4], ["a", "b"] * 2, sentences[4:6], ["a", "b"], seed=5, max_length=6,
                  contrast=METHODS["scl"].contrast)  # fmt: skip


def test_presets_of_one_part_change_nothing_else():
    for name, weights in (("tapt", (1.0, 0.0, 0.0)), ("seq", (0.0, 0.0, 1.0))):
        given = dict(zip(("mlm_weight", "token_weight", "sequence_weight"), weights, strict=True))
        assert CMLMConfig.from_preset(name) == CMLMConfig(**given)


def test_a_padded_sequence_begins_at_its_first_token():
    bounds, first = row_bounds(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]))
    assert bounds.tolist() == [0, 4, 8] and first.tolist() == [2, 4]


def test_a_seed_decides_the_head_of_a_fine_tuning(tiny_checkpoint, sentences, monkeypatch):
    seen, argmax = [], np.argmax
    monkeypatch.setattr(finetune.np, "argmax", lambda scores, axis: seen.append(scores) or argmax(scores, axis))
    for seed in (0, 1):
        fine_tune(tiny_checkpoint, sentences[:4], ["a", "b"] * 2, sentences[4:8], ["a", "b"] * 2, epochs=1, seed=seed,
                  learning_rate=1e-9)  # fmt: skip
    assert np.abs(seen[0] - seen[1]).max() > 1e-4


def test_methods_get_their_own_rows_words_and_draws(sentences, tiny_tokenizer, tmp_path, monkeypatch):
    texts, seen = post_training.UnlabelledTexts(Dataset.from_dict({"text": sentences[:40]}), tiny_tokenizer, max_length=32), []

    def trainer(model, arguments, train_dataset, data_collator, **options):
        batch = data_collator([train_dataset[i] for i in range(8)])
        seen.append((set(train_dataset.column_names), batch["two"].tolist() if "two" in batch else None, torch.rand(()).item()))
        raise MadeError

    monkeypatch.setattr(post_training, "CountingTrainer", trainer)
    CMLMModel(make_lm()).save_pretrained(tmp_path / "start")
    schedule = post_training.Schedule(epochs=1.0, max_steps=1, batch_size=8, learning_rate=1e-3, warmup=0.0)
    eda = METHODS["seq-eda"]
    for seed, method in ((0, METHODS["tapt"]), (1, replace(METHODS["tapt"], whole_word=True)), (2, eda), (3, eda), (3, eda)):
        with pytest.raises(MadeError):
            post_training.post_train(tmp_path / "start", texts, method, schedule, seed=seed, bf16=False,
                                     folder=tmp_path / "out")  # fmt: skip
    assert ["unit_ids" in columns for columns, _, _ in seen] == [False, True, False, False, False]
    assert seen[2][1] != seen[3][1] and len({drawn for *_, drawn in seen}) == 4 and seen[3] == seen[4]


def test_texts_held_out_are_drawn_by_the_seed(tiny_checkpoint, files, tmp_path):  # noqa: F811
    options = {"train": files["train"], "test": None, "validation": 80}
    checked = [experiment(tiny_checkpoint, options, tmp_path / "out", seed=seed).check() for seed in (0, 1)]
    one, two = (set(grid.task.test_texts) for grid in checked)
    assert one != two


def test_a_learned_temperature_stays_in_bounds(tmp_path, tiny_rows, tiny_tokenizer):
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, config=CMLMConfig(learn_temperature=True), max_steps=2)
    with torch.no_grad():
        trainer.model.loss.token.temperature.logit_scale.fill_(6.0)
    trainer.train()
    # At the start of a step the scale is at most log 100; one step of 1e-3 leaves it near that.
    assert history(trainer, "token_temperature")[-1] == pytest.approx(0.01, rel=0.01)
