"""What a user of `transformers.Trainer` may pass in: checkpoints with other names and dtypes, searches, metrics, adapters."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import make_lm
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file, save_file
from test_trainer import history, make_trainer, weights

from cmlm_fast import CMLMConfig, CMLMModel, CMLMTrainer, CMLMTrainingArguments, checkpoints
from cmlm_fast.data import CMLMDataCollator
from cmlm_fast.errors import DivergedError
from cmlm_fast.layers import LowPrecisionLayerNorm
from cmlm_fast.options import PostTrainOptions
from cmlm_fast.post_train import _arguments
from cmlm_fast.same_run import settings_of


@pytest.fixture
def old_names(tmp_path):
    """A checkpoint whose LayerNorms are named as in 2018, like those of bert-base-uncased."""
    folder = tmp_path / "old"
    make_lm().save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    assert any("LayerNorm.weight" in name for name in state)
    renamed = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
               for n, value in state.items()}  # fmt: skip
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_checkpoint_of_old_names_resumes_with_all_weights(tmp_path, tiny_rows, tiny_tokenizer, old_names):
    def trainer(name, **options):
        model = CMLMModel.from_pretrained(old_names)
        options |= {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.05, "lr_scheduler_type": "constant"}
        return make_trainer(tmp_path / name, tiny_rows, tiny_tokenizer, lm=model.lm, **options)

    whole = trainer("whole")
    whole.train()
    trainer("cut", max_steps=2).train()
    rest = trainer("cut")
    rest.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(rest), strict=True))


def test_a_checkpoint_without_some_weights_is_refused(tmp_path, tiny_rows, tiny_tokenizer):
    make_trainer(tmp_path, tiny_rows, tiny_tokenizer, max_steps=1, save_strategy="steps", save_steps=1).train()
    file = tmp_path / "checkpoint-1" / "model.safetensors"
    state = load_file(file)
    save_file({n: v for n, v in state.items() if "attention.output.LayerNorm" not in n}, file, {"format": "pt"})
    (tmp_path / "checkpoint-1" / "manifest.json").unlink()
    checkpoints.seal(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"checkpoint with all of the model's weights, got one without .*LayerNorm"):
        make_trainer(tmp_path, tiny_rows, tiny_tokenizer).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_start_in_half_precision_is_trained_in_float32(tmp_path, dtype):
    make_lm().to(dtype).save_pretrained(tmp_path)
    assert {p.dtype for p in CMLMModel.from_pretrained(tmp_path).parameters()} == {torch.float32}
    assert {p.dtype for p in CMLMModel.from_pretrained(tmp_path, dtype=dtype).parameters()} == {dtype}


def test_parts_of_weight_0_are_not_reported(tmp_path, tiny_rows, tiny_tokenizer):
    config = CMLMConfig.from_preset("seq")
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, config=config, held=tiny_rows.select(range(16)))
    trainer.train()
    scores = trainer.evaluate()
    assert not {"eval_mlm", "eval_token", "eval_perplexity"} & set(scores)
    assert scores["eval_loss"] == pytest.approx(scores["eval_sequence"], rel=1e-6) and history(trainer, "sequence")
    assert not history(trainer, "mlm") and not history(trainer, "token")


def test_losses_of_several_data_sets_are_to_fall(tmp_path):
    for name in ("eval_news_perplexity", "eval_news_token", "perplexity"):
        assert CMLMTrainingArguments(str(tmp_path), report_to="none", metric_for_best_model=name).greater_is_better is False
    for name in ("eval_news_token_retrieval", "masked_accuracy"):
        assert CMLMTrainingArguments(str(tmp_path), report_to="none", metric_for_best_model=name).greater_is_better is True


@pytest.mark.parametrize("name", ["perplexity", "eval_mlm", "alignment"])
def test_the_best_model_is_the_one_of_the_smallest_perplexity(name, tmp_path, tiny_rows, tiny_tokenizer):
    steps = {"save_steps": 2, "eval_steps": 2, "max_steps": 8, "save_strategy": "steps", "eval_strategy": "steps"}
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, held=tiny_rows.select(range(32)), metric_for_best_model=name,
                           load_best_model_at_end=True, **steps)  # fmt: skip
    trainer.train()
    name = f"eval_{name.removeprefix('eval_')}"
    found = history(trainer, name)
    assert trainer.state.best_metric == min(found) < max(found)
    assert trainer.evaluate()[name] == pytest.approx(min(found), rel=1e-6)
    grows = CMLMTrainingArguments(str(tmp_path), report_to="none", metric_for_best_model=name, greater_is_better=True)
    assert grows.greater_is_better is True


def test_what_nothing_would_heed_is_refused(tmp_path, tiny_rows, tiny_tokenizer):
    for name, value in (("label_smoothing_factor", 0.1), ("neftune_noise_alpha", 5.0)):
        with pytest.raises(ValueError, match=f"CMLMTrainingArguments: expected {name} to be off, got {value}"):
            CMLMTrainingArguments(str(tmp_path), report_to="none", **{name: value})
    arguments = CMLMTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
        with pytest.raises(ValueError, match=f"CMLMTrainer: expected {name} to be None"):
            CMLMTrainer(CMLMModel(make_lm()), arguments, processing_class=tiny_tokenizer, **{name: print})
    other = deepcopy(tiny_tokenizer)
    CMLMTrainer(CMLMModel(make_lm()), arguments, processing_class=tiny_tokenizer, data_collator=CMLMDataCollator(other))
    other.bos_token = tiny_tokenizer.convert_ids_to_tokens(10)
    with pytest.raises(ValueError, match="CMLMTrainer: expected data_collator to be one whose tokenizer has the ids"):
        CMLMTrainer(CMLMModel(make_lm()), arguments, processing_class=tiny_tokenizer, data_collator=CMLMDataCollator(other))


def norms(model):
    return {type(module) for module in model.modules() if isinstance(module, torch.nn.LayerNorm)}


def test_layer_norms_of_low_precision_need_a_precision_that_is_low(tmp_path, tiny_rows, tiny_tokenizer):
    with pytest.raises(ValueError, match="CMLMTrainer: expected low_precision_layer_norm to be False without bf16 or fp16"):
        make_trainer(tmp_path, tiny_rows, tiny_tokenizer, low_precision_layer_norm=True)
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, low_precision_layer_norm=True, bf16=True, max_steps=1)
    trainer.train()
    assert norms(trainer.model) == {LowPrecisionLayerNorm}
    plain = CMLMTrainer(trainer.model, replace(trainer.args, low_precision_layer_norm=False), processing_class=tiny_tokenizer)
    assert norms(plain.model) == {torch.nn.LayerNorm}  # this training's, not the previous one's
    for module in plain.model.lm.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.__class__ = type("Other", (torch.nn.LayerNorm,), {})
    with pytest.raises(ValueError, match="CMLMTrainer: expected low_precision_layer_norm to be False for BertForMaskedLM, w"):
        CMLMTrainer(plain.model, trainer.args, processing_class=tiny_tokenizer)


def test_model_init_makes_a_model_for_each_training(tmp_path, tiny_rows, tiny_tokenizer):
    made = []

    def model_init(trial=None):
        made.append(CMLMModel(make_lm()))
        return made[-1]

    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 2, "logging_steps": 1}
    arguments = CMLMTrainingArguments(str(tmp_path), save_strategy="no", **options)
    trainer = CMLMTrainer(args=arguments, model_init=model_init, train_dataset=tiny_rows, processing_class=tiny_tokenizer)
    losses = []
    for _ in range(2):
        trainer.train()
        losses.append(history(trainer, "loss"))
    assert len(made) == 3 and trainer.model is made[-1] and losses[0] == losses[1]
    assert trainer.call_model_init() is made[-1]
    with pytest.raises(ValueError, match="expected model to be None if model_init is given, got both"):
        CMLMTrainer(made[0], arguments, model_init=model_init, processing_class=tiny_tokenizer)
    with pytest.raises(ValueError, match="expected model to be a CMLMModel, got BertForMaskedLM"):
        CMLMTrainer(None, arguments, model_init=lambda: make_lm(), processing_class=tiny_tokenizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_refused(dtype, tiny_tokenizer, tiny_rows, tmp_path):
    model = CMLMModel(make_lm().to(dtype))
    arguments = CMLMTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=rf"expected model to be of float32 weights .*, got {dtype}$"):
        CMLMTrainer(model, arguments, train_dataset=tiny_rows, processing_class=tiny_tokenizer)
    CMLMTrainer(model.float(), arguments, train_dataset=tiny_rows, processing_class=tiny_tokenizer)


def test_a_launchers_precision_is_that_of_the_run(monkeypatch, tmp_path):
    def precision(**options):
        made = _arguments(PostTrainOptions("model", "texts", str(tmp_path), **options))
        return made.bf16, made.fp16

    monkeypatch.setattr("cmlm_fast.post_train.fast_in_bf16", lambda: False)
    assert precision() == precision(bf16=False) == (False, False) and precision(bf16=True) == (True, False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert precision() == precision(bf16=True) == (True, False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert precision(bf16=True) == (True, False)
    if torch.accelerator.is_available():
        assert precision() == precision(bf16=False, fp16=True) == (False, True)
    else:
        with pytest.raises(ValueError, match="expected mixed_precision to be no or bf16 without a GPU, got fp16"):
            precision()
    with pytest.raises(ValueError, match="bf16 to be left out or given where accelerate launch has mixed_precision fp16"):
        precision(bf16=False)


def test_a_decoder_is_refused():
    with pytest.raises(ValueError, match="expected lm to be an encoder, whose tokens see both sides, got one with is_decoder"):
        CMLMModel(make_lm(is_decoder=True))


@pytest.mark.parametrize(("name", "value"), [("_hf_peft_config_loaded", True), ("peft_config", {"default": object()})])
def test_a_model_wrapped_by_peft_is_refused(name, value):
    lm = make_lm()
    setattr(lm, name, value)
    with pytest.raises(ValueError, match=r"expected lm to be a plain masked LM .*got BertForMaskedLM with a peft_config"):
        CMLMModel(lm)


def test_a_resumed_run_of_model_init_has_its_projection_and_temperatures(tmp_path, tiny_rows, tiny_tokenizer):
    def run(steps, resume=None):
        config = CMLMConfig(projection=8, learn_temperature=True)
        options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "lr_scheduler_type": "constant"}
        arguments = CMLMTrainingArguments(str(tmp_path / "run"), max_steps=steps, save_steps=2, learning_rate=0.01, **options)
        trainer = CMLMTrainer(args=arguments, model_init=lambda: CMLMModel(make_lm(), config), train_dataset=tiny_rows,
                              processing_class=tiny_tokenizer)  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return weights(trainer)

    run(2)
    rest, whole = run(4, resume=True), run(4)
    assert all(torch.equal(a, b) for a, b in zip(rest, whole, strict=True))


def test_a_search_minimises_the_loss(tmp_path, tiny_rows, tiny_tokenizer, monkeypatch):
    from transformers import Trainer

    seen = []
    monkeypatch.setattr(Trainer, "hyperparameter_search", lambda self, space, objective, **options: seen.append(objective))
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer)
    trainer.hyperparameter_search(n_trials=3)
    trainer.hyperparameter_search(compute_objective=len)
    assert seen[0]({"eval_loss": 2.0, "eval_perplexity": 1e3}) == 2.0 and seen[1] is len


def test_projection_and_temperatures_come_back(tmp_path, caplog):
    config = CMLMConfig(learn_temperature=True, projection=8)
    model = CMLMModel(make_lm(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) / 100)
    model.save_pretrained(tmp_path)
    for again in (CMLMModel.from_pretrained(tmp_path, config), CMLMModel.from_pretrained(tmp_path)):
        assert again.cmlm == config
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    warmer = CMLMModel.from_pretrained(tmp_path, replace(config, token_temperature=0.5)).loss
    assert warmer.token.temperature().item() == pytest.approx(0.5)
    assert torch.equal(warmer.sequence.temperature(), model.loss.sequence.temperature())
    assert not caplog.records
    plain = CMLMModel.from_pretrained(tmp_path, CMLMConfig())  # has neither
    assert "left out, since this objective has none: " in caplog.text
    assert isinstance(plain.projection, torch.nn.Identity) and not plain.cmlm.learn_temperature
    with pytest.raises(ValueError, match=r"expected projection to be as wide as in .*contrast\.safetensors.*, got 4"):
        CMLMModel.from_pretrained(tmp_path, CMLMConfig(projection=4))
    (tmp_path / "contrast.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=r"expected .*contrast\.safetensors to be a whole file of safetensors"):
        CMLMModel.from_pretrained(tmp_path)
    (tmp_path / "contrast.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds what its cmlm_config\.json asks for, got .* without loss\.token"):
        CMLMModel.from_pretrained(tmp_path)
    assert CMLMModel.from_pretrained(tmp_path, config).cmlm == config  # made anew
    for content in ("[1]", "{", '{"heat": 1}', '{"rate": 2}'):
        (tmp_path / "cmlm_config.json").write_text(content)
        with pytest.raises(ValueError, match=r"CMLMConfig: expected .*cmlm_config\.json to hold the fields of an objective"):
            CMLMModel.from_pretrained(tmp_path)


def test_an_objective_of_mlm_alone_is_not_that_of_the_next_run(tmp_path):
    CMLMModel(make_lm(), CMLMConfig.from_preset("tapt")).save_pretrained(tmp_path)
    assert CMLMModel.from_pretrained(tmp_path).cmlm == CMLMConfig()


def test_a_checkpoint_keeps_nothing_of_what_stood_there_before(tmp_path):
    CMLMModel(make_lm(), CMLMConfig(projection=8)).save_pretrained(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    CMLMModel(make_lm(), CMLMConfig.from_preset("tapt")).save_pretrained(tmp_path)
    assert before - {path.name for path in tmp_path.iterdir()} == {"contrast.safetensors", "cmlm_config.json"}


def test_batches_the_model_cannot_take_are_refused(tmp_path, tiny_rows, tiny_tokenizer):
    rows = tiny_rows.select(range(8))
    mpnet = make_trainer(tmp_path, rows, tiny_tokenizer, lm=make_lm("mpnet"))
    mpnet.data_collator = CMLMDataCollator(tiny_tokenizer, packed=True)
    with pytest.raises(ValueError, match="expected input_ids to be a padded batch, all that MPNetForMaskedLM takes"):
        mpnet.train()
    with pytest.raises(ValueError, match=r"CMLMDataCollator: expected rows to be .* with a sample_id, got columns"):
        CMLMDataCollator(tiny_tokenizer)(rows.remove_columns("sample_id").to_list())
    plain = make_trainer(tmp_path, rows, tiny_tokenizer)
    with pytest.raises(ValueError, match="expected data_collator to be one that gives sample_ids"):
        plain.mask({"input_ids": torch.zeros(1, 4, dtype=torch.long)}, 0)
    budget = make_trainer(tmp_path, list(rows), tiny_tokenizer, max_tokens=256)
    with pytest.raises(ValueError, match=r"expected max_tokens to be None for a train_dataset .*, got 256"):
        budget.train()
    for kind in ("bert", "mpnet"):
        most = make_lm(kind).config.max_position_embeddings
        row = {"input_ids": [5] * (most + 1), "attention_mask": [1] * (most + 1), "token_type_ids": [0] * (most + 1)}
        long = Dataset.from_list([{**row, "sample_id": 0}])
        with pytest.raises(ValueError, match=r"expected sequences to be of at most \d+ tokens"):
            make_trainer(tmp_path, long, tiny_tokenizer, lm=make_lm(kind), packed=False).train()


def test_data_seed_orders_batches_by_tokens(tmp_path, tiny_rows, tiny_tokenizer):
    def first(**options):
        trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, max_tokens=256, **options)
        return next(iter(trainer.get_train_dataloader()))["sample_ids"].tolist()

    assert first() == first(data_seed=42) != first(data_seed=1)


@pytest.mark.parametrize(
    "options",
    [{"bf16_full_eval": True}, {"fp16_full_eval": True}, {"train_sampling_strategy": "group_by_length"},
     {"train_sampling_strategy": "batch_rebalance"}, {"train_sampling_strategy": "sequential", "max_tokens": 500},
     {"dataloader_drop_last": True, "max_tokens": 500}, {"auto_find_batch_size": True, "max_tokens": 500},
     {"use_liger_kernel": True}, {"max_tokens": 200.0}, {"max_tokens": 0}, {"contrastive_batch_size": 16.0},
     {"mask_seed": "1"}],
)
def test_options_that_would_go_wrong_unnoticed_are_refused(options, tmp_path):
    with pytest.raises(ValueError, match=f"CMLMTrainingArguments: expected {next(iter(options))} to be "):
        CMLMTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **options)


def test_rows_that_share_a_sample_id_are_pointed_out(tmp_path, tiny_rows, tiny_tokenizer, caplog):
    rows = tiny_rows.select(range(20))
    make_trainer(tmp_path, rows, tiny_tokenizer).get_train_dataloader()
    assert not caplog.records
    both = concatenate_datasets([rows, tiny_rows.select(range(15, 30))]).shuffle(seed=0)
    make_trainer(tmp_path, both, tiny_tokenizer).get_train_dataloader()
    assert "5 of 35 rows have the sample_id of another" in caplog.text


def test_too_few_rows_for_a_batch_are_refused(tmp_path, tiny_rows, tiny_tokenizer):
    for rows, least, options in ((7, 8, {"dataloader_drop_last": True}), (0, 1, {}), (0, 1, {"max_tokens": 100})):
        with pytest.raises(ValueError, match=f"expected train_dataset to hold {least} rows at least, got {rows}"):
            make_trainer(tmp_path, tiny_rows.select(range(rows)), tiny_tokenizer, **options).train()
    make_trainer(tmp_path, tiny_rows.select(range(8)), tiny_tokenizer, max_steps=1, dataloader_drop_last=True).train()


def test_a_stream_makes_whole_steps_alone(tmp_path, tiny_rows, tiny_tokenizer):
    rows = tiny_rows.select(range(40))  # five batches: two steps of two, and one batch left over
    options = {"gradient_accumulation_steps": 2, "max_steps": 4, "learning_rate": 1e-9, "lr_scheduler_type": "constant"}
    stream = make_trainer(tmp_path, rows.to_iterable_dataset(), tiny_tokenizer, **options)
    stream.train()
    once = make_trainer(tmp_path, rows.select(range(32)), tiny_tokenizer, train_sampling_strategy="sequential", **options)
    once.train()
    for name in ("loss", "grad_norm"):
        assert history(stream, name) == pytest.approx(history(once, name), rel=1e-4)


@pytest.mark.parametrize(("rows", "steps", "words"), [
    (8, 0, "at least 2 batches, a step's, got 1"),  # too few for a step of two
    (40, 3, "at least 2 batches, a step's, behind the 6 that the checkpoint has seen .*, got 0"),  # stopped in its second pass
])  # fmt: skip
def test_a_stream_that_cannot_go_on_is_refused(rows, steps, words, tmp_path, tiny_rows, tiny_tokenizer):
    def trainer(**options):
        stream = tiny_rows.select(range(rows)).to_iterable_dataset()
        options |= {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1}
        return make_trainer(tmp_path, stream, tiny_tokenizer, **options)

    if steps:
        trainer(max_steps=steps).train()
    with pytest.raises(ValueError, match=f"expected train_dataset to be a stream of {words}"):
        trainer().train(resume_from_checkpoint=bool(steps))


@pytest.mark.parametrize("rows", [200, 40])  # with 40, the first pass leaves one batch after step 2, too few for another
def test_a_stream_resumes_within_its_first_pass(rows, tmp_path, tiny_rows, tiny_tokenizer):
    def trainer(name, steps=3):
        options = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant", "max_steps": steps}
        stream = tiny_rows.select(range(rows)).to_iterable_dataset()
        return make_trainer(tmp_path / name, stream, tiny_tokenizer, gradient_accumulation_steps=2, **options)

    whole, rest = trainer("whole"), trainer("cut")
    whole.train()
    trainer("cut", steps=2).train()
    rest.train(resume_from_checkpoint=True)
    assert whole.state.global_step == rest.state.global_step == 3
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(rest), strict=True))


def test_a_batch_size_that_was_given_up_is_not_logged(tmp_path, tiny_rows, tiny_tokenizer, monkeypatch):
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, auto_find_batch_size=True, logging_steps=2, max_steps=2)
    step, calls = trainer.training_step, []

    def once(*args, **options):
        calls.append(step(*args, **options))
        if len(calls) == 1:
            raise RuntimeError("CUDA out of memory. (as PyTorch says)")
        return calls[-1]

    monkeypatch.setattr(trainer, "training_step", once)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    config = trainer.cmlm
    parts = config.mlm_weight * entry["mlm"] + config.token_weight * entry["token"] + config.sequence_weight * entry["sequence"]
    # Means over both steps' tokens and the mean over steps are close, but not equal.
    assert len(calls) == 3 and parts == pytest.approx(float(sum(calls[1:])) / 2, rel=2e-3)


def test_a_training_that_diverged_leaves_a_trainer_that_evaluates(tmp_path, tiny_rows, tiny_tokenizer, monkeypatch):
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, held=tiny_rows.select(range(8)))
    monkeypatch.setattr(trainer, "compute_loss", lambda model, *rest, **_: torch.nan * sum(p.sum() for p in model.parameters()))
    with pytest.raises(DivergedError, match="the loss is not finite at step 1"):
        trainer.train()
    monkeypatch.undo()
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_a_resumed_run_that_cannot_repeat_its_dropout_is_told(tmp_path, tiny_rows, tiny_tokenizer, caplog):
    options = {"save_strategy": "steps", "save_steps": 1, "dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    make_trainer(tmp_path, tiny_rows, tiny_tokenizer, max_steps=1, **options).train()
    assert "dataloader_persistent_workers" not in caplog.text
    make_trainer(tmp_path, tiny_rows, tiny_tokenizer, max_steps=2, **options).train(resume_from_checkpoint=True)
    assert "dataloader_persistent_workers: from the next epoch on" in caplog.text


def test_workers_of_batches_by_tokens_fetch_as_many_as_is_asked(tmp_path, tiny_rows, tiny_tokenizer):
    options = {"max_tokens": 200, "dataloader_num_workers": 1, "dataloader_prefetch_factor": 5,
               "dataloader_in_order": False, "dataloader_multiprocessing_context": "spawn"}  # fmt: skip
    loader = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, **options).get_train_dataloader()
    assert loader.prefetch_factor == 5 and not loader.in_order
    assert loader.multiprocessing_context.get_start_method() == "spawn"


@pytest.mark.parametrize("changes", [{}, {"max_tokens": 300}, {"gradient_accumulation_steps": 3}])
@pytest.mark.parametrize("steps", [-1, 8])  # two epochs, or one and part of the next
def test_an_entry_an_epoch_has_the_measures_of_its_step(steps, changes, tmp_path, tiny_rows, tiny_tokenizer):
    options = {"num_train_epochs": 2, "max_steps": steps, **changes}
    rows = tiny_rows.select(range(40 * changes.get("gradient_accumulation_steps", 1) + 3))
    epochs, all_steps = (make_trainer(tmp_path, rows, tiny_tokenizer, logging_strategy=strategy, **options)
                         for strategy in ("epoch", "steps"))  # fmt: skip
    epochs.train()
    all_steps.train()
    logged = [entry for entry in epochs.state.log_history if "loss" in entry]
    assert logged[0]["epoch"] == 1.0 and len(logged) == 2
    by_step = {entry["step"]: entry for entry in all_steps.state.log_history if "loss" in entry}
    for entry in logged:
        for name in ("masked_accuracy", "token_retrieval", "alignment"):
            assert entry[name] == by_step[entry["step"]][name]


def test_a_mask_seed_of_0_is_one(tmp_path, tiny_rows, tiny_tokenizer):
    roles = []
    for seed, mask_seed in ((5, 0), (0, None), (5, None)):
        trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, seed=seed, mask_seed=mask_seed)
        roles.append(trainer.mask(trainer.data_collator([tiny_rows[i] for i in range(8)]), 0)["role"])
    assert torch.equal(roles[0], roles[1]) and not torch.equal(roles[0], roles[2])


def test_samples_per_second_are_of_each_training(tmp_path, tiny_rows, tiny_tokenizer):
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer)
    for _ in range(2):
        metrics = trainer.train().metrics
        assert metrics["train_samples_per_second"] * metrics["train_runtime"] == pytest.approx(4 * 8, rel=0.01)


def test_model_init_makes_the_same_model_whatever_was_drawn_before(tmp_path, tiny_rows, tiny_tokenizer):
    def projected():
        state = torch.get_rng_state()
        lm = make_lm()  # seeds PyTorch for its own use
        torch.set_rng_state(state)
        return CMLMModel(lm, CMLMConfig(projection=8))

    found = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        arguments = CMLMTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", seed=3)
        trainer = CMLMTrainer(args=arguments, processing_class=tiny_tokenizer, model_init=projected, train_dataset=tiny_rows)
        found.append(trainer.model.projection[0].weight)
    assert torch.equal(*found)


def test_each_temperature_is_logged_under_its_name(tmp_path, tiny_rows, tiny_tokenizer):
    config = CMLMConfig(learn_temperature=True, token_temperature=0.2, sequence_temperature=0.05)
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, config=config, max_steps=1, learning_rate=1e-6)
    trainer.train()
    for name, value in (("token_temperature", 0.2), ("sequence_temperature", 0.05)):
        assert history(trainer, name) == [pytest.approx(value, rel=1e-3)]


@pytest.mark.parametrize("name", ["uniformity", "negative_similarity", "eval_news_uniformity"])
def test_what_is_better_small_is_known(name, tmp_path):
    arguments = CMLMTrainingArguments(str(tmp_path), report_to="none", metric_for_best_model=name)
    assert arguments.greater_is_better is False


def test_a_run_of_fp16_is_none_of_float32():
    def settings(**precision):
        arguments = SimpleNamespace(world_size=1, gradient_accumulation_steps=1, **{"bf16": False, "fp16": False, **precision})
        return settings_of(PostTrainOptions("model", "texts.txt", "out"), CMLMConfig(), arguments)

    assert settings() != settings(fp16=True) != settings(bf16=True) != settings()
