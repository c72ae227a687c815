"""Few-shot draws and fine-tuning, and the demo from end to end on its real encoder and text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_lm

from cmlm_fast.demo import run_demo
from cmlm_fast.demo_assets import demo_texts
from cmlm_fast.fewshot import draw, fine_tune
from cmlm_fast.fewshot.contrast import ContrastTrainer
from cmlm_fast.fewshot.methods import Contrast

LABELS = ["b", "a", "a", "b", "a", "b", "b"]


def test_a_draw_is_balanced_random_and_repeatable():
    chosen = draw(LABELS, shots=2, seed=3)
    assert sorted(LABELS[i] for i in chosen) == ["a", "a", "b", "b"] and len(set(chosen)) == 4
    assert chosen == draw(LABELS, shots=2, seed=3)
    drawn = [draw(LABELS, shots=2, seed=seed) for seed in range(20)]
    assert len({frozenset(one) for one in drawn}) > 5 and any(LABELS[one[0]] == LABELS[one[2]] for one in drawn)
    with pytest.raises(ValueError, match="expected shots to be <= 3, the texts labelled 'a', got 4"):
        draw(LABELS, shots=4, seed=0)


def test_fine_tuning_learns_what_can_be_learned_and_repeats_itself(tiny_checkpoint, sentences):
    texts = [text for text in sentences if "rain" in text or "winter" in text]
    labels = ["wet" if "rain" in text else "cold" for text in texts]
    options = {"epochs": 20, "learning_rate": 3e-3, "seed": 1}
    score = fine_tune(tiny_checkpoint, texts[:60], labels[:60], texts[60:], labels[60:], **options)
    assert score.accuracy > 0.9 and score.macro_f1 > 0.9 and score.seconds > 0
    again = fine_tune(tiny_checkpoint, texts[:60], labels[:60], texts[60:], labels[60:], **options)
    assert again[:2] == score[:2]


def test_pairs_go_to_an_encoder_of_one_type_of_token(tiny_tokenizer, sentences, tmp_path):
    make_lm(type_vocab_size=1).save_pretrained(tmp_path)
    tiny_tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tiny_tokenizer.save_pretrained(tmp_path)
    pairs = list(zip(sentences[:6], sentences[6:12], strict=True))
    assert 0 <= fine_tune(tmp_path, pairs[:4], [0, 1, 0, 1], pairs[4:], [0, 1], epochs=1).accuracy <= 1


def test_fine_tuning_is_by_the_settings_that_are_given(tiny_checkpoint, monkeypatch):
    seen, begin = [], ContrastTrainer.__init__

    def noted(self, contrast, model, arguments, **others):
        seen.append(arguments)
        begin(self, contrast, model, arguments, **others)

    monkeypatch.setattr(ContrastTrainer, "__init__", noted)
    given = {"epochs": 3.0, "learning_rate": 3e-4, "batch_size": 5, "seed": 7, "bf16": True}
    fine_tune(tiny_checkpoint, ["a", "b"], [0, 1], ["a"], [0], **given)
    names = ("num_train_epochs", "learning_rate", "per_device_train_batch_size", "seed", "bf16")
    assert [getattr(seen[0], name) for name in names] == list(given.values())
    assert (seen[0].warmup_steps, seen[0].train_sampling_strategy) == (0, "group_by_length")


def with_settings(checkpoint, file, **settings):
    path = Path(checkpoint) / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize("settings", [{"return_dict": False}, {"output_hidden_states": True}, {"output_attentions": True}])
def test_what_a_configuration_returns_besides_is_no_prediction(settings, tiny_checkpoint):
    with_settings(tiny_checkpoint, "config.json", **settings)
    for contrast in (None, Contrast()):
        score = fine_tune(tiny_checkpoint, ["a", "b"], [0, 1], ["a", "the b"], [0, 1], epochs=1, contrast=contrast)
        assert 0 <= score.accuracy <= 1


def test_the_side_on_which_a_tokenizer_pads_changes_no_score(tiny_checkpoint, sentences, monkeypatch):
    def logits(side, *more):
        with_settings(tiny_checkpoint, "tokenizer_config.json", padding_side=side)
        tested, labels = ["a fox", *more], [0, 1][: 1 + len(more)]
        fine_tune(tiny_checkpoint, ["a", "the rain came", "b"], [0, 1, 1], tested, labels, epochs=3, learning_rate=1e-2)
        return found[-1].predictions[found[-1].label_ids == 0]

    found, predict = [], ContrastTrainer.predict
    monkeypatch.setattr(ContrastTrainer, "predict", lambda *given: found.append(predict(*given)) or found[-1])
    beside = logits("right", sentences[0])
    assert np.array_equal(logits("left", sentences[0]), beside) and np.allclose(logits("left"), beside, atol=1e-5)


@pytest.mark.parametrize(("changes", "words"), [
    ({"train_labels": [0]}, "expected train_labels to be as many as train_texts"),
    ({"train_labels": [0, 0]}, "expected train_labels to be of at least two classes"),
    ({"test_labels": [7]}, "expected test_labels to be among"),
    ({"test_texts": [], "test_labels": []}, "expected test_labels to be as many as test_texts and at least one"),
])  # fmt: skip
def test_labels_that_do_not_fit_say_so(changes, words):
    usual = {"train_texts": ["a", "b"], "train_labels": [0, 1], "test_texts": ["c"], "test_labels": [1]}
    with pytest.raises(ValueError, match=words):
        fine_tune("nowhere", **{**usual, **changes})


def test_the_demo_leaves_texts_model_picture_and_result(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cmlm_fast.demo.demo_texts", lambda: demo_texts().select(range(0, 8530, 10)))
    result = run_demo(tmp_path / "demo", steps=2, draws=1, shots=2, test_texts=40)
    assert (tmp_path / "demo" / "texts.txt").read_text(encoding="utf-8").count("\n") == 853 - 40
    assert (tmp_path / "demo" / "model" / "model.safetensors").exists()
    assert (tmp_path / "demo" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "demo" / "result.json").read_text()) == result
    assert [len(values) for values in result["few_shot"]["accuracy"].values()] == [1, 1]
    printed = capsys.readouterr().out
    assert "What post-training changed" in printed and "few-shot accuracy (2 per class)" in printed
