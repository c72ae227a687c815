"""Post-training on a GPU: packed batches, flash attention with dropout, a step that never waits, a run that learns."""

from __future__ import annotations

import pytest
import torch
from conftest import make_lm
from test_modeling import packed_and_padded
from test_trainer import history, make_trainer, weights
from transformers import TrainerCallback

from cmlm_fast import CMLMConfig, CMLMModel
from cmlm_fast.attention import attention_forward, packing_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def on_gpu(batch):
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


@pytest.mark.parametrize(("autocast", "near"), [(False, 1e-4), (True, 0.05)])
@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "distilbert", "electra", "modernbert"])
def test_packed_equals_padded(kind, autocast, near, tiny_lm, tiny_rows, tiny_tokenizer):
    options = {"local_attention": 8, "global_attn_every_n_layers": 2} if kind == "modernbert" else {}
    model = CMLMModel(tiny_lm(kind, **options), CMLMConfig(token_temperature=0.2, sequence_weight=0.5))
    batches = list(packed_and_padded(model, tiny_rows, tiny_tokenizer, (0, 5, 9, 200, 201, 7)))
    exact = model(**batches[1])
    expected = torch.autograd.grad(exact.loss, list(model.parameters()), allow_unused=True)
    model.cuda()
    for batch in map(on_gpu, batches):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            output = model(**batch)
        torch.testing.assert_close(output.sums.cpu(), exact.sums, rtol=near, atol=near)
        found = torch.autograd.grad(output.loss, list(model.parameters()), allow_unused=True)
        pairs = [(a.cpu(), b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
        error = torch.stack([(a - b).norm() for a, b in pairs]).norm() / torch.stack([b.norm() for _, b in pairs]).norm()
        assert len(pairs) > 10 and error < near


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("last", [17, 200])  # Triton's kernels; flash attention, or SDPA
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dropout_of_packed_attention(dtype, last, compiled):
    # With equal scores and values of one, an output is the share of weights kept over 1 − p, whose mean is one.
    lengths, p = (40, 40, last), 0.25
    cu_seqlens = torch.tensor([0, 40, 80, 80 + last], dtype=torch.int32, device="cuda")
    options = {"device": "cuda", "dtype": dtype, "requires_grad": True}
    zero, value = (torch.full((1, 4, 80 + last, 64), fill, **options) for fill in (0.0, 1.0))
    attend = torch.compile(attention_forward, dynamic=True) if compiled else attention_forward

    def draw(seed):
        torch.manual_seed(seed)
        out, _ = attend(torch.nn.Module(), zero, zero, value, None, dropout=p, packing=packing_of(lengths, cu_seqlens))
        (gradient,) = torch.autograd.grad(out.float().sum(), value)
        return out.float(), gradient.float()

    out, gradient = draw(0)
    assert all(map(torch.equal, draw(0), (out, gradient))) and not torch.equal(draw(1)[0], out)
    several = torch.stack([draw(seed)[0][0, :, :, 0] for seed in range(200)])
    assert (several.mean() - 1).abs() < 0.01
    expected = (p / (1 - p) / 40) ** 0.5  # standard deviation of a mean of 40 kept or dropped weights
    assert several[:, :80].std().item() == pytest.approx(expected, rel=0.1)
    # A value's gradient is the weight that was kept of it, so gradients and outputs have the same sum.
    torch.testing.assert_close(gradient.sum(), out.sum(), rtol=5e-3, atol=0)


@pytest.mark.parametrize(("autocast", "near"), [(False, 1e-3), (True, 0.05)])
def test_compiled_layers_equal_others_and_are_compiled_once(autocast, near, tiny_rows, tiny_tokenizer):
    models = [CMLMModel(make_lm(), CMLMConfig(token_temperature=0.2)).cuda() for _ in range(2)]
    torch._dynamo.reset()
    models[1].compile_layers()
    for rows in [(0, 5, 9), (1, 2, 3), (7, 8), range(11), (300, 301, 302, 17), (400,), range(40, 70)]:
        batch = on_gpu(next(iter(packed_and_padded(models[0], tiny_rows, tiny_tokenizer, rows))))
        found = []
        with torch._dynamo.config.patch(error_on_recompile=True), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            losses = [model(**batch).loss for model in models]
            for model, loss in zip(models, losses, strict=True):
                gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
                found.append(torch.cat([g.flatten() for g in gradients if g is not None]))
        torch.testing.assert_close(losses[1], losses[0], rtol=near, atol=0)
        assert (found[1] - found[0]).norm() < near * found[0].norm()


@pytest.mark.parametrize("changes", [{}, {"scope": "sequence", "pooling": "cls", "mlm_views": "first"}])
@pytest.mark.parametrize("bf16", [True, False])
def test_a_step_never_waits_for_the_device(bf16, changes, tmp_path, tiny_rows, tiny_tokenizer, tiny_lm):
    lm = tiny_lm(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    trainer = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, lm=lm, config=CMLMConfig(**changes), bf16=bf16, use_cpu=False,
                           logging_steps=100)  # fmt: skip
    trainer.state.max_steps = 10
    trainer.create_optimizer_and_scheduler(10)
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    batch = trainer.data_collator([tiny_rows[i] for i in range(8)])
    pinned = {name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}

    def step():
        (inputs,), _ = trainer.get_batch_samples(iter([dict(pinned)]), 1, trainer.args.device)
        trainer.training_step(model, inputs)
        trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_training_never_waits_for_the_device_between_two_entries_of_its_log(streamed, tmp_path, tiny_rows, tiny_tokenizer,
                                                                              tiny_lm):  # fmt: skip
    # The loop of `train` itself, with its loader.
    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.set_sync_debug_mode("error" if 2 <= state.global_step < 7 else "default")

    options = {"use_cpu": False, "bf16": True, "logging_steps": 100, "max_steps": 8, "dataloader_pin_memory": True}
    rows = tiny_rows.to_iterable_dataset() if streamed else tiny_rows
    trainer = make_trainer(tmp_path, rows, tiny_tokenizer, lm=tiny_lm(hidden_dropout_prob=0.1), **options)
    trainer.add_callback(Watch())
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.global_step == 8


@pytest.mark.parametrize("bf16", [True, False])
def test_a_run_learns_and_resumes(bf16, tmp_path, tiny_rows, tiny_tokenizer):
    options = {"use_cpu": False, "bf16": bf16, "max_steps": 40, "learning_rate": 3e-3, "per_device_train_batch_size": 32,
               "save_strategy": "steps", "save_steps": 20, "dataloader_pin_memory": True}  # fmt: skip
    whole = make_trainer(tmp_path, tiny_rows, tiny_tokenizer, **options)
    whole.train()
    for part in ("loss", "mlm", "token", "sequence"):
        values = history(whole, part)
        assert sum(values[-10:]) < 0.95 * sum(values[:10]), part
    resumed = make_trainer(tmp_path / "again", tiny_rows, tiny_tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    # On a GPU the order of additions differs from run to run; a step that was skipped or done twice would still show.
    for a, b in zip(weights(whole), weights(resumed), strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=5e-3)
    assert history(resumed, "loss")[-1] == pytest.approx(history(whole, "loss")[-1], rel=0.02)
