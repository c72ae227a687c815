"""The objective equals the formula written out in plain PyTorch, on every kind of encoder; what is saved loads anywhere."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_lm
from datasets import Dataset

from cmlm_fast import CMLMConfig, CMLMModel, attention, complementary_mask, info_nce
from cmlm_fast.config import PRESETS
from cmlm_fast.data import CMLMDataCollator, mask_settings, tokenize_texts
from cmlm_fast.layers import use_low_precision_layer_norm
from cmlm_fast.losses import InfoNCELoss, TokenContrastiveLoss
from cmlm_fast.masking import Masker
from cmlm_fast.ops._rows import mean_rows

KINDS = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "modernbert", "albert", "mpnet")


def batch_of(rows, tokenizer, config, indices=(0, 5, 9, 200), step=0):
    """A masked batch, as the trainer makes it."""
    batch = CMLMDataCollator(tokenizer)([rows[i] for i in indices])
    settings = mask_settings(tokenizer)
    masked = complementary_mask(
        batch["input_ids"], attention_mask=batch["attention_mask"], sample_ids=batch["sample_ids"], rate=config.rate,
        complement_rate=config.complement_rate, seed=7, step=step, **settings,
    )  # fmt: skip
    return {**batch, **masked._asdict(), "special_ids": torch.tensor(settings["special_ids"])}


def written_out(model, batch):
    """The objective from full logits and whole score matrices, with one pass per view."""
    config, lm = model.cmlm, model.lm
    ids, role = batch["input_ids"], batch["role"]
    attention = batch["attention_mask"].bool()
    can = attention & ~torch.isin(ids, batch["special_ids"])
    typed = lm.config.model_type.startswith(("bert", "electra", "albert"))
    types = {"token_type_ids": torch.zeros_like(ids)} if typed else {}
    hidden, mlm = [], []
    for view, where in ((batch["view1"], role == 1), (batch["view2"], role == 2)):
        hidden.append(lm.base_model(view, attention_mask=batch["attention_mask"], **types).last_hidden_state)
        logits = lm(view, attention_mask=batch["attention_mask"], **types).logits
        mlm.append(F.cross_entropy(logits[where], ids[where], reduction="none"))
    mlm = torch.cat(mlm if config.mlm_views == "both" else mlm[:1]).mean()
    token = []
    for b, t in (role > 0).nonzero().tolist():
        masked, seen = (0, 1) if role[b, t] == 1 else (1, 0)
        scores = {}
        for c, u in can.nonzero().tolist():
            same = config.exclude_same_token and ids[c, u] == ids[b, t] and (c, u) != (b, t)
            if not same and (config.scope == "batch" or c == b):
                scores[c, u] = F.cosine_similarity(hidden[masked][b, t], hidden[seen][c, u], dim=0) / config.token_temperature
        token.append(torch.logsumexp(torch.stack(list(scores.values())), 0) - scores[b, t])
    vectors = []
    for states in hidden:
        pooled = [(states[b][can[b]].mean(0) if config.pooling == "mean" else states[b, 0]) for b in range(len(ids))]
        vectors.append(F.normalize(torch.stack(pooled), dim=-1))
    scores = vectors[0] @ vectors[1].T / config.sequence_temperature
    own = torch.arange(len(ids))
    sequence = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
    return config.mlm_weight * mlm + config.token_weight * torch.stack(token).mean() + config.sequence_weight * sequence


def compare(model, batch):
    ours = model(**batch).loss
    truth = written_out(model, batch)
    torch.testing.assert_close(ours, truth, rtol=2e-5, atol=2e-5)
    parameters = [p for p in model.lm.parameters() if p.requires_grad]
    got, expected = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (ours, truth))
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None) or (a if b is None else b).abs().max() == 0
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_objective_and_gradients_are_those_written_out(kind, tiny_lm, tiny_rows, tiny_tokenizer):
    model = CMLMModel(tiny_lm(kind), CMLMConfig(token_temperature=0.2, sequence_weight=0.5))
    compare(model, batch_of(tiny_rows, tiny_tokenizer, model.cmlm))


@pytest.mark.parametrize("changes", [{"scope": "sequence"}, {"exclude_same_token": False}, {"mlm_views": "first"},
                                     {"pooling": "cls"}, {"complement_rate": 0.7}])  # fmt: skip
def test_options_of_the_objective(changes, tiny_lm, tiny_rows, tiny_tokenizer):
    model = CMLMModel(tiny_lm(), CMLMConfig(token_temperature=0.2, **changes))
    compare(model, batch_of(tiny_rows, tiny_tokenizer, model.cmlm))


@pytest.mark.parametrize("views", ["both", "first"])
def test_the_head_sees_masked_tokens_alone(views, tiny_lm, tiny_rows, tiny_tokenizer, monkeypatch):
    model, seen = CMLMModel(tiny_lm(), CMLMConfig(mlm_views=views)), []
    batch, mlm_sum = batch_of(tiny_rows, tiny_tokenizer, model.cmlm), model.mlm_sum
    monkeypatch.setattr(model, "mlm_sum", lambda *rows, **more: (seen.append(rows[1]), mlm_sum(*rows, **more))[1])
    model(**batch)
    masked = [batch["input_ids"][batch["role"] == role] for role in (1, 2)]
    assert torch.equal(seen[0], torch.cat(masked if views == "both" else masked[:1])) and len(seen) == 1


def test_presets_are_those_published(tiny_lm, tiny_rows, tiny_tokenizer):
    paper = CMLMConfig.from_preset("paper")
    assert (paper.rate, paper.complement_rate, paper.mlm_views) == (0.15, 0.7, "first")
    assert (paper.mlm_weight, paper.token_weight, paper.sequence_weight) == (0.5, 0.5, 0.5)
    assert (paper.token_temperature, paper.sequence_temperature, paper.pooling) == (0.05, 0.05, "cls")
    balanced = CMLMConfig.from_preset("balanced")
    assert (balanced.mlm_weight, balanced.token_weight, balanced.sequence_weight) == (1.0, 0.3, 0.1)
    assert balanced.complement_rate == pytest.approx(0.15 / 0.85)
    others = {name: CMLMConfig.from_preset(name) for name in ("tapt", "seq", "simcse")}
    weights = {name: (of.mlm_weight, of.token_weight, of.sequence_weight) for name, of in others.items()}
    assert weights == {"tapt": (1, 0, 0), "seq": (0, 0, 1), "simcse": (0, 0, 1)}
    assert others["simcse"].rate == others["simcse"].complement_rate == 0
    for preset in PRESETS:
        model = CMLMModel(tiny_lm(), CMLMConfig.from_preset(preset))
        output = model(**batch_of(tiny_rows, tiny_tokenizer, model.cmlm))
        weights = torch.tensor([model.cmlm.mlm_weight, model.cmlm.token_weight, model.cmlm.sequence_weight])
        assert ((output.sums != 0) == (weights > 0)).all(), preset
        torch.testing.assert_close((weights * output.sums / output.counts.clamp_min(1)).sum(), output.loss.detach())


def test_simcse_contrasts_two_dropout_passes_of_the_same_tokens(tiny_lm, tiny_rows, tiny_tokenizer):
    config = CMLMConfig.from_preset("simcse")
    batch = batch_of(tiny_rows, tiny_tokenizer, config)
    assert torch.equal(batch["view1"], batch["view2"]) and not batch["role"].any()
    still, noisy = (CMLMModel(tiny_lm(hidden_dropout_prob=p), config) for p in (0.0, 0.3))
    assert model_alignment(still, batch) == pytest.approx(0.0, abs=1e-5)
    assert model_alignment(noisy, batch) > 0.01


def model_alignment(model, batch):
    total, count = model.train()(**batch, measured=True).measures["alignment"].tolist()
    return total / count


def test_padding_changes_nothing(tiny_lm, tiny_rows, tiny_tokenizer):
    model = CMLMModel(tiny_lm(), CMLMConfig(pooling="mean"))
    collate, settings = CMLMDataCollator(tiny_tokenizer), mask_settings(tiny_tokenizer)
    losses = []
    for multiple in (None, 64):
        collate.pad_to_multiple_of = multiple
        batch = collate([tiny_rows[i] for i in (3, 70)])
        masked = complementary_mask(batch["input_ids"], attention_mask=batch["attention_mask"],
                                    sample_ids=batch["sample_ids"], **settings)  # fmt: skip
        losses.append(model(**batch, **masked._asdict(), special_ids=torch.tensor(settings["special_ids"])).loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)


def packed_and_padded(model, rows, tokenizer, indices):
    """The same sequences in both layouts, masked with the same bits."""
    settings = mask_settings(tokenizer)
    for packed in (True, False):
        batch = CMLMDataCollator(tokenizer, packed=packed)([rows[i] for i in indices])
        masked = complementary_mask(batch["input_ids"], batch.get("cu_seqlens"), attention_mask=batch.get("attention_mask"),
                                    sample_ids=batch["sample_ids"], seed=5, **settings)  # fmt: skip
        jitter = model.jitter(batch["sample_ids"], seed=5, step=0)
        yield {**batch, **masked._asdict(), "special_ids": torch.tensor(settings["special_ids"]), "jitter": jitter}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mpnet"])
@pytest.mark.parametrize("changes", [{}, {"scope": "sequence", "pooling": "cls", "position_jitter": 9}])
def test_packed_equals_padded(kind, changes, tiny_lm, tiny_rows, tiny_tokenizer):
    # A window shorter than the sequences, where the encoder has one.
    options = {"local_attention": 8, "global_attn_every_n_layers": 2} if kind == "modernbert" else {}
    if kind == "modernbert" and "position_jitter" in changes:
        with pytest.raises(ValueError, match="expected position_jitter to be 0 for an encoder without a position table"):
            CMLMModel(tiny_lm(kind), CMLMConfig(position_jitter=9))
        changes = {name: value for name, value in changes.items() if name != "position_jitter"}
    model = CMLMModel(tiny_lm(kind, **options), CMLMConfig(token_temperature=0.2, sequence_weight=0.5, **changes))
    assert model.takes_packed
    found = []
    for batch in packed_and_padded(model, tiny_rows, tiny_tokenizer, (0, 5, 9, 200, 201, 7)):
        output = model(**batch, measured=True)
        gradients = torch.autograd.grad(output.loss, list(model.parameters()), allow_unused=True)
        found.append((output, gradients))
    (packed, packed_gradients), (padded, padded_gradients) = found
    torch.testing.assert_close(packed.sums, padded.sums, rtol=1e-5, atol=1e-5)
    assert torch.equal(packed.counts, padded.counts)
    for name, value in packed.measures.items():
        near_tie = 1 if name.endswith(("retrieval", "accuracy")) else 1e-5  # rounding decides which equal score is first
        torch.testing.assert_close(value, padded.measures[name], rtol=1e-5, atol=near_tie)
    for a, b in zip(packed_gradients, padded_gradients, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_norms_of_low_precision_in_every_encoder(kind, tiny_lm, tiny_rows, tiny_tokenizer):
    plain, low = (CMLMModel(tiny_lm(kind), CMLMConfig(token_temperature=0.2)) for _ in range(2))
    assert use_low_precision_layer_norm(low.lm) >= 3
    batch = batch_of(tiny_rows, tiny_tokenizer, plain.cmlm)
    found = []
    for model in (plain, low):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
            states = model.lm.base_model(batch["view1"], attention_mask=batch["attention_mask"]).last_hidden_state
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        found.append((loss, torch.cat([g.flatten() for g in gradients if g is not None]), states.dtype))
    (loss, gradient, dtype), (loss_low, gradient_low, dtype_low) = found
    # A projection of the embeddings outputs 16 bits, which then stay on a CPU, where autocast leaves norms alone.
    assert dtype_low == torch.bfloat16 and (dtype == torch.float32 or kind in ("electra", "albert"))
    torch.testing.assert_close(loss_low, loss, rtol=0.01, atol=0)
    assert (gradient_low - gradient).norm() < 0.03 * gradient.norm()


def test_a_layer_norm_of_low_precision_keeps_its_epsilon():
    norm, rows = torch.nn.LayerNorm(8, eps=0.5), torch.randn(5, 8).bfloat16()
    exact = norm(rows.float())
    use_low_precision_layer_norm(norm)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(norm(rows).float(), exact, rtol=0.01, atol=0.01)


def test_packed_attention_stays_out_of_what_is_saved(tiny_lm, tmp_path):
    CMLMModel(tiny_lm("modernbert")).save_pretrained(tmp_path)
    assert "cmlm" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("kind", ["bert", "electra", "albert"])
def test_packed_pairs_keep_their_token_types(kind, tiny_lm, sentences, tiny_tokenizer):
    rows = tokenize_texts(Dataset.from_dict({"text": sentences[:8], "text_pair": sentences[8:16]}), tiny_tokenizer)
    model = CMLMModel(tiny_lm(kind), CMLMConfig(token_temperature=0.2, sequence_weight=0.5)).eval()
    packed, padded = packed_and_padded(model, rows, tiny_tokenizer, range(8))
    assert padded["token_type_ids"].any()
    sums = model(**padded).sums
    torch.testing.assert_close(model(**packed).sums, sums, rtol=1e-5, atol=1e-5)
    padded["token_type_ids"] = torch.zeros_like(padded["token_type_ids"])
    assert not torch.allclose(model(**padded).sums, sums, rtol=1e-4)


def test_packed_dropout_is_dropout(tiny_lm, tiny_rows, tiny_tokenizer):
    # The mean over many draws equals the pass without dropout, within its spread.
    model = CMLMModel(tiny_lm(attention_probs_dropout_prob=0.3, layers=1), CMLMConfig())
    batch, _ = packed_and_padded(model, tiny_rows, tiny_tokenizer, (0, 5, 9))
    arguments = (batch["view1"], batch["view2"], batch["cu_seqlens"], batch["lengths"], None, None)
    with torch.no_grad():
        still = model.eval()._encode_packed(*arguments)[0]
        draws = torch.stack([model.train()._encode_packed(*arguments)[0] for _ in range(400)])
    spread = draws.std(0)
    assert spread.mean() > 5e-4 and (draws.mean(0) - still).abs().mean() < 0.3 * spread.mean()


def test_nothing_eligible_is_a_zero_loss_with_zero_gradients(tiny_lm, tiny_rows, tiny_tokenizer):
    model = CMLMModel(tiny_lm())
    batch = batch_of(tiny_rows, tiny_tokenizer, model.cmlm, indices=(4,))
    batch["role"] = torch.zeros_like(batch["role"])
    batch["view1"] = batch["view2"] = batch["input_ids"]
    loss = model(**batch, eligible=torch.zeros_like(batch["role"], dtype=torch.bool)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_position_jitter_shifts_view_two_alone(tiny_lm, tiny_rows, tiny_tokenizer):
    config = CMLMConfig(position_jitter=40)
    ids = torch.arange(1000)
    for kind in ("bert", "roberta"):
        model = CMLMModel(tiny_lm(kind), config).eval()
        shift = model.jitter(ids, seed=3, step=1)
        assert shift.min() == 0 and shift.max() == 40 and 15 < shift.double().mean() < 25
        assert torch.equal(shift[500:], model.jitter(ids[500:], seed=3, step=1))  # the batch does not matter
        batch = batch_of(tiny_rows, tiny_tokenizer, config)
        mask = batch["attention_mask"]
        one, two = model._encode_padded(batch["view1"], batch["view1"], mask, None, shift[:4].clamp_min(1))
        plain, _ = model._encode_padded(batch["view1"], batch["view1"], mask, None, None)
        keep = mask.bool().flatten()
        torch.testing.assert_close(one[keep], plain[keep])
        assert not torch.allclose(two[keep], plain[keep], atol=1e-3)
    wide = CMLMModel(tiny_lm(), replace(config, position_jitter=139))
    with pytest.raises(ValueError, match=r"expected position_jitter to be <= 1.., what the model's position table leaves"):
        wide._encode_padded(batch["view1"], batch["view1"], mask, None, shift[:4])


def test_a_sequence_without_an_eligible_token_leaves_float16_gradients_finite(tiny_lm):
    model = CMLMModel(tiny_lm(), CMLMConfig.from_preset("seq"))
    hidden = torch.randn(12, 32, requires_grad=True)
    eligible = torch.tensor([False] * 4 + [True] * 8)
    z = model._pool(hidden, eligible, torch.tensor([0, 4, 8, 12], dtype=torch.int32), torch.tensor([0, 4, 8]))
    assert not z[0].any()
    (65536 * info_nce(z.half(), z.detach().half())).backward()
    assert hidden.grad.isfinite().all() and hidden.grad[4:].any() and not hidden.grad[:4].any()


def test_learned_temperature_gets_a_gradient_and_is_clamped():
    for loss, args in ((TokenContrastiveLoss(0.1, True), (torch.eye(3), torch.eye(3), torch.arange(3))),
                       (InfoNCELoss(0.1, True), (torch.eye(3), torch.eye(3)))):  # fmt: skip
        loss(*args).backward()
        assert loss.temperature.logit_scale.grad.abs() > 0
        with torch.no_grad():
            loss.temperature.logit_scale.fill_(9.0)
        assert loss.temperature().item() == pytest.approx(0.01)


BAD = {
    "rate": {"rate": 1.5}, "mask_share": {"mask_share": -0.1}, "random_share": {"mask_share": 0.9, "random_share": 0.2},
    "mlm_weight": {"mlm_weight": float("nan")}, "token_temperature": {"token_temperature": 0.0}, "scope": {"scope": "all"},
    "pooling": {"pooling": "max"}, "position_jitter": {"position_jitter": -1},
    "sequence_temperature": {"learn_temperature": True, "sequence_temperature": 0.005},  # its scale is at most log 100
    "token_weight": {"rate": 0.0, "complement_rate": 0.0, "mlm_weight": 0.0},
    "complement_rate": {"complement_rate": "a"}, "sequence_weight": {"sequence_weight": torch.tensor(0.1)},
    "projection": {"projection": 8.0}, "complementary": {"complementary": 1}, "scheme": {"scheme": None},
}  # fmt: skip


@pytest.mark.parametrize("changes", [{"complement_rate": 0.0}, {"mlm_views": "first"}])
def test_mlm_without_masks_is_refused(changes):
    with pytest.raises(ValueError, match=r"expected mlm_weight to be 0 if nothing is masked, got 1\.0"):
        CMLMConfig(rate=0.0, **changes)


@pytest.mark.parametrize("field", BAD)
def test_bad_configuration_names_field_rule_and_value(field):
    with pytest.raises(ValueError, match=rf"CMLMConfig: expected {field} to be .+, got .+"):
        CMLMConfig(**BAD[field])
    with pytest.raises(ValueError, match=r"expected preset to be one of balanced, .*, got 'fast'"):
        CMLMConfig.from_preset("fast")
    with pytest.raises(ValueError, match=r"expected a field to be one of rate, .*, got 'temperature'"):
        CMLMConfig.from_preset("paper", temperature=1.0)


def test_a_model_of_no_known_kind_is_refused(tiny_lm):
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(ValueError, match=r"expected lm to be a masked LM of the kind of BERT, .*, got GPT2LMHeadModel"):
        CMLMModel(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)))
    with pytest.raises(ValueError, match="expected lm to be a masked LM of transformers, got Linear"):
        CMLMModel(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected config to be a CMLMConfig or None, got str"):
        CMLMModel(tiny_lm(), "balanced")


def test_a_configuration_takes_numpys_numbers(tmp_path):
    config = CMLMConfig(rate=np.float32(0.25), position_jitter=np.int64(3))
    config.save_pretrained(tmp_path)
    assert CMLMConfig.of_checkpoint(tmp_path) == config == CMLMConfig(rate=0.25, position_jitter=3)


def test_an_encoder_without_lm_head_gets_one_tied_to_its_embeddings(tiny_lm, tmp_path, caplog):
    tiny_lm().base_model.save_pretrained(tmp_path)
    model = CMLMModel.from_pretrained(tmp_path)
    assert "has no LM head: made one, its decoder tied to the embeddings" in caplog.text and len(caplog.records) == 1
    assert model.lm.get_output_embeddings().weight is model.lm.get_input_embeddings().weight


def test_what_is_saved_loads_without_this_package(tiny_lm, tiny_tokenizer, tmp_path):
    models = {str(tmp_path / kind): CMLMModel(tiny_lm(kind), CMLMConfig(projection=8, learn_temperature=True))
              for kind in ("bert", "roberta", "modernbert")}  # fmt: skip
    for folder, model in models.items():
        with torch.no_grad():
            model.loss.token.temperature.logit_scale.fill_(1.5)
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
    code = f"""
import sys, torch, transformers
from sentence_transformers import SentenceTransformer
for folder in {list(models)!r}:
    for name in ("AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"):
        getattr(transformers, name).from_pretrained(folder)
    assert SentenceTransformer(folder, device="cpu").encode("the fountain").shape == (32,)
    model, report = transformers.AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    torch.save(model.base_model(torch.arange(5, 12)[None]).last_hidden_state, folder + "/hidden.pt")
assert not [name for name in sys.modules if name.startswith("cmlm_fast")]
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    for folder, model in models.items():
        hidden = model.lm.eval().base_model(torch.arange(5, 12)[None]).last_hidden_state
        torch.testing.assert_close(torch.load(folder + "/hidden.pt"), hidden, rtol=1e-4, atol=1e-5)
        again = CMLMModel.from_pretrained(folder, model.cmlm)
        again.load_contrast(folder)
        within = CMLMModel.from_pretrained(tmp_path, subfolder=Path(folder).name)
        for other in (again, within):
            assert other.cmlm == model.cmlm
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_masks_by_the_objective_and_lengths_that_are_not_the_batchs(tiny_rows, tiny_tokenizer):
    rows, losses = [tiny_rows[i] for i in range(6)], []
    for changes in ({}, {"complement_rate": 0.7}, {"position_jitter": 4}):
        model = CMLMModel(make_lm(), CMLMConfig(**changes))
        batch = Masker(tiny_tokenizer)(CMLMDataCollator(tiny_tokenizer, packed=model.takes_packed)(rows), model, seed=0, step=3)
        losses.append(model(**batch).loss.item())
    assert len(set(losses)) == 3
    wrong = (None, [3, 3], [int(n) + (i == 0) for i, n in enumerate(batch["lengths"])])
    for lengths in wrong:
        with pytest.raises(ValueError, match="expected lengths to be those of the 6 sequences of cu_seqlens"):
            model(**{**batch, "lengths": lengths})


@pytest.mark.parametrize("packed", [True, False])
def test_what_a_collator_of_ones_own_takes_out_is_heeded(packed, tiny_lm, tiny_rows, tiny_tokenizer):
    model = CMLMModel(tiny_lm(), CMLMConfig()).eval()
    masker, collate = Masker(tiny_tokenizer), CMLMDataCollator(tiny_tokenizer, packed=packed)
    batch = collate(list(tiny_rows)[:4])
    batch["eligible"] = batch["input_ids"] % 2 == 0  # the collator has counted the others, too
    masked = masker(dict(batch), model, seed=0, step=0)
    del batch["eligible_counts"]
    known = masker(batch, model, seed=0, step=0)
    assert masked["role"].bool().any() and not masked["role"].bool()[~batch["eligible"]].any()
    assert model(**masked).loss == model(**known).loss


def test_forward_refuses_sizes_that_are_not_the_batchs_and_names_it_does_not_know(tiny_lm, tiny_rows, tiny_tokenizer):
    model = CMLMModel(tiny_lm(), CMLMConfig())
    batch = Masker(tiny_tokenizer)(CMLMDataCollator(tiny_tokenizer, packed=True)(list(tiny_rows)[:4]), model, seed=0, step=0)
    first, *others = batch["sizes"]
    for wrong in (first - 1, first + 1):
        with pytest.raises(ValueError, match=f"expected sizes to count tokens by role, here {first}, got {wrong}"):
            model(**{**batch, "sizes": (wrong, *others)})
    with pytest.raises(TypeError, match="jiter"):
        model(**batch, jiter=3)
    output = model(**batch)
    assert output["loss"] is output.loss is output[0] and output.measures == {}
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)


def test_loss_modules_say_what_they_are_and_refuse_what_forward_gives():
    assert "initial=0.1, learn=True" in repr(InfoNCELoss(0.1, True))
    assert "initial=0.05, learn=False" in repr(TokenContrastiveLoss())
    for make in (lambda: TokenContrastiveLoss(target=3), lambda: InfoNCELoss(z1=3), lambda: InfoNCELoss(nonsense=1)):
        with pytest.raises(TypeError, match=r"Loss: .*(target|z1|nonsense)"):
            make()


def test_a_model_is_in_the_mode_of_its_masked_lm(tiny_lm):
    assert CMLMModel(tiny_lm().train(), CMLMConfig(projection=4)).projection.training
    model = CMLMModel(tiny_lm().eval(), CMLMConfig(projection=4))
    assert not any(module.training for module in model.modules())


def test_attention_maps_are_missed_with_a_warning(tiny_lm, caplog):
    lm = tiny_lm()
    CMLMModel(lm)
    attention.logger.warning_once.cache_clear()
    assert not lm(torch.tensor([[2, 7, 3]]), output_attentions=True).attentions
    assert "returns no attention maps" in caplog.text


def test_means_of_runs_and_their_gradient_are_those_written_out():
    random = torch.Generator().manual_seed(0)
    bounds, counted = torch.tensor([0, 5, 5, 9, 12], dtype=torch.int32), torch.rand(12, generator=random) < 0.6
    counted[9:] = False
    rows = torch.randn(12, 3, generator=random, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: mean_rows(rows, counted, bounds), rows)
    expected = torch.stack([rows[a:b][counted[a:b]].sum(0) / max(1, int(counted[a:b].sum()))
                            for a, b in pairwise(bounds.tolist())])  # fmt: skip
    torch.testing.assert_close(mean_rows(rows, counted, bounds), expected)
    broken = torch.where(counted[:, None], rows.detach(), float("nan")).bfloat16().requires_grad_()
    found = mean_rows(broken, counted, bounds)
    found.float().pow(2).sum().backward()
    assert found.dtype == broken.grad.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected.detach(), rtol=0.02, atol=0.02)
    expected.pow(2).sum().backward()
    torch.testing.assert_close(broken.grad.double(), rows.grad, rtol=0.03, atol=0.03)


def test_an_encoder_that_returns_attentions_can_be_saved(tmp_path):
    CMLMModel(make_lm(output_attentions=True)).save_pretrained(tmp_path)
    assert CMLMModel.from_pretrained(tmp_path).takes_packed


def test_the_last_position_is_taken_and_none_behind_it(tiny_lm):
    bert, roberta = CMLMModel(tiny_lm()), CMLMModel(tiny_lm("roberta"))
    pad = roberta.config.pad_token_id
    assert bert._first_position(140) == 0 and roberta._first_position(139 - pad) == pad + 1
    with pytest.raises(ValueError, match="expected sequences to be of at most"):
        roberta._first_position(140 - pad)
    jittered = CMLMModel(tiny_lm(), CMLMConfig(position_jitter=10))
    assert jittered._first_position(130) == 0
    with pytest.raises(ValueError, match="expected position_jitter to be <= 9"):
        jittered._first_position(131)


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "mpnet"])
def test_heads_are_exact_where_gelu_bends(kind, tiny_lm):
    lm = tiny_lm(kind).eval()
    with torch.no_grad():
        lm.lm_head.dense.weight.mul_(40)
    hidden = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(CMLMModel(lm).logits(hidden), lm.lm_head(hidden), rtol=1e-5, atol=1e-6)


def test_attention_of_padded_batches_has_dropout(tiny_lm, tiny_rows, tiny_tokenizer):
    config = CMLMConfig.from_preset("seq")
    model = CMLMModel(tiny_lm(attention_probs_dropout_prob=0.5), config).train()
    batch = batch_of(tiny_rows, tiny_tokenizer, config)
    first, second = (model(**batch, vectors_only=True)[0] for _ in range(2))
    assert (first - second).abs().max() > 1e-4
    model.eval()
    assert torch.equal(*(model(**batch, vectors_only=True)[0] for _ in range(2)))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_pads_on_the_left_change_nothing(kind, tiny_lm, tiny_rows, tiny_tokenizer):
    config = CMLMConfig(position_jitter=4)
    model, batch = CMLMModel(tiny_lm(kind), config).eval(), batch_of(tiny_rows, tiny_tokenizer, config)
    batch["jitter"] = torch.tensor([0, 1, 3, 4])
    lengths = batch["attention_mask"].sum(1).tolist()
    assert min(lengths) < batch["attention_mask"].shape[1]

    def on_the_left(value):
        rolled = [row.roll(len(row) - length) for row, length in zip(value, lengths, strict=True)]
        return torch.stack(rolled)

    left = {name: on_the_left(value) if torch.is_tensor(value) and value.dim() == 2 else value for name, value in batch.items()}
    torch.testing.assert_close(model(**left).loss, model(**batch).loss, rtol=1e-5, atol=1e-5)
