"""The methods of the few-shot evaluation: masks drawn apart, pairs of texts, EDA, supervised contrast, equal budgets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_lm
from datasets import Dataset

from cmlm_fast import CMLMConfig, CMLMModel, CMLMTrainer, CMLMTrainingArguments
from cmlm_fast.data import CMLMDataCollator
from cmlm_fast.fewshot.augment import Eda, similar_tokens
from cmlm_fast.fewshot.contrast import ContrastTrainer
from cmlm_fast.fewshot.methods import METHODS, Contrast, find_method
from cmlm_fast.fewshot.paired import PairCollator, PairedModel
from cmlm_fast.fewshot.post_training import Schedule, UnlabelledTexts, post_train

SPECIAL = (2, 3)


def trainer_of(config, tokenizer, tmp_path):
    arguments = CMLMTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", seed=3)
    return CMLMTrainer(CMLMModel(make_lm(), config), arguments, processing_class=tokenizer)


def test_masks_drawn_apart_overlap_and_the_overlap_is_no_anchor(tiny_rows, tiny_tokenizer, tmp_path):
    rates = {"rate": 0.4, "complement_rate": 0.5}
    apart = trainer_of(CMLMConfig(complementary=False, **rates), tiny_tokenizer, tmp_path)
    batch = apart.mask(apart.data_collator([tiny_rows[i] for i in range(64)]), step=7)
    role = batch["role"]
    content = ~torch.isin(batch["input_ids"], batch["special_ids"])
    shares = [((role & bit) > 0)[content].double().mean().item() for bit in (1, 2)]
    # View 2 hides (1 − rate)·complement_rate of the units, as with complementary masks; the two overlap by chance.
    assert shares[0] == pytest.approx(0.4, abs=0.04) and shares[1] == pytest.approx(0.3, abs=0.04)
    assert (role == 3)[content].double().mean().item() == pytest.approx(0.4 * 0.3, abs=0.03)
    assert not role[~content].any()
    for view, bit in (("view1", 1), ("view2", 2)):
        assert torch.equal(batch[view][(role & bit) == 0], batch["input_ids"][(role & bit) == 0])
    together = trainer_of(CMLMConfig(**rates), tiny_tokenizer, tmp_path)
    other = together.mask(together.data_collator([tiny_rows[i] for i in range(64)]), step=7)
    assert other["role"].max() == 2 and torch.equal(other["view1"], batch["view1"])  # view 1 is the same

    model = apart.model.eval()
    seen = {}
    forward = model.loss.forward
    model.loss.forward = lambda views, *rest: seen.update(views=views) or forward(views, *rest)
    output = model(**batch, measured=True)
    views = seen["views"]
    masked = [(role & bit).bool() for bit in (1, 2)]
    assert output.counts.tolist()[:2] == [sum(int(m.sum()) for m in masked), int(((role == 1) | (role == 2)).sum())]
    logits = [model.logits(hidden[m]) for hidden, m in zip((views.hidden1, views.hidden2), masked, strict=True)]
    expected = sum(F.cross_entropy(x, batch["input_ids"][m], reduction="sum") for x, m in zip(logits, masked, strict=True))
    assert output.sums[0].item() == pytest.approx(expected.item(), rel=1e-4)
    anchors = model.loss.anchors(views)
    assert [len(a.target) for a in anchors] == [int((role == 1).sum()), int((role == 2).sum())]


@pytest.mark.parametrize("packed", [True, False])
def test_pairs_of_texts_are_contrasted_as_written_out(packed, tiny_rows, tiny_tokenizer, tmp_path):
    config = CMLMConfig.from_preset("simcse")
    model = PairedModel(make_lm(), config).eval()
    rows = [dict(tiny_rows[i]) for i in (0, 7, 100, 200)]
    partners = {0: 300, 7: 9, 100: 410, 200: 41}
    collator = PairCollator(CMLMDataCollator(tiny_tokenizer, packed=packed), lambda row: tiny_rows[partners[row["sample_id"]]])
    arguments = CMLMTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = CMLMTrainer(model, arguments, processing_class=tiny_tokenizer, data_collator=collator)
    output = model(**trainer.mask(collator(rows), 0))

    def vectors(which):
        hidden = [model.lm.base_model(torch.tensor([row["input_ids"]])).last_hidden_state[0, 1:-1] for row in which]
        return F.normalize(torch.stack([h.mean(0) for h in hidden]), dim=-1)

    s = vectors(rows) @ vectors([tiny_rows[i] for i in partners.values()]).T / config.sequence_temperature
    own = torch.arange(4)
    expected = (F.cross_entropy(s, own) + F.cross_entropy(s.T, own)) / 2
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-4) and output.counts[2] == 4
    with pytest.raises(ValueError, match="expected mlm_weight and token_weight to be 0"):
        PairedModel(make_lm(), CMLMConfig())


def eda_of(tokens, seed=0, share=0.2, **options):
    embeddings = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    return Eda(similar_tokens(embeddings, torch.tensor(tokens)), SPECIAL, seed, max_length=32, share=share, **options)


def test_eda_does_as_much_as_it_says():
    content = list(range(10, 30))
    row = {"input_ids": [2, *content, 3], "token_type_ids": [0] * 22, "attention_mask": [1] * 22, "sample_id": 0}
    pairs, eda = [(token, 0) for token in row["input_ids"]], eda_of(content)
    gone, moved = [], []
    for _ in range(400):
        eda.delete(fewer := list(pairs))
        gone.append(len(pairs) - len(fewer))
        eda.swap(other := list(pairs))
        moved.append(sum(one != two for one, two in zip(pairs, other, strict=True)))
    assert np.mean(gone) == pytest.approx(0.2 * 19, abs=0.3)  # one of 20 tokens always stays
    assert max(moved) > 4  # several swaps, not one
    alone = Eda({token: [token + 50] for token in content}, (2, 3), 0, 32, share=0.2)  # the similar tokens are not in the text
    alone.insert(more := list(pairs))
    assert sum(token >= 60 for token, _ in more) == 4
    kinds = set()
    for _ in range(40):
        made = alone(row)["input_ids"]
        fresh = any(token >= 60 for token in made)
        kinds.add("insert" if len(made) > 22 else "delete" if len(made) < 22 else "replace" if fresh else "swap")
    assert kinds == {"insert", "delete", "replace", "swap"}
    assert Eda({}, (), 0, 32).share == 0.1


@pytest.mark.parametrize("rows", [1024, 2])
def test_similar_tokens_are_the_nearest_that_occur(rows, monkeypatch):
    monkeypatch.setattr("cmlm_fast.fewshot.augment._ROWS", rows)
    embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.6], [0.0, 1.0], [1.0, 0.01]])
    assert similar_tokens(embeddings, torch.tensor([0, 1, 2, 3, 3]), most=2) == {0: [1, 2], 1: [0, 2], 2: [1, 0], 3: [2, 1]}


def test_eda_keeps_what_each_operation_promises():
    content = list(range(10, 30))
    pair = [(2, 0), *((t, 0) for t in content[:12]), (3, 0), *((t, 1) for t in content[12:]), (3, 1)]
    for seed in range(30):
        eda = eda_of(content, seed)
        results = {}
        for name in ("insert", "delete", "swap", "replace"):
            tokens = list(pair)
            getattr(eda, name)(tokens)
            results[name] = tokens
            special = [t for t in tokens if t[0] in SPECIAL]
            assert special == [(2, 0), (3, 0), (3, 1)] and tokens[0] == (2, 0) and tokens[-1] == (3, 1)
            middle = tokens.index((3, 0))
            assert {t[1] for t in tokens[:middle]} == {0} and {t[1] for t in tokens[middle + 1 :]} == {1}
        assert len(results["insert"]) == len(pair) + 4 and set(pair) <= set(results["insert"])
        assert {t[0] for t in results["insert"]} <= {*content, *SPECIAL}
        kept = iter(pair)
        assert all(token in kept for token in results["delete"])  # a subsequence
        assert sorted(results["swap"]) == sorted(pair)
        assert {t for t in results["swap"] if t[1] == 0} == {t for t in pair if t[1] == 0}  # within its own text
        changed = [(a, b) for a, b in zip(pair, results["replace"], strict=True) if a != b]
        assert len(changed) == 4 and all(b[0] in eda.similar[a[0]] for a, b in changed)


def test_eda_of_a_row_repeats_itself_fits_and_leaves_at_least_one_token():
    row = {"input_ids": [2, *range(10, 40), 3], "token_type_ids": [0] * 32, "attention_mask": [1] * 32, "sample_id": 5}
    one, two = eda_of(range(10, 40), 4), eda_of(range(10, 40), 4)
    made = [one(row) for _ in range(50)]
    assert made == [two(row) for _ in range(50)] and len({str(m["input_ids"]) for m in made}) > 20
    for m in made:
        assert len(m["input_ids"]) == len(m["attention_mask"]) == len(m["token_type_ids"]) <= 32 and m["sample_id"] == 5
    short = eda_of(range(10, 40), 0, share=0.99)
    for _ in range(30):
        assert len(short({**row, "input_ids": [2, 10, 11, 3], "token_type_ids": [0] * 4})["input_ids"]) >= 3
        assert short({**row, "input_ids": [2, 3], "token_type_ids": [0] * 2})["input_ids"] == [2, 3]


def test_supervised_contrast_is_the_formula(tiny_checkpoint):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint, num_labels=3, hidden_dropout_prob=0.1).train()
    labels = torch.tensor([0, 1, 0, 2, 1])
    ids = torch.randint(5, 200, (5, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    trainer = ContrastTrainer.__new__(ContrastTrainer)
    trainer.contrast = Contrast(weight=0.9, temperature=0.3)
    torch.manual_seed(1)
    loss, output = trainer.compute_loss(model, inputs, return_outputs=True)
    z, y = F.normalize(output.hidden_states[-1][:, 0].detach(), dim=-1), torch.cat([labels, labels])
    assert not torch.equal(z[:5], z[5:])  # two dropout masks
    total = 0.0
    for i in range(10):
        positives = [j for j in range(10) if j != i and y[j] == y[i]]
        below = sum(math.exp(z[i] @ z[k] / 0.3) for k in range(10) if k != i)
        total -= sum(math.log(math.exp(z[i] @ z[j] / 0.3) / below) for j in positives) / len(positives)
    cross = F.cross_entropy(output.logits, y)
    assert loss.item() == pytest.approx(0.1 * cross.item() + 0.9 * total / 10, rel=1e-5)
    loss.backward()
    assert model.base_model.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_every_method_that_post_trains_sees_the_same_encoder_tokens(sentences, tiny_tokenizer, tmp_path):
    start = tmp_path / "start"
    CMLMModel(make_lm()).save_pretrained(start)
    tiny_tokenizer.save_pretrained(start)
    other = [" ".join(text.split()[: 4 + i % 9]) for i, text in enumerate(sentences)]
    texts = UnlabelledTexts(Dataset.from_dict({"text": sentences, "paraphrase": other}), tiny_tokenizer, max_length=32)
    schedule = Schedule(epochs=1.0, max_steps=-1, batch_size=32, learning_rate=1e-3, warmup=0.0)
    budget = 2 * texts.tokens
    for name, method in METHODS.items():
        if method.objective is None:
            continue
        facts = post_train(start, texts, method, schedule, seed=1, bf16=False, folder=tmp_path / "models" / name)
        rel = {"seq-eda": 0.03, "cssl": 0.05}.get(name, 0)  # another text may be longer, and steps are whole
        assert facts["encoder_tokens"] == pytest.approx(budget, rel=rel), name
        assert facts["steps"] == 14 or (name == "cssl" and facts["steps"] > 14)
        changed = CMLMModel.from_pretrained(tmp_path / "models" / name).lm.state_dict()
        old = CMLMModel.from_pretrained(start).lm.state_dict()
        assert not torch.equal(changed["bert.embeddings.word_embeddings.weight"], old["bert.embeddings.word_embeddings.weight"])
        assert all(value.isfinite().all() for value in changed.values()), name


def test_methods_by_name_and_option():
    assert find_method("cmlm:sequence_weight=0.3:scope=sequence:complementary=false").objective == CMLMConfig(
        sequence_weight=0.3, scope="sequence", complementary=False)  # fmt: skip
    assert find_method("scl:weight=0.5").contrast == Contrast(weight=0.5)
    for text, words in {
        "bert": "expected methods to be among ft, scl, tapt",
        "ft:rate=0.1": "expected method ft to have no options",
        "cmlm:speed=1": "expected an option of method cmlm to be one of rate, complement_rate",
        "cmlm:rate=much": "expected rate of method cmlm to be a float, got 'much'",
        "cmlm:rate=2": r"expected rate to be in \[0, 1\], got 2.0",
        "scl:weight=2": r"Contrast: expected weight to be in \[0, 1\], got 2.0",
    }.items():
        with pytest.raises(ValueError, match=words):
            find_method(text)


@pytest.mark.parametrize("paraphrased", [10, 40, 100])
def test_few_paraphrases_get_the_steps_of_the_whole_budget(paraphrased, sentences, tiny_tokenizer, tmp_path):
    start = tmp_path / "start"
    CMLMModel(make_lm()).save_pretrained(start)
    tiny_tokenizer.save_pretrained(start)
    other = [" ".join(text.split()[::-1]) if i < paraphrased else (None, "", " ")[i % 3] for i, text in enumerate(sentences)]
    texts = UnlabelledTexts(Dataset.from_dict({"text": sentences, "paraphrase": other}), tiny_tokenizer, max_length=32)
    assert len(texts.paraphrases) == paraphrased
    schedule = Schedule(epochs=1.0, max_steps=-1, batch_size=32, learning_rate=1e-3, warmup=0.0)
    facts = post_train(start, texts, METHODS["cssl"], schedule, seed=1, bf16=False, folder=tmp_path / "model")
    assert facts["encoder_tokens"] == pytest.approx(2 * texts.tokens, rel=0.05)
