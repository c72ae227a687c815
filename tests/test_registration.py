"""Every op on every backend is a well-behaved torch op: opcheck, gradcheck in double, torch.compile, error texts."""

from __future__ import annotations

import pytest
import torch
from sweep import EVERY, FEW, GRADIENTS, cases, sample
from torch._dynamo.testing import CompileCounterWithBackend

import cmlm_fast
from cmlm_fast._library import contracts, op
from cmlm_fast.backends import BACKENDS

# An op's registration is the same for every sample, so only samples of different form are needed.
FORMS = [case for case in cases((torch.float32, torch.int64), FEW) if case.values[4] in (*FEW, "non-contiguous", "empty")]


def test_the_few_samples_of_the_interpreter_are_there_and_of_every_op():
    labels = {name: {label for label, _ in contract.samples(contract.dtypes[0], torch.device("cpu"))}
              for name, contract in contracts.items() if cmlm_fast.available(name)["triton"] is None}  # fmt: skip
    assert set(GRADIENTS) <= set.union(set(), *labels.values()) or not labels
    assert all(found & set(FEW) for found in labels.values())


@pytest.mark.parametrize(EVERY, FORMS)
def test_opcheck(name, suffix, device, dtype, label):
    args = list(sample(name, dtype, device, label))
    for position in contracts[name].differentiable:
        args[position] = args[position].detach().requires_grad_()
    report = torch.library.opcheck(op(name, suffix), tuple(args))
    assert set(report.values()) == {"SUCCESS"}


@pytest.mark.parametrize(EVERY, cases((torch.float64,), FEW))
def test_gradcheck_in_double(name, suffix, device, dtype, label):
    args = list(sample(name, dtype, device, label))
    positions = contracts[name].differentiable
    leaves = tuple(args[position].detach().requires_grad_() for position in positions)

    def output(*values):
        for position, value in zip(positions, values, strict=True):
            args[position] = value
        out = op(name, suffix)(*args)
        out = out[0] if isinstance(out, tuple) else out
        return torch.where(torch.isfinite(out), out, 0.0)

    # Small τ makes the third derivative large, and with it the finite differences' own error.
    assert torch.autograd.gradcheck(output, leaves, fast_mode=True, eps=1e-7, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["info_nce", "token_contrastive"])
def test_a_gradient_belongs_to_who_asked_for_it(name, dtype):
    """The forward pass made it: after a change in place, a retained graph must still return the original."""
    one, two = (torch.randn(6, 32, generator=torch.Generator().manual_seed(i)).to(dtype).requires_grad_() for i in (0, 1))
    rest = () if name == "info_nce" else (torch.arange(6),)
    once = torch.autograd.grad(getattr(cmlm_fast, name)(one, two, *rest), (one, two))
    loss = getattr(cmlm_fast, name)(one, two, *rest)
    for gradient in torch.autograd.grad(loss, (one, two), retain_graph=True):
        gradient.zero_()
    loss.backward(retain_graph=True)
    one.grad.zero_()
    loss.backward()
    assert torch.equal(one.grad, once[0]) and torch.equal(two.grad, 2 * once[1])
    twice = torch.autograd.grad(2 * getattr(cmlm_fast, name)(one, two, *rest), (one, two))
    assert all(torch.equal(b, 2 * a) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize(EVERY, FORMS)
def test_compiles_without_graph_break(name, suffix, device, dtype, label):
    args = sample(name, dtype, device, label)
    torch._dynamo.reset()
    plain = op(name, suffix)(*args)
    compiled = torch.compile(op(name, suffix), fullgraph=True, backend="aot_eager")(*args)
    pairs = zip(plain, compiled, strict=True) if isinstance(plain, tuple) else [(plain, compiled)]
    assert all(torch.equal(a, b) for a, b in pairs)


def rows(n, d=8, **options):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(n), **options)


IDS = torch.arange(5, 69).view(4, 16) % 45 + 5
TOP = torch.tensor([0, 1], dtype=torch.int32)  # bounds count up to the number of rows
TWELVE, TWENTY = torch.arange(12), torch.arange(20)
HEAD_TARGET = torch.tensor([1, 2, -100, 4, 29, -100, 0, 3, -100, 5, 6, 7])
BOUNDS, SEED = torch.tensor([0, 5, 12], dtype=torch.int32), torch.tensor(2**40)
Q, K, VOCABULARY = rows(12).requires_grad_(), rows(20), rows(30)

PUBLIC = {
    "complementary_mask": lambda step: cmlm_fast.complementary_mask(
        IDS, mask_token_id=3, vocab_size=50, special_ids=(0, 1, 2, 3), step=step
    ).view1.sum(),
    "token_contrastive": lambda step: cmlm_fast.token_contrastive(
        Q, K, TWELVE, query_token=TWELVE, key_token=TWENTY
    ),
    "token_similarity": lambda step: cmlm_fast.token_similarity(Q, K).sum(),
    "info_nce": lambda step: cmlm_fast.info_nce(Q, K[:12], scheme="nt_xent"),
    "mlm_cross_entropy": lambda step: cmlm_fast.mlm_cross_entropy(Q, VOCABULARY, None, HEAD_TARGET),
    "varlen_attention": lambda step: cmlm_fast.varlen_attention(*[Q[:, None]] * 3, BOUNDS, dropout=0.2, seed=SEED + step).sum(),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_function_compiles_once(name):
    call = PUBLIC[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    plain = [call(step).item() for step in range(2, 8)]
    assert [compiled(step).item() for step in range(2, 8)] == pytest.approx(plain, rel=1e-6)
    # A changing step becomes a dynamic integer on its first change; everything else compiles once.
    assert counter.frame_count <= (2 if name in ("complementary_mask", "varlen_attention") else 1)


@pytest.mark.parametrize("loss", [
    lambda x, y: cmlm_fast.token_contrastive(x, y, torch.arange(8, device=x.device)), cmlm_fast.info_nce,
])  # fmt: skip
def test_compiled_autograd_traces_the_backward_pass(loss):
    # 16 bits on any device but the CPU, which meta tensors stand for
    x, y = (torch.randn(8, 16, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in "xy")
    out = loss(x, y)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        out.backward()
    assert x.grad.shape == x.shape and y.grad.dtype == torch.bfloat16


def test_a_seed_that_changes_is_a_number_that_compiled_code_can_hold():
    torch._dynamo.reset()
    ones = torch.ones(12, 1, 4)

    def draw(seed):
        masked = cmlm_fast.complementary_mask(IDS, mask_token_id=3, vocab_size=50, special_ids=(0, 1, 2, 3), seed=seed)
        return cmlm_fast.varlen_attention(ones, ones, ones, BOUNDS, dropout=0.5, seed=seed), masked.role

    compiled = torch.compile(draw, fullgraph=True)  # Inductor's code has no number of more than 64 bits
    for seed in (1, 2, 3, -1, 2**63 - 1, 2**63 + 5, 2**64 - 1):
        assert all(map(torch.equal, compiled(seed), draw(seed)))


VARIED = {
    "token_contrastive": lambda a, b, i: cmlm_fast.token_contrastive(a, b, i, query_token=i, key_token=b[:, 0].long()),
    "info_nce": lambda a, b, i: cmlm_fast.info_nce(a, b[: a.shape[0]]),
    "info_nce with labels": lambda a, b, i: cmlm_fast.info_nce(a, b[: a.shape[0]], labels=i % 3),
    "mlm_cross_entropy": lambda a, b, i: cmlm_fast.mlm_cross_entropy(a, VOCABULARY, None, i),
    "varlen_attention": lambda a, b, i: cmlm_fast.varlen_attention(*[a[:, None]] * 3, i[[0, -1]].int() + TOP).sum(),
}


@pytest.mark.parametrize("name", VARIED)
def test_sizes_that_change_are_compiled_once(name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(VARIED[name], fullgraph=True, dynamic=True, backend=counter)
    for n in range(3, 15):
        args = rows(n), rows(2 * n + 1), torch.arange(n)
        assert compiled(*args).item() == pytest.approx(VARIED[name](*args).item(), rel=1e-5)
    assert counter.frame_count <= 2


def test_training_step_compiles_with_inductor():
    def step(query, key, z1, z2, target):
        return cmlm_fast.token_contrastive(query, key, target) + 0.1 * cmlm_fast.info_nce(z1, z2)

    def run(function):
        leaves = [rows(n).requires_grad_() for n in (12, 20, 6, 7)]
        leaves[3] = rows(6).requires_grad_()
        loss = function(*leaves, torch.arange(12))
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    torch._dynamo.reset()
    for got, expected in zip(run(torch.compile(step, fullgraph=True)), run(step), strict=True):
        torch.testing.assert_close(got, expected)


BAD = {
    "query": (lambda: cmlm_fast.token_contrastive(rows(3)[0], rows(4), torch.zeros(3, dtype=torch.int64)), "query"),
    "width": (lambda: cmlm_fast.token_contrastive(rows(3, 7), rows(4), torch.zeros(3, dtype=torch.int64)), "key"),
    "dtype": (lambda: cmlm_fast.token_contrastive(rows(3), rows(4).half(), torch.zeros(3, dtype=torch.int64)), "key"),
    "integer rows": (lambda: cmlm_fast.info_nce(rows(3).long(), rows(3).long()), "z1"),
    "device": (lambda: cmlm_fast.info_nce(rows(3), rows(3).to("meta")), "z2"),
    "batch": (lambda: cmlm_fast.info_nce(rows(3), rows(4)), "z2"),
    "scheme": (lambda: cmlm_fast.info_nce(rows(3), rows(3), scheme="simclr"), "scheme"),
    "symmetric": (lambda: cmlm_fast.info_nce(rows(3), rows(3), scheme="nt_xent", symmetric=False), "symmetric"),
    "reduction": (lambda: cmlm_fast.info_nce(rows(3), rows(3), reduction="batchmean"), "reduction"),
    "zero temperature": (lambda: cmlm_fast.info_nce(rows(3), rows(3), temperature=0.0), "temperature"),
    "NaN temperature": (lambda: cmlm_fast.info_nce(rows(3), rows(3), temperature=float("nan")), "temperature"),
    "target shape": (lambda: cmlm_fast.token_contrastive(rows(3), rows(4), torch.zeros(2, dtype=torch.int64)), "target"),
    "target dtype": (lambda: cmlm_fast.token_contrastive(rows(3), rows(4), torch.zeros(3, dtype=torch.int32)), "target"),
    "lone query_token": (
        lambda: cmlm_fast.token_contrastive(rows(3), rows(4), torch.arange(3), query_token=torch.arange(3)),
        "key_token",
    ),
    "head width": (lambda: cmlm_fast.mlm_cross_entropy(rows(3), rows(9, 7), None, torch.arange(3)), "weight"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_argument_rule_and_value(case):
    call, argument = BAD[case]
    with pytest.raises(ValueError, match=rf"cmlm_fast::\w+: expected {argument} to be .+, got .+"):
        call()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if cmlm_fast.available("info_nce")[b] is None])
def test_bad_values_have_the_same_words_on_every_backend(backend):
    with pytest.raises(RuntimeError, match=r"expected target to be in \[0, M = 4\) or -100, got 4"):
        cmlm_fast.token_contrastive(rows(3), rows(4), torch.tensor([0, 4, -100]), backend=backend)
    with pytest.raises(RuntimeError, match=r"expected target to be in \[0, M = 4\) or -100, got -1"):
        cmlm_fast.token_contrastive(rows(3), rows(4), torch.tensor([0, -1, -100]), backend=backend)
    for bad in (float("nan"), 0.0, -1.0, float("inf")):
        with pytest.raises(RuntimeError, match="expected temperature to be finite and > 0, got"):
            cmlm_fast.info_nce(rows(3), rows(3), temperature=torch.tensor(bad), backend=backend)
        with pytest.raises(RuntimeError, match="expected temperature to be finite and > 0, got"):
            cmlm_fast.token_contrastive(rows(3), rows(4), torch.arange(3), temperature=torch.tensor(bad), backend=backend)
