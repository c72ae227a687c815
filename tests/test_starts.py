"""What a run begins with: checkpoints that lack something, are damaged, or are of a kind unknown to the package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_lm
from datasets import Dataset
from safetensors.torch import load_file, save_file
from test_trainer import make_trainer

from cmlm_fast import CMLMConfig, CMLMModel, CMLMTrainer, CMLMTrainingArguments
from cmlm_fast.data import CMLMDataCollator, tokenize_texts
from cmlm_fast.masking import Masker
from cmlm_fast.options import PostTrainOptions
from cmlm_fast.post_train import prepare


def rewrite(folder, change):
    file = Path(folder) / "model.safetensors"
    save_file({new: value for name, value in load_file(file).items() if (new := change(name))}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name: f"other.{name}", r"without \d+ of them \(bert.embeddings.*\), but with other.bert.embeddings"),
        (lambda name: None if ".layer.1." in name else name, r"without 16 of them \(bert.encoder.layer.1.attention"),
    ],
)
def test_an_encoder_is_never_made_up(tiny_checkpoint, change, message):
    rewrite(tiny_checkpoint, change)
    with pytest.raises(ValueError, match=f"a checkpoint with all weights of the encoder, got .*{message}"):
        CMLMModel.from_pretrained(tiny_checkpoint)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_made_is_told(tmp_path, caplog, tied):
    make_lm(tie_word_embeddings=tied).bert.save_pretrained(tmp_path)
    lm = CMLMModel.from_pretrained(tmp_path).lm
    said = "its decoder tied to the embeddings" if tied else "its decoder random"
    assert "has no LM head: made one, " + said in caplog.text
    assert (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight) == tied


def test_a_damaged_start_is_one_line(tiny_checkpoint, sentence_file, tmp_path):
    options = PostTrainOptions(tiny_checkpoint, sentence_file, str(tmp_path / "out"))
    config = Path(tiny_checkpoint) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 48}))
    with pytest.raises(ValueError, match=r"in its configuration, .*intermediate.dense.bias of \[48\], got .* with \[64\]"):
        prepare(options)
    file = Path(tiny_checkpoint) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="expected model to be a masked LM or an encoder that can be loaded, got "):
        prepare(options)
    file.unlink()
    (Path(tiny_checkpoint) / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 64}))
    with pytest.raises(ValueError, match="expected model to be a masked LM or an encoder that can be loaded, got "):
        prepare(options)
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": "abc"}))
    with pytest.raises(ValueError, match="expected model to be "):
        prepare(options)
    assert not (tmp_path / "out").exists()


def test_checkpointing_that_the_encoder_lacks_is_refused_before_all_else(tmp_path, tiny_tokenizer, sentence_file):
    make_lm("albert").save_pretrained(tmp_path / "albert")
    tiny_tokenizer.save_pretrained(tmp_path / "albert")
    options = PostTrainOptions(str(tmp_path / "albert"), sentence_file, str(tmp_path / "out"), gradient_checkpointing=True)
    with pytest.raises(ValueError, match="expected gradient_checkpointing to be off for AlbertForMaskedLM, which has none"):
        prepare(options)


@pytest.mark.parametrize("kind", ["mobilebert", "fnet", "nystromformer", "convbert"])
def test_kinds_that_would_be_wrong_are_refused(kind):
    lm = make_lm(kind, embedding_size=32) if kind in ("mobilebert", "convbert") else make_lm(kind)
    with pytest.raises(ValueError, match="expected lm to be a masked LM of the kind of BERT, RoBERTa"):
        CMLMModel(lm)


@pytest.mark.parametrize("kind", ["roberta", "mpnet"])
def test_positions_stay_where_the_tokenizer_has_another_pad(kind, tmp_path, tiny_rows, tiny_tokenizer):
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, lm=make_lm(kind, pad_token_id=1), max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    ids, lm = torch.tensor([[2, 10, 11, 12, 3]]), trainer.model.lm.eval()
    again = CMLMModel.from_pretrained(tmp_path / "saved").lm.eval()
    assert lm.base_model.embeddings.padding_idx == again.base_model.embeddings.padding_idx == 1
    torch.testing.assert_close(*(m(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for m in (lm, again)))


def test_a_random_token_that_is_the_pad_shifts_no_position(tiny_rows, tiny_tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, lm=make_lm("roberta", pad_token_id=1), packed=False)
    model, rows = trainer.model.eval(), [tiny_rows[i] for i in range(4)]
    padded = trainer.mask(trainer.data_collator(rows), 0)
    packed = trainer.mask(type(trainer.data_collator)(tiny_tokenizer, packed=True)(rows), 0)
    padded["view1"][:, 2] = packed["view1"][packed["cu_seqlens"][:-1].long() + 2] = 1
    torch.testing.assert_close(model(**padded).sums, model(**packed).sums, rtol=1e-5, atol=1e-5)


def test_the_default_length_is_what_the_model_takes(tmp_path, tiny_tokenizer, sentence_file):
    make_lm(max_position_embeddings=64).save_pretrained(tmp_path / "short")
    tiny_tokenizer.save_pretrained(tmp_path / "short")
    options = PostTrainOptions(str(tmp_path / "short"), sentence_file, str(tmp_path / "out"), bf16=False)
    assert prepare(options).settings["max_length"] == 64
    with pytest.raises(ValueError, match=r"expected position_jitter to be <= 56, which leaves 8 .*, got 57"):
        prepare(PostTrainOptions(**{**vars(options), "objective": {"position_jitter": 57}}))


@pytest.mark.parametrize("length", [{"max_steps": 5}, {"num_train_epochs": 0.5}])
def test_a_schedule_that_would_divide_by_zero_is_refused(length, tiny_rows, tiny_tokenizer, tmp_path):
    options = {"max_steps": -1, **length, "lr_scheduler_type": "polynomial", "warmup_steps": 5}
    trainer = make_trainer(tmp_path, tiny_rows.select(range(80)), tiny_tokenizer, **options)  # half an epoch has five steps
    with pytest.raises(ValueError, match=r"warmup_steps to be 0 or to leave one of 5 steps, .*, got 5"):
        trainer.train()
    trainer.args.lr_scheduler_type = "linear"
    assert trainer.train().global_step == 5


def test_a_bad_schedule_of_the_command_line_is_refused_before_all_else(tiny_checkpoint, sentence_file, tmp_path):
    options = {"scheduler": "polynomial", "max_steps": 5, "warmup": 5, "bf16": False}
    with pytest.raises(ValueError, match="expected warmup_steps to be 0 or to leave one of 5 steps"):
        prepare(PostTrainOptions(tiny_checkpoint, sentence_file, str(tmp_path / "out"), **options))


def test_a_rate_at_which_the_polynomial_schedule_ends_is_refused(tmp_path):
    for rate, kwargs in ((1e-7, None), (1e-3, {"lr_end": 0.1})):
        with pytest.raises(ValueError, match=r"expected learning_rate to be > .*, where the polynomial schedule ends, got "):
            CMLMTrainingArguments(str(tmp_path), lr_scheduler_type="polynomial", learning_rate=rate, lr_scheduler_kwargs=kwargs)


def test_a_start_that_overwrite_would_remove_is_refused(tmp_path, tiny_tokenizer, sentence_file):
    start = tmp_path / "out" / "checkpoint-2"
    make_lm().save_pretrained(start)
    tiny_tokenizer.save_pretrained(start)
    options = PostTrainOptions(str(start), sentence_file, str(tmp_path / "out"), bf16=False, overwrite=True)
    with pytest.raises(ValueError, match="expected model to be elsewhere than in output_dir, which overwrite writes anew"):
        prepare(options)
    with pytest.raises(ValueError, match="expected model to be elsewhere than in output_dir"):
        prepare(PostTrainOptions(**{**vars(options), "output_dir": str(start)}))
    assert prepare(PostTrainOptions(**{**vars(options), "output_dir": str(tmp_path / "other")}))


def test_all_modules_behind_the_encoder_come_along(tiny_checkpoint, tmp_path, tiny_rows, tiny_tokenizer):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Pooling, Transformer

    encoder = Transformer(tiny_checkpoint)
    SentenceTransformer(modules=[encoder, Pooling(32), Dense(32, 8)], device="cpu").save(str(tmp_path / "start"))
    config = tmp_path / "start" / "sentence_bert_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_seq_length": 24}))
    model = CMLMModel.from_pretrained(tmp_path / "start")
    start = SentenceTransformer(str(tmp_path / "start"), device="cpu")
    shutil.rmtree(tmp_path / "start")  # what it holds was read along with the model
    arguments = CMLMTrainingArguments(str(tmp_path / "run"), max_steps=1, save_steps=1, learning_rate=1e-9, use_cpu=True,
                                      report_to="none", disable_tqdm=True)  # fmt: skip
    CMLMTrainer(model, arguments, train_dataset=tiny_rows, processing_class=tiny_tokenizer).train()
    models = [start, SentenceTransformer(str(tmp_path / "run" / "checkpoint-1"), device="cpu")]
    assert models[1].max_seq_length == 24
    before, after = (each.encode(["a clever fox"]) for each in models)
    assert after.shape == (1, 8)
    assert before == pytest.approx(after, abs=1e-6)


@pytest.mark.parametrize("path", ["../elsewhere", "/tmp/elsewhere", "1_Pooling/../../elsewhere"])
def test_a_module_outside_of_the_checkpoint_is_refused(path, tiny_checkpoint):
    (Path(tiny_checkpoint) / "modules.json").write_text(json.dumps([{"path": ""}, {"path": path}]))
    with pytest.raises(ValueError, match=r"expected modules.json of .* to name folders below it, got .*elsewhere"):
        CMLMModel.from_pretrained(tiny_checkpoint)


@pytest.mark.parametrize("content", ["[1]", '[{"path": 3}]', '[{"type": "x"}]', '{"path": "a"}', "{}", "3", "not JSON", "\xff"])
def test_a_list_of_modules_that_is_none_is_refused(content, tiny_checkpoint):
    (Path(tiny_checkpoint) / "modules.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"expected modules.json of .* to be a list of modules, each with its path, got"):
        CMLMModel.from_pretrained(tiny_checkpoint)


def test_an_optimizer_of_another_model_is_refused(tmp_path, tiny_rows, tiny_tokenizer):
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer)
    optimizer = torch.optim.SGD(trainer.model.parameters(), 0.1)
    with pytest.raises(ValueError, match="expected optimizers to be None if model_init is given"):
        CMLMTrainer(args=trainer.args, train_dataset=tiny_rows, processing_class=tiny_tokenizer,
                    model_init=lambda: CMLMModel(make_lm()), optimizers=(optimizer, None))  # fmt: skip


def test_positions_that_begin_elsewhere_are_not_shifted():
    with pytest.raises(ValueError, match="position_jitter to be 0 for an encoder without a position table"):
        CMLMModel(make_lm("mra"), CMLMConfig(position_jitter=3))


@pytest.mark.parametrize("packed", [True, False])
def test_an_encoder_of_one_type_takes_pairs_of_a_tokenizer_of_two(packed, tiny_tokenizer):
    texts = Dataset.from_dict({"text": ["to be", "or not"], "text_pair": ["that is", "the question"]})
    rows = tokenize_texts(texts, tiny_tokenizer, max_length=16)
    assert max(rows[0]["token_type_ids"]) == 1
    model = CMLMModel(make_lm("roberta", type_vocab_size=1)).eval()
    batch = Masker(tiny_tokenizer)(CMLMDataCollator(tiny_tokenizer, packed=packed)(list(rows)), model, seed=0, step=0)
    same = {**batch, "token_type_ids": torch.zeros_like(batch["token_type_ids"])}
    assert torch.equal(model(**batch).loss, model(**same).loss)
