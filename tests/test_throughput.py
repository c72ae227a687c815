"""What makes a step fast does not change its result: token budgets, gradient caching, fast layers, no wait for the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import skip_first_batches
from conftest import make_lm
from datasets import Dataset, concatenate_datasets
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_trainer import history, make_trainer, weights
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import SequentialSampler

from cmlm_fast import CMLMConfig, CMLMModel, CMLMTrainer, complementary_mask
from cmlm_fast._library import native_kernels, op
from cmlm_fast.data import CMLMDataCollator, TokenBudgetSampler, mask_settings, sequence_lengths, tokenize_texts
from cmlm_fast.data.collate import as_table_rows
from cmlm_fast.data.fetch import TableRows
from cmlm_fast.gradient_cache import GradientCache
from cmlm_fast.layers import TiedEmbedding, tied_head, use_fast_layers
from cmlm_fast.ops import _linear


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=200), st.integers(2, 9), st.integers(1, 4), st.integers(0, 3))
@example([3, 0, 2, 0], 2, 1, 0)
def test_a_token_budget_deals_every_row_once(lengths, times, ranks, epoch):
    budget = times * max(*lengths, 1)
    try:
        samplers = [TokenBudgetSampler(lengths, budget, seed=3, rank=rank, ranks=ranks) for rank in range(ranks)]
    except ValueError:
        assert ranks > 1  # too few rows for so many ranks
        return
    batches = []
    for sampler in samplers:
        sampler.set_epoch(epoch)
        mine = list(sampler)
        assert len(mine) == len(sampler) == len(samplers[0])
        assert mine == list(sampler) and all(mine)
        batches += mine
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in batch) <= budget for batch in batches)


def test_a_token_budget_shuffles_by_epoch_and_fills_its_batches(tiny_rows):
    lengths = sequence_lengths(tiny_rows)
    assert lengths.tolist() == [len(ids) for ids in tiny_rows["input_ids"]]
    assert sequence_lengths(tiny_rows.select([7, 3])).tolist() == lengths[[7, 3]].tolist()
    sampler = TokenBudgetSampler(lengths, 256)
    first = list(sampler)
    sampler.set_epoch(1)
    assert first != list(sampler) and len(sampler) == len(first)
    assert np.mean([lengths[batch].sum() for batch in first]) > 256 - 2 * lengths.max()
    with pytest.raises(ValueError, match=rf"expected max_tokens to be >= {2 * lengths.max()}, twice the longest"):
        TokenBudgetSampler(lengths, int(lengths.max()))


def test_a_run_by_tokens_resumes_in_the_same_bits(tmp_path, tiny_rows, tiny_tokenizer):
    rows = tiny_rows.select(range(60))
    options = {"max_tokens": 300, "max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1,
               "gradient_accumulation_steps": 2}  # fmt: skip
    lm = {"hidden_dropout_prob": 0.1}
    whole = make_trainer(tmp_path, rows, tiny_tokenizer, lm=make_lm(**lm), **options)
    whole.train()
    steps = whole.state.global_step
    assert steps >= 4 and whole.state.epoch == pytest.approx(2)
    for at in (1, steps // 2 + 1):  # in the first epoch and in the second
        resumed = make_trainer(tmp_path, rows, tiny_tokenizer, lm=make_lm(**lm), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
        assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True)), at


def test_batches_read_as_tables_are_those_of_rows(sentences, tiny_tokenizer):
    pairs = Dataset.from_dict({"text": sentences[:200], "text_pair": sentences[200:400]})
    made = tokenize_texts(pairs, tiny_tokenizer, max_length=48, whole_word=True)
    some = concatenate_datasets([made.select(range(90, 200)), made.select(range(90))]).shuffle(seed=1)
    for dataset in (some, some.remove_columns("unit_ids"), made.select(range(3, 50)).add_column("text", ["more"] * 47)):
        collate = CMLMDataCollator(tiny_tokenizer, packed=True)
        tables = as_table_rows(dataset, collate)
        assert isinstance(tables, TableRows) and len(tables) == len(dataset)
        for indices in ([5, 2, 40, 2], list(range(20, 47)), [7]):
            one, other = collate([dataset[i] for i in indices]), collate(tables.__getitems__(indices))
            assert list(one) == list(other) and ("unit_ids" in dataset.column_names) == ("unit_ids" in one)
            for name in one:
                a, b = torch.as_tensor(one[name]), torch.as_tensor(other[name])
                assert torch.equal(a, b) and a.dtype == b.dtype, name
    table, padded = made.with_format("arrow")[:4], CMLMDataCollator(tiny_tokenizer)
    assert all(map(torch.equal, padded(table).values(), padded([made[i] for i in range(4)]).values()))


@pytest.mark.parametrize("column", ["input_ids", "unit_ids", "sample_id"])
def test_a_null_in_a_table_is_named(sentences, tiny_tokenizer, column):
    made = tokenize_texts(Dataset.from_dict({"text": sentences[:3]}), tiny_tokenizer, whole_word=True)
    for value in (None, [None, 4]) if column != "sample_id" else (None,):
        rows = made.to_dict()
        rows[column][1] = value
        tables = as_table_rows(Dataset.from_dict(rows), CMLMDataCollator(tiny_tokenizer, packed=True))
        with pytest.raises(ValueError, match=f"expected rows to be without null in {column}, got 1 of them"):
            CMLMDataCollator(tiny_tokenizer, packed=True)(tables.__getitems__([0, 1, 2]))


def test_samplers_see_the_data_set_itself(tmp_path, tiny_rows, tiny_tokenizer):
    seen = []
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, held=tiny_rows)
    trainer._get_train_sampler = trainer._get_eval_sampler = lambda dataset: seen.append(dataset) or SequentialSampler(dataset)
    loaders = trainer.get_train_dataloader(), trainer.get_eval_dataloader(), trainer.get_test_dataloader(tiny_rows)
    assert all(isinstance(loader.dataset, TableRows) for loader in loaders) and all(dataset is tiny_rows for dataset in seen)


@pytest.mark.parametrize("options", [{}, {"max_tokens": 200}])
def test_the_trainer_reads_tables_where_nobody_sees_the_rows(tmp_path, tiny_rows, tiny_tokenizer, options):
    class Custom(CMLMDataCollator):
        """A subclass may look at rows."""

    def loader(rows=tiny_rows, collate=CMLMDataCollator, **more):
        trainer = make_trainer(tmp_path, rows, tiny_tokenizer, **more, **options)
        trainer.data_collator = collate(tiny_tokenizer, packed=True)
        found = trainer.get_train_dataloader()
        assert trainer.train_dataset is rows
        return found

    fast, slow = loader(), loader(collate=Custom)
    assert isinstance(fast.dataset, TableRows) and slow.dataset is tiny_rows
    for one, other in zip(fast, slow, strict=True):
        assert list(one) == list(other) and all(np.array_equal(one[name], other[name]) for name in one)
    class Own(Dataset):
        """A subclass may treat rows in its own way."""

    own = Own(tiny_rows.data, tiny_rows.info)
    hidden = tiny_rows.with_format(None, columns=["input_ids", "attention_mask", "sample_id"])  # not token_type_ids
    for rows in (tiny_rows.with_format("numpy"), hidden, own):
        assert loader(rows).dataset is rows
    with pytest.raises(ValueError, match=r"expected rows to be those of tokenize_texts, with a sample_id, got columns \["):
        next(iter(loader(tiny_rows.remove_columns("sample_id"))))


CONTRAST = CMLMConfig(scope="sequence", sequence_weight=1.0, token_temperature=0.2, learn_temperature=True)


def test_a_cached_contrast_equals_the_large_batch(tmp_path, tiny_rows, tiny_tokenizer):
    runs = []
    for batch, options in ((16, {}), (4, {"gradient_accumulation_steps": 4, "contrastive_batch_size": 16})):
        trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, config=CONTRAST, per_device_train_batch_size=batch,
                               max_grad_norm=0.0, optim="sgd", max_steps=3, **options)  # fmt: skip
        trainer.train()
        runs.append((weights(trainer), history(trainer, "loss"), history(trainer, "sequence")))
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-5) and runs[0][2] == pytest.approx(runs[1][2], rel=1e-5)
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_step_of_several_contrasts_equals_batches_of_their_size(tmp_path, tiny_rows, tiny_tokenizer):
    runs = []
    for batch, options in ((8, {}), (4, {"contrastive_batch_size": 8})):
        trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, config=CONTRAST, per_device_train_batch_size=batch,
                               gradient_accumulation_steps=16 // batch, bf16=True, max_grad_norm=0.0, optim="sgd", max_steps=2,
                               **options)  # fmt: skip
        trainer.train()
        runs.append((weights(trainer), history(trainer, "sequence")))
    assert runs[0][1] == pytest.approx(runs[1][1], rel=0.02)
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=1e-4)


def test_a_cached_contrast_replays_dropout(tmp_path, tiny_rows, tiny_tokenizer):
    lm = make_lm(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, config=CMLMConfig.from_preset("seq"), lm=lm)
    model = trainer.model.train()
    batches = [trainer.mask(trainer.data_collator([tiny_rows[i] for i in range(at, at + 5)]), 0) for at in (0, 40, 90)]
    torch.manual_seed(5)
    whole = [model(**batch, vectors_only=True) for batch in batches]  # all graphs at once, the memory that caching saves
    total = model.loss.sequence_sum(*(torch.cat(z) for z in zip(*whole, strict=True)))
    expected = torch.autograd.grad(total, list(model.lm.base_model.parameters()), allow_unused=True)
    torch.manual_seed(5)
    cache = GradientCache(batches, 3, model.loss, None, trainer.accelerator.autocast)
    value = torch.zeros(())
    for at, batch in enumerate(batches):
        output = model(**batch, cached=cache.replay(model, at))
        (output.loss * output.counts[2]).backward()
        value += output.sums[2]
    after = torch.get_rng_state()
    torch.testing.assert_close(value, total.detach())
    for parameter, gradient in zip(model.lm.base_model.parameters(), expected, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    torch.manual_seed(5)
    for batch in batches:
        model(**batch, vectors_only=True)
    assert torch.equal(after, torch.get_rng_state())  # later draws are as if there had been a single pass


def test_a_contrast_that_does_not_fit_is_refused(tmp_path, tiny_rows, tiny_tokenizer):
    with pytest.raises(ValueError, match="expected contrastive_batch_size to be a multiple of per_device_train_batch_size = 8"):
        make_trainer(tmp_path, tiny_rows, tiny_tokenizer, contrastive_batch_size=20, gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="expected contrastive_batch_size to be None with max_tokens, got 16"):
        make_trainer(tmp_path, tiny_rows, tiny_tokenizer, contrastive_batch_size=16, max_tokens=200)
    with pytest.raises(ValueError, match="expected contrastive_batch_size to be None if sequence_weight is 0"):
        make_trainer(tmp_path, tiny_rows, tiny_tokenizer, config=CMLMConfig.from_preset("tapt"), contrastive_batch_size=8)
    with pytest.raises(ValueError, match="divides the 3 batches of gradient_accumulation_steps"):
        make_trainer(tmp_path, tiny_rows, tiny_tokenizer, contrastive_batch_size=16, gradient_accumulation_steps=3)


class NoWait(TorchDispatchMode):
    """Fails on what makes the host wait for a GPU: a size or a value that only the device knows."""

    waits = ("aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::masked_scatter", "aten::equal",
             "aten::_unique2", "aten::is_nonzero")  # fmt: skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name() not in self.waits, func.name()
        by = args[1] if func.name() == "aten::index.Tensor" else ()
        assert not any(i is not None and i.dtype == torch.bool for i in by), "an index by a mask"
        assert func.name() != "aten::repeat_interleave.Tensor" or (kwargs or {}).get("output_size") is not None, func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, {"scope": "sequence", "pooling": "cls", "mlm_views": "first"}])
def test_a_step_never_waits_for_the_device(changes, monkeypatch, tmp_path, tiny_rows, tiny_tokenizer):
    # As on a GPU: no dropout, whose seeds the CPU's layers read; PyTorch's embedding; the loss checked only when logged.
    monkeypatch.setattr(CMLMTrainer, "_check_finite", lambda self: None)
    monkeypatch.setattr(TiedEmbedding, "forward", torch.nn.Embedding.forward)
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, config=CMLMConfig(**changes), logging_steps=100)
    trainer.state.max_steps = 10
    trainer.create_optimizer_and_scheduler(10)
    batch = trainer.data_collator([tiny_rows[i] for i in range(6)])
    with NoWait():
        (inputs,), _ = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        assert inputs["sizes"] is not None
        trainer.training_step(trainer.model, inputs)
    role = inputs["role"]
    can = ~torch.isin(batch["input_ids"], trainer._masker.special_ids)
    assert inputs["sizes"] == ((role == 1).sum(), (role == 2).sum(), can.sum())
    with pytest.raises(AssertionError, match="nonzero"), NoWait():  # NoWait does catch waits
        trainer.training_step(trainer.model, {**inputs, "sizes": None})


@pytest.mark.parametrize(("options", "streamed"), [({}, False), ({"max_tokens": 200}, False), ({"packed": False}, False),
                                                   ({}, True)])  # fmt: skip
def test_batches_wait_on_the_host_for_their_masks(options, streamed, tmp_path, tiny_rows, tiny_tokenizer):
    # accelerate's loaders would copy them to the device and wait until it has finished the previous step.
    rows = tiny_rows.to_iterable_dataset() if streamed else tiny_rows
    trainer = make_trainer(tmp_path, rows, tiny_tokenizer, max_steps=2, **options)
    loaders = [trainer.get_train_dataloader(), trainer.get_eval_dataloader(rows), trainer.get_test_dataloader(rows)]
    for loader in (*loaders, skip_first_batches(loaders[0], 1)):
        assert loader.device is None
        # Code that moves a batch visits each element of a tuple, a mapping or a list.
        assert not [name for name, value in next(iter(loader)).items() if isinstance(value, (tuple, list, dict))]


def test_linear_layers_of_the_faster_library_are_linear_layers(monkeypatch):
    monkeypatch.setattr(_linear, "onednn_is_faster", torch.backends.mkldnn.is_available)
    generator = torch.Generator().manual_seed(0)
    for shape in ((7, 24), (2, 5, 24), (1, 24)):
        x, weight, bias = (torch.randn(size, generator=generator, requires_grad=True) for size in (shape, (16, 24), (16,)))
        for b in (bias, None):
            leaves = [x, weight] if b is None else [x, weight, b]
            ours, theirs = _linear.linear(x, weight, b), F.linear(x, weight, b)
            torch.testing.assert_close(ours, theirs)
            upstream = torch.randn(ours.shape, generator=generator)
            for got, expected in zip(torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream),
                                     strict=True):  # fmt: skip
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


class Calls(TorchDispatchMode):
    """The names of the ops whose first argument has one of these shapes."""

    def __init__(self, *shapes):
        super().__init__()
        self.shapes, self.names = shapes, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor) and tuple(args[0].shape) in self.shapes:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bf16", [False, True])
def test_the_embeddings_rows_join_the_gradient_of_the_head(bf16, tmp_path, tiny_rows, tiny_tokenizer, monkeypatch):
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer)
    model, batch = trainer.model.eval(), trainer.data_collator([tiny_rows[i] for i in range(6)])
    weight = model.lm.get_input_embeddings().weight
    inputs = trainer.mask(batch, 0)

    def gradient():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**inputs).loss
        with Calls(tuple(weight.shape)) as calls:
            loss.backward()
        return weight.grad, calls.names

    ours, calls = gradient()
    assert calls.count("aten::add_.Tensor") == 1 and "aten::add.Tensor" not in calls  # one table, and no separate sum
    monkeypatch.setattr(TiedEmbedding, "forward", torch.nn.Embedding.forward)
    plain, _ = gradient()
    assert ours.layout is torch.strided and ours.norm() > 0
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)


def test_an_encoder_trained_on_alone_has_dense_gradients():
    model = CMLMModel(make_lm())
    embedding = model.lm.get_input_embeddings()
    assert type(embedding) is TiedEmbedding
    model.lm.base_model(input_ids=torch.arange(5, 17)[None]).last_hidden_state.sum().backward()
    assert embedding.weight.grad.layout is torch.strided
    torch.optim.AdamW(model.lm.base_model.parameters()).step()  # refuses sparse gradients
    embedding.weight.grad = None
    with tied_head(embedding, model.lm.get_output_embeddings()) as head:
        model.lm.base_model(input_ids=torch.arange(5, 17)[None]).last_hidden_state.sum().backward()
    assert head.shape == embedding.weight.shape and embedding.weight.grad.layout is torch.strided  # without the head's part
    assert embedding.weight.grad[5:17].any() and not embedding.weight.grad[17:].any()


def test_a_decoder_untied_after_the_start_is_trained_by_itself():
    model = CMLMModel(make_lm(), CMLMConfig(token_weight=0.0, sequence_weight=0.0))
    decoder, embedding = model.lm.get_output_embeddings(), model.lm.get_input_embeddings()
    decoder.weight = torch.nn.Parameter(decoder.weight.detach().clone())
    with tied_head(embedding, decoder) as head:
        assert head is None
    assert isinstance(embedding, TiedEmbedding) and decoder.weight is not embedding.weight


def test_layers_take_what_torch_takes():
    vector, dropped = torch.randn(4, requires_grad=True), torch.ones(1000)
    plain = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Dropout(0.5, inplace=True))
    use_fast_layers(plain)
    plain[0](vector).sum().backward()
    torch.testing.assert_close(vector.grad, plain[0].weight.sum(0))
    plain[1](dropped)
    assert 300 < (dropped == 0).sum() < 700  # dropped in place
    one = torch.nn.Sequential(torch.nn.Dropout(0.5))
    use_fast_layers(one)
    assert one(torch.ones(())).item() in (0.0, 2.0)


def test_layers_are_torchs_where_a_seed_cannot_be_read_or_a_derivative_would_be_lost(monkeypatch):
    monkeypatch.setattr(_linear, "onednn_is_faster", torch.backends.mkldnn.is_available)
    layer, rows = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.5)), torch.randn(3, 4)
    use_fast_layers(layer)
    forward = torch.func.jvp(layer, (rows,), (torch.ones(3, 4),))[1]
    assert 0.2 < (forward != 0).float().mean() < 0.8
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(layer(forward_ad.make_dual(rows, rows))).tangent.count_nonzero() > 0
        weight = forward_ad.make_dual(layer[0].weight.detach(), torch.ones(64, 4))
        by_weight = forward_ad.unpack_dual(torch.func.functional_call(layer[0], {"weight": weight}, rows)).tangent
        torch.testing.assert_close(by_weight, rows.sum(1, keepdim=True).expand(3, 64))
    torch.testing.assert_close(torch.func.hessian(lambda x: layer[0](x).square().sum())(rows[0]),
                               2 * layer[0].weight.T @ layer[0].weight)  # fmt: skip
    one_by_one = torch.func.vmap(layer, randomness="different")(torch.ones(2, 3, 4))
    assert ((one_by_one[0] == 0) != (one_by_one[1] == 0)).any()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.ones(3, 4)).shape == (3, 64)
    graph = make_fx(layer)(rows)
    assert not torch.equal(graph(rows), graph(rows))  # the graph holds no seed as a constant
    with torch.device("meta"):
        assert layer(rows).count_nonzero() > 0


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embeddings_whose_gradient_is_not_one_of_rows_stay(options):
    tied = torch.nn.Embedding(5, 3, **options)
    use_fast_layers(torch.nn.Sequential(tied), tied.weight)
    assert type(tied) is torch.nn.Embedding


@pytest.mark.skipif(("dropout", "CPU") not in native_kernels, reason="no compiled kernels")
def test_dropout_drops_its_share_independently():
    out = op("dropout")(torch.ones(2000, 384), 0.1, 17)
    kept = out != 0
    assert out[kept].unique().tolist() == pytest.approx([1 / 0.9])
    assert abs(kept.double().mean() - 0.9) < 5 * (0.09 / kept.numel()) ** 0.5
    for other in (op("dropout")(torch.ones(2000, 384), 0.1, 18) != 0, kept.roll(1, 0), kept.roll(1, 1), kept.roll(4, 1)):
        assert abs((kept & other).double().mean() - 0.81) < 2e-3


def eager_objective(lm, batch, view1, view2, role, config, special):
    """The objective of a padded batch in plain PyTorch."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    can = mask.bool() & ~torch.isin(ids, special)
    hidden = [lm.bert(view, attention_mask=mask).last_hidden_state for view in (view1, view2)]
    number = can.flatten().cumsum(0).view_as(can) - 1
    mlm, token = [], []
    for at, where in enumerate((role == 1, role == 2)):
        mlm.append(F.cross_entropy(lm.cls(hidden[at])[where], ids[where], reduction="sum"))
        query, key = F.normalize(hidden[at][where], dim=-1), F.normalize(hidden[1 - at][can], dim=-1)
        target = number[where]
        same = (ids[where][:, None] == ids[can]) & (torch.arange(len(key)) != target[:, None])
        scores = (query @ key.T / config.token_temperature).masked_fill(same, float("-inf"))
        token.append(F.cross_entropy(scores, target, reduction="sum"))
    z1, z2 = (F.normalize((h * can[..., None]).sum(1) / can.sum(1, keepdim=True), dim=-1) for h in hidden)
    scores, own = z1 @ z2.T / config.sequence_temperature, torch.arange(len(ids))
    sequence = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
    by_token = config.mlm_weight * sum(mlm) + config.token_weight * sum(token)
    return by_token / (role > 0).sum() + config.sequence_weight * sequence


def test_two_hundred_steps_are_those_of_the_written_out_objective(tmp_path, tiny_rows, tiny_tokenizer):
    # In float64, so that rounding cannot grow: the packed trainer against eager PyTorch on padded batches.
    config, seen = CMLMConfig(token_temperature=0.2), []
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, config=config, lm=make_lm(layers=1).double(), max_steps=200,
                           lr_scheduler_type="constant", weight_decay=0.0)  # fmt: skip
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: seen.append([row["sample_id"] for row in rows]) or collate(rows)
    assert collate.packed
    trainer.train()
    lm, pad, known = make_lm(layers=1).double(), CMLMDataCollator(tiny_tokenizer), mask_settings(tiny_tokenizer)
    special = torch.tensor(known["special_ids"])
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for step, samples in enumerate(seen[:200]):
        batch = pad([tiny_rows[i] for i in samples])
        ids, attention = batch["input_ids"], batch["attention_mask"]
        masked = complementary_mask(ids, attention_mask=attention, sample_ids=batch["sample_ids"], seed=42, step=step, **known)
        loss = eager_objective(lm, batch, *masked, config, special)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert len(losses) == 200 and losses[-1] < 0.8 * losses[0]
    assert history(trainer, "loss") == pytest.approx(losses, rel=1e-6)
    for a, b in zip(trainer.model.lm.parameters(), lm.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)  # Adam divides a gradient by its size, even mere rounding


def test_a_cached_contrast_is_in_the_dtype_of_the_batch(tmp_path, tiny_rows, tiny_tokenizer):
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "contrastive_batch_size": 16}
    losses = []
    for batches in ({"per_device_train_batch_size": 16}, parts):
        trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, bf16=True, max_steps=1, **batches)
        trainer.train()
        losses.append(history(trainer, "sequence"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
