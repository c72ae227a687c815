"""The trainer: means over what the step saw, masks by (seed, step, sample id), resumed runs, scores."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_lm

from cmlm_fast import CMLMConfig, CMLMModel, CMLMTrainer, CMLMTrainingArguments
from cmlm_fast.masking import EVALUATION_STEP


def make_trainer(folder, rows, tokenizer, *, config=None, held=None, lm=None, **options):
    usual = {"per_device_train_batch_size": 8, "max_steps": 4, "learning_rate": 1e-3, "save_strategy": "no", "logging_steps": 1}
    options = {**usual, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, **options}
    model = CMLMModel(lm or make_lm(), config or CMLMConfig(token_temperature=0.2))
    arguments = CMLMTrainingArguments(output_dir=str(folder), **options)
    return CMLMTrainer(model, arguments, train_dataset=rows, eval_dataset=held, processing_class=tokenizer)


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def test_one_process_uses_one_gpu(tmp_path, monkeypatch, caplog):
    def devices(arguments):
        arguments._n_gpu = 2
        return torch.device("cpu")

    monkeypatch.setattr(CMLMTrainingArguments, "_setup_devices", property(devices))
    arguments = CMLMTrainingArguments(str(tmp_path), report_to="none")
    assert arguments._n_gpu == 1 and "2 GPUs: one process uses the first, torchrun --nproc-per-node 2 all" in caplog.text


def history(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_training_lowers_every_part_of_the_loss(tmp_path, tiny_rows, tiny_tokenizer):
    options = {"max_steps": 60, "learning_rate": 3e-3, "per_device_train_batch_size": 32}
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, **options)
    trainer.train()
    for part in ("loss", "mlm", "token", "sequence"):
        values = history(trainer, part)
        assert len(values) == 60 and sum(values[-10:]) < 0.9 * sum(values[:10]), part
    config = trainer.cmlm
    for entry in trainer.state.log_history[:-1]:
        parts = (getattr(config, f"{name}_weight") * entry[name] for name in ("mlm", "token", "sequence"))
        assert entry["loss"] == pytest.approx(sum(parts), rel=1e-4)
    for name in ("masked_accuracy", "token_retrieval", "sequence_retrieval"):
        assert all(0 <= value <= 1 for value in history(trainer, name))
    assert history(trainer, "positive_similarity")[-1] > history(trainer, "negative_similarity")[-1]


def test_operations_are_counted_by_the_weights_of_the_encoder(tmp_path, tiny_rows, tiny_tokenizer):
    trainer = make_trainer(tmp_path, tiny_rows.select(range(16)), tiny_tokenizer, max_steps=2)
    trainer.train()
    weights = sum(p.numel() for name, p in trainer.model.lm.base_model.named_parameters() if "embeddings." not in name)
    weights += sum(p.numel() for name, p in trainer.model.lm.base_model.named_parameters() if "embeddings.LayerNorm" in name)
    tokens = sum(map(len, tiny_rows.select(range(16))["input_ids"]))
    assert trainer.state.total_flos == 6 * 2 * tokens * weights


@pytest.mark.parametrize("pieces", [2, 4])
def test_accumulation_equals_one_large_batch(pieces, tmp_path, tiny_rows, tiny_tokenizer):
    # If negatives come from the sequence itself, accumulation changes nothing at all; sequences differ in length, so a mean of
    # the micro-batches' means would differ.
    config = CMLMConfig(scope="sequence", sequence_weight=0.0, token_temperature=0.2)
    runs = []
    for batch, accumulate in ((16, 1), (16 // pieces, pieces)):
        trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, config=config, per_device_train_batch_size=batch,
                               gradient_accumulation_steps=accumulate, max_grad_norm=0.0, optim="sgd", max_steps=3)  # fmt: skip
        trainer.train()
        runs.append((weights(trainer), history(trainer, "loss"), history(trainer, "token")))
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-5) and runs[0][2] == pytest.approx(runs[1][2], rel=1e-5)


def test_a_second_training_logs_nothing_of_the_first(tmp_path, tiny_rows, tiny_tokenizer):
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, max_steps=3, logging_steps=2)
    trainer.train()
    assert trainer._sums.values  # of step 3, which was never logged
    trainer._sums.add({"mlm": torch.tensor([1e9, 1.0])})
    trainer.train()
    assert 0 < history(trainer, "mlm")[0] < 100


def test_packed_and_padded_training_are_one_trajectory(tmp_path, tiny_rows, tiny_tokenizer):
    runs = []
    for packed in (True, False):
        trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, packed=packed, max_steps=30)
        assert trainer.data_collator.packed is packed
        trainer.train()
        runs.append(history(trainer, "loss"))
    assert runs[0] == pytest.approx(runs[1], rel=2e-3) and runs[0][:3] == pytest.approx(runs[1][:3], rel=1e-5)


def test_an_encoder_that_cannot_be_packed_is_padded_and_says_so(tmp_path, tiny_rows, tiny_tokenizer, caplog):
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, lm=make_lm("mpnet"), max_steps=2)
    assert not trainer.data_collator.packed and "MPNetForMaskedLM takes padded batches only" in caplog.text
    trainer.train()
    assert len(history(trainer, "loss")) == 2


def test_masks_follow_seed_step_and_sample_alone(tmp_path, tiny_rows, tiny_tokenizer):
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, mask_seed=11, packed=False)
    forward = trainer.data_collator([tiny_rows[i] for i in (4, 8, 15)])
    mixed = trainer.data_collator([tiny_rows[i] for i in (15, 200, 4)])
    a, b = trainer.mask(forward, 5), trainer.mask(mixed, 5)
    for view in ("view1", "view2", "role"):
        for row, other in ((0, 2), (2, 0)):
            shared = min(a[view].shape[1], b[view].shape[1])
            assert torch.equal(a[view][row, :shared], b[view][other, :shared])
    assert not torch.equal(a["role"], trainer.mask(forward, 6)["role"])
    assert not torch.equal(a["role"], trainer.mask(forward, EVALUATION_STEP)["role"])
    other = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, mask_seed=12, packed=False)
    assert not torch.equal(a["role"], other.mask(forward, 5)["role"])


@pytest.mark.parametrize("at", [2, 3, 6])  # 6 is the end: nothing is left to do
def test_a_resumed_run_ends_in_the_same_bits(at, tmp_path, tiny_rows, tiny_tokenizer):
    config = CMLMConfig(learn_temperature=True, projection=8, token_temperature=0.2)
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": at, "gradient_accumulation_steps": 2}
    lm = {"hidden_dropout_prob": 0.1}
    whole = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, config=config, lm=make_lm(**lm), **options)
    whole.train()
    resumed = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, config=config, lm=make_lm(**lm), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    names = [name for name, _ in whole.model.named_parameters()]
    for name, a, b in zip(names, weights(whole), weights(resumed), strict=True):
        assert torch.equal(a, b), name
    assert history(whole, "mlm")[at:] == history(resumed, "mlm")[at:]


def test_the_best_checkpoint_comes_back_whole(tmp_path, tiny_rows, tiny_tokenizer):
    config = CMLMConfig(learn_temperature=True, projection=8, token_temperature=0.2)
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3,
               "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}  # fmt: skip
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, config=config, held=tiny_rows.select(range(20)), **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")  # the loss falls: the largest is the first
    kept = CMLMModel.from_pretrained(tmp_path / "checkpoint-1", config)
    kept.load_contrast(tmp_path / "checkpoint-1")
    for (name, a), b in zip(trainer.model.named_parameters(), kept.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_is_a_plain_model_folder(tmp_path, tiny_rows, tiny_tokenizer):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, save_strategy="steps", save_steps=4)
    trainer.train()
    folder = tmp_path / "checkpoint-4"
    loaded, report = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.lm.parameters(), loaded.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(folder).mask_token_id == tiny_tokenizer.mask_token_id
    assert not list(folder.glob("*.bin")) or [path.name for path in folder.glob("*.bin")] == ["training_args.bin"]


def test_evaluation_is_a_mean_over_all_tokens_and_repeats_itself(tmp_path, tiny_rows, tiny_tokenizer):
    held = tiny_rows.select(range(50))
    config = CMLMConfig(scope="sequence", sequence_weight=0.0, token_temperature=0.2)
    scores = []
    for size in (50, 7):  # a mean of batch means would differ
        trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, config=config, held=held, per_device_eval_batch_size=size)
        scores.append(trainer.evaluate())
        assert trainer.evaluate()["eval_loss"] == scores[-1]["eval_loss"]
    for name in ("eval_loss", "eval_mlm", "eval_token", "eval_masked_accuracy", "eval_token_retrieval"):
        assert scores[0][name] == pytest.approx(scores[1][name], rel=1e-5), name
    assert scores[0]["eval_perplexity"] == pytest.approx(math.exp(scores[0]["eval_mlm"]))
    assert "eval_uniformity" in scores[0] and "eval_alignment" in scores[0]


def test_measures_are_those_written_out(tiny_rows, tiny_tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, packed=False)
    batch = trainer.mask(trainer.data_collator([tiny_rows[i] for i in (0, 50, 100)]), 0)
    model = trainer.model.eval()
    found = {name: (total / count).item() for name, (total, count) in model(**batch, measured=True).measures.items()}
    where = batch["role"] == 1
    logits1, logits2 = (model.lm(batch[view], attention_mask=batch["attention_mask"]).logits for view in ("view1", "view2"))
    hits = [(logits.argmax(-1) == batch["input_ids"])[batch["role"] == role] for logits, role in ((logits1, 1), (logits2, 2))]
    assert found["masked_accuracy"] == pytest.approx(torch.cat(hits).double().mean().item())
    assert where.any() and -1 <= found["negative_similarity"] <= found["positive_similarity"] <= 1
    assert 0 < found["uniformity_kernel"] < 1 and 0 <= found["alignment"] <= 4


def test_weight_decay_spares_the_temperatures(tmp_path, tiny_rows, tiny_tokenizer):
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, config=CMLMConfig(learn_temperature=True))
    decayed = trainer.get_decay_parameter_names(trainer.model)
    assert decayed and not [name for name in decayed if "logit_scale" in name]
    trainer.train()
    assert history(trainer, "token_temperature")[0] == pytest.approx(0.2, rel=0.05)


def test_bfloat16_and_checkpointed_activations_train(tmp_path, tiny_rows, tiny_tokenizer):
    plain = make_trainer(tmp_path, tiny_rows, tiny_tokenizer)
    for options in ({"bf16": True}, {"gradient_checkpointing": True}):
        trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, **options)
        trainer.train()
        plain = make_trainer(tmp_path, tiny_rows, tiny_tokenizer)
        plain.train()
        assert history(trainer, "loss") == pytest.approx(history(plain, "loss"), rel=0.02 if "bf16" in options else 1e-5)


def test_wrong_arguments_say_so(tmp_path, tiny_rows, tiny_tokenizer):
    from transformers import TrainingArguments

    with pytest.raises(ValueError, match="expected model to be a CMLMModel, got BertForMaskedLM"):
        CMLMTrainer(make_lm(), processing_class=tiny_tokenizer)
    with pytest.raises(ValueError, match="expected processing_class to be a tokenizer, got None"):
        CMLMTrainer(CMLMModel(make_lm()))
    with pytest.raises(ValueError, match="expected args to be CMLMTrainingArguments, got TrainingArguments"):
        CMLMTrainer(CMLMModel(make_lm()), TrainingArguments(str(tmp_path), use_cpu=True), processing_class=tiny_tokenizer)
    with pytest.raises(ValueError, match=r"of at most 50 ids, the rows of the model's embedding, got \d+"):
        make_trainer(tmp_path, tiny_rows, tiny_tokenizer, lm=make_lm(vocabulary=50))
