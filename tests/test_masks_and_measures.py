"""What the trainer makes of a batch, written out by hand: masks with every option, the sequence part, each measure."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_lm
from datasets import Dataset
from test_trainer import make_trainer

from cmlm_fast import CMLMConfig, complementary_mask, info_nce
from cmlm_fast.data import mask_settings, tokenize_texts
from cmlm_fast.measures import Sums
from cmlm_fast.ops._philox import position_shift


@pytest.fixture
def masked(tiny_rows, tiny_tokenizer, tmp_path):
    def make(step=5, rows=tiny_rows, **config):
        trainer = make_trainer(tmp_path, rows, tiny_tokenizer, config=CMLMConfig(**config), seed=7, packed=False)
        return trainer.mask(trainer.data_collator([rows[i] for i in range(40)]), step)

    return make


def test_view_2_is_shifted_by_seed_step_and_sample(masked):
    batch = masked(position_jitter=9)
    assert torch.equal(batch["jitter"], position_shift(batch["sample_ids"], 9, 7, 5))
    assert not torch.equal(batch["jitter"], masked(step=6, position_jitter=9)["jitter"])


def test_sampling_and_shares_are_those_of_the_objective(masked, tiny_tokenizer):
    plain = masked(mask_share=1.0, random_share=0.0)
    assert (plain["view1"][plain["role"] == 1] == tiny_tokenizer.mask_token_id).all()
    for sampling in ("exact", "bernoulli"):
        expected = complementary_mask(plain["input_ids"], attention_mask=plain["attention_mask"], sampling=sampling, seed=7,
                                      sample_ids=plain["sample_ids"], step=5, **mask_settings(tiny_tokenizer))  # fmt: skip
        assert torch.equal(masked(sampling=sampling)["role"], expected.role)


def test_words_are_masked_whole(masked, sentences, tiny_tokenizer):
    rows = tokenize_texts(Dataset.from_dict({"text": sentences[:40]}), tiny_tokenizer, whole_word=True)
    batch, longest = masked(rows=rows, rate=0.5), 0
    for role, unit in zip(batch["role"], batch["unit_ids"], strict=True):
        words = [role[unit == word] for word in unit.unique() if word >= 0]
        assert all(word.unique().numel() == 1 for word in words)
        longest = max(longest, *map(len, words))
    assert longest > 1  # some word has several tokens


@pytest.mark.parametrize("packed", [True, False])
def test_many_special_tokens_are_never_masked(packed, tiny_tokenizer, tmp_path):
    tokenizer, extra = copy.deepcopy(tiny_tokenizer), [f"<extra{i}>" for i in range(20)]
    tokenizer.add_special_tokens({"additional_special_tokens": extra})
    rows = tokenize_texts(Dataset.from_dict({"text": [" ".join(["fox", *extra])] * 3}), tokenizer)
    trainer = make_trainer(tmp_path, rows, tokenizer, config=CMLMConfig(rate=0.9), lm=make_lm(vocabulary=len(tokenizer)),
                           packed=packed)  # fmt: skip
    batch = trainer.mask(trainer.data_collator([rows[i] for i in range(3)]), 0)
    special = torch.isin(batch["input_ids"], torch.tensor(tokenizer.convert_tokens_to_ids(extra)))
    assert special.sum() == 60 and not batch["role"][special].any() and batch["role"].any()


@pytest.mark.parametrize("scheme", ["cross", "nt_xent"])
@pytest.mark.parametrize("projection", [0, 8])
def test_the_sequence_part_is_info_nce_of_the_projected_means(scheme, projection, tiny_rows, tiny_tokenizer, tmp_path):
    config = CMLMConfig(scheme=scheme, projection=projection, mlm_weight=0.0, token_weight=0.0, sequence_weight=1.0)
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, config=config)
    model = trainer.model.eval()
    batch = trainer.mask(trainer.data_collator([tiny_rows[i] for i in range(6)]), 0)
    can, edges = ~torch.isin(batch["input_ids"], batch["special_ids"]), batch["cu_seqlens"].tolist()
    hidden = model._encode_packed(batch["view1"], batch["view2"], batch["cu_seqlens"], batch["lengths"],
                                  batch.get("token_type_ids"), None)  # fmt: skip
    means = [torch.stack([h[a:b][can[a:b]].mean(0) for a, b in pairwise(edges)]) for h in hidden]
    expected = info_nce(*map(model.projection, means), temperature=0.05, scheme=scheme)
    assert model(**batch).loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("rows", [1024, 7])
def test_every_measure_is_the_one_written_out(rows, tiny_rows, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("cmlm_fast.measures._ROWS", rows)
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, packed=False, config=CMLMConfig(rate=0.5, complement_rate=0.9))
    model = trainer.model.eval()
    batch = trainer.mask(trainer.data_collator([tiny_rows[i] for i in range(0, 420, 30)]), 0)
    found = {name: (total / count).item() for name, (total, count) in model(**batch, measured=True).measures.items()}
    ids, role, attention = batch["input_ids"], batch["role"], batch["attention_mask"]
    can = attention.bool() & ~torch.isin(ids, batch["special_ids"])
    hidden = [model.lm.base_model(batch[view], attention_mask=attention).last_hidden_state for view in ("view1", "view2")]
    unit = [F.normalize(h, dim=-1) for h in hidden]
    hits, own, others = [], [], []
    for b, t in (role > 0).nonzero().tolist():
        hides, shows = (0, 1) if role[b, t] == 1 else (1, 0)
        cosine, negative = unit[shows] @ unit[hides][b, t], can & (ids != ids[b, t])
        own.append(cosine[b, t].item())
        others += cosine[negative].tolist()
        hits.append(own[-1] >= cosine[negative].max().item())
    z1, z2 = (F.normalize(torch.stack([h[b][can[b]].mean(0) for b in range(len(ids))]), dim=-1) for h in hidden)
    retrieved = ((z1 @ z2.T).argmax(1) == torch.arange(len(ids))).double().mean().item()
    assert 0 < np.mean(hits) < 1 and 0 < retrieved < 1  # otherwise a wrong measure might give the same value
    expected = {"token_retrieval": np.mean(hits), "positive_similarity": np.mean(own), "negative_similarity": np.mean(others),
                "sequence_retrieval": retrieved, "alignment": (z1 - z2).square().sum(1).mean().item(),
                "uniformity_kernel": torch.exp(-2 * torch.pdist(z1).square()).mean().item()}  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_uniformity_is_the_logarithm_of_the_mean_kernel():
    sums = Sums()
    for kernel, pairs in ((0.5, 2.0), (0.7, 4.0)):
        sums.add({"uniformity_kernel": torch.tensor([kernel, pairs])})
    found = sums.read(lambda total: total, torch.device("cpu"))
    assert found == {"uniformity": pytest.approx(math.log(1.2 / 6))} and sums.values == {}


def test_sequence_retrieval_looks_among_the_second_views(tiny_rows, tiny_tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, config=CMLMConfig(rate=0.5, complement_rate=0.9))
    model, differ = trainer.model.eval(), 0
    for begin in range(28):
        batch = trainer.mask(trainer.data_collator([tiny_rows[i] for i in range(begin, 420, 30)]), 0)
        with torch.no_grad():
            z1, z2 = (F.normalize(z, dim=-1) for z in model(**batch, vectors_only=True))
            found = model(**batch, measured=True).measures["sequence_retrieval"]
        own = torch.arange(len(z1))
        there, back = (((z1 @ z2.T).argmax(axis) == own).sum().item() for axis in (1, 0))
        differ += there != back
        assert found[0] == there
    assert differ
