"""Compiled layers compute what uncompiled ones do, are compiled once, and change neither names, checkpoints nor resuming."""

from __future__ import annotations

import pytest
import torch
from conftest import make_lm
from sweep import DEVICES
from test_trainer import make_trainer, weights
from torch._dynamo.utils import counters

from cmlm_fast import CMLMConfig, CMLMModel
from cmlm_fast.attention import Packing, attention_forward, packing_of
from cmlm_fast.compiling import compile_layers
from cmlm_fast.layers import use_low_precision_layer_norm

DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def masked(tmp_path, tiny_rows, tiny_tokenizer):
    """Row numbers -> a masked batch."""
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer)
    return lambda rows, step=0: trainer.mask(trainer.data_collator([tiny_rows[i] for i in rows]), step)


def step(model, batch, seed=0):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_equal_to_uncompiled_and_compiled_once(masked):
    plain, compiled = (CMLMModel(make_lm(layers=3), CMLMConfig(token_temperature=0.2)) for _ in range(2))
    compiled.compile_layers()
    assert list(compiled.state_dict()) == list(plain.state_dict())
    graphs = []
    # The first batch has 8 bounds and heads are 8 wide: sizes that are equal by chance must not be taken for a rule.
    for number, rows in enumerate([(0, 5, 9), (1, 2, 3), (7, 8), range(11), (300, 301, 302, 17), (400,), range(40, 70)]):
        with torch._dynamo.config.patch(error_on_recompile=True):
            batch = masked(rows, number)
            (loss, gradient), (loss_compiled, gradient_compiled) = step(plain, batch), step(compiled, batch)
        torch.testing.assert_close(loss_compiled, loss, rtol=1e-4, atol=0)
        assert (gradient_compiled - gradient).norm() < 1e-4 * gradient.norm()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and len(set(graphs)) == 1


@pytest.mark.parametrize("device", [pytest.param(d, marks=[pytest.mark.gpu] if d == "cuda" else []) for d in DEVICES])
def test_where_pytorch_attends_layers_are_compiled_once_more(device, masked, monkeypatch):
    # As on a GPU, where sequences above 128 tokens go to PyTorch; here, small numbers of sequences do.
    monkeypatch.setattr("cmlm_fast.encoding.packing_of", lambda *args: (packing_of if len(args[0]) > 6 else Packing)(*args))
    plain, compiled = (CMLMModel(make_lm(), CMLMConfig(token_temperature=0.2)).to(device) for _ in range(2))
    compiled.compile_layers()
    batches = [masked(rows) for rows in ((0, 5, 9, 12), (1, 200), (7, 8), (300, 201, 3, 4), range(11), (6, 10))]
    for number, batch in enumerate(batches):
        batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            (loss, gradient), (loss_compiled, gradient_compiled) = step(plain, batch), step(compiled, batch)
        torch.testing.assert_close(loss_compiled, loss, rtol=1e-4, atol=0)
        assert (gradient_compiled - gradient).norm() < 1e-4 * gradient.norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_layer_norms_of_low_precision_differ_by_roundings(compiled, masked):
    plain, low = (CMLMModel(make_lm(), CMLMConfig(token_temperature=0.2)) for _ in range(2))
    use_low_precision_layer_norm(low.lm)
    assert list(low.state_dict()) == list(plain.state_dict())
    if compiled:
        low.compile_layers(backend="aot_eager")  # Inductor takes many times as long
    seen = set()
    for layer in low.lm.base_model.encoder.layer:
        layer.register_forward_hook(lambda module, args, out: seen.add((out if torch.is_tensor(out) else out[0]).dtype))
    batch = masked(range(30))
    exact, exact_gradient = step(plain, batch)
    float32, float32_gradient = step(low, batch)  # without autocast nothing changes
    torch.testing.assert_close(float32, exact, rtol=1e-5, atol=0)
    assert (float32_gradient - exact_gradient).norm() < 1e-4 * exact_gradient.norm() and seen == {torch.float32}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        (loss, gradient), (loss_low, gradient_low) = step(plain, batch), step(low, batch)
    assert seen == {torch.bfloat16} and loss_low != loss
    for found, by in ((loss, gradient), (loss_low, gradient_low)):
        torch.testing.assert_close(found, exact, rtol=0.01, atol=0)
        assert (by - exact_gradient).norm() < 0.05 * exact_gradient.norm()


@pytest.mark.parametrize("device", [pytest.param(d, marks=[pytest.mark.gpu] if d == "cuda" else []) for d in DEVICES])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_backward_pass_drops_what_the_forward_pass_dropped(compiled, device):
    lengths = (40, 30, 17)
    packing = packing_of(lengths, torch.tensor([0, 40, 70, 87], dtype=torch.int32, device=device))
    query, key, value, upstream = torch.randn(4, 1, 4, 87, 16, device=device).unbind()
    attend = torch.compile(attention_forward, dynamic=True) if compiled else attention_forward
    value.requires_grad_()
    counters.clear()
    out, _ = attend(torch.nn.Module(), query, key, value, None, dropout=0.3, packing=packing)
    assert not counters["graph_break"]  # a layer is one graph
    weighted = out * upstream.transpose(1, 2)
    (gradient,) = torch.autograd.grad(weighted.sum(), value)
    # Outputs are linear in the values: these sums are equal if the same weights were dropped, else differ by 1e-3.
    assert abs((gradient * value).sum() - weighted.sum()) < 1e-5 * weighted.abs().sum()
    again, _ = attend(torch.nn.Module(), query, key, value, None, dropout=0.3, packing=packing)
    assert not torch.equal(again, out)


def test_recomputed_activations_and_a_pass_without_gradient_draw_the_same(masked):
    batch = masked((1, 2, 3, 200))
    model = CMLMModel(make_lm(**DROPOUT)).train()
    model.compile_layers()
    loss, gradient = step(model, batch)
    assert step(model, batch)[0] == loss != step(model, batch, seed=1)[0]
    torch.manual_seed(0)
    vectors = model(**batch, vectors_only=True)[0]
    torch.manual_seed(0)
    with torch.no_grad():  # as in the first pass of gradient caching
        torch.testing.assert_close(model(**batch, vectors_only=True)[0], vectors, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    model.activation_checkpointing_enable()
    again = step(model, batch)
    assert counters["stats"]["unique_graphs"] > before  # PyTorch by itself would run them uncompiled
    torch.testing.assert_close(again, (loss, gradient), rtol=1e-5, atol=1e-6)


def test_a_compiled_run_repeats_itself_resumes_and_saves_plain_checkpoints(tmp_path, tiny_rows, tiny_tokenizer):
    def trainer(folder):
        return make_trainer(tmp_path / folder, tiny_rows, tiny_tokenizer, lm=make_lm(**DROPOUT), torch_compile=True,
                            save_strategy="steps", save_steps=2)  # fmt: skip

    whole = trainer("whole")
    before = counters["stats"]["unique_graphs"]
    whole.train()
    assert counters["stats"]["unique_graphs"] > before
    assert type(whole.accelerator.prepare(whole.model)) is CMLMModel  # accelerate compiles nothing
    for other, start in ((trainer("again"), None), (trainer("resumed"), str(tmp_path / "whole" / "checkpoint-2"))):
        other.train(resume_from_checkpoint=start)
        assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(other), strict=True))
    whole.save_model(str(tmp_path / "saved"))
    saved = type(whole.model.lm).from_pretrained(tmp_path / "saved").state_dict()
    assert saved.keys() == make_lm().state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in whole.model.lm.state_dict().items())


def test_an_encoder_without_layers_is_refused():
    lm = make_lm()
    lm.bert.encoder.layer = torch.nn.Identity()
    with pytest.raises(ValueError, match="expected lm to have a list of layers of one class, got BertForMaskedLM"):
        compile_layers(lm)
