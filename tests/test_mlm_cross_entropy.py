"""mlm_cross_entropy: PyTorch's own loss on the rows that count."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sweep import DEVICES, EVERY, cases, sample
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from cmlm_fast import mlm_cross_entropy, token_contrastive
from cmlm_fast._library import op
from cmlm_fast.ops._linear import _Linear


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equals_cross_entropy_with_ignored_rows(reduction, bias, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).to(dtype).requires_grad_() for n in (40, 90))
    b = torch.randn(90, generator=generator).to(dtype).requires_grad_() if bias else None
    target = torch.randint(0, 90, (40,), generator=generator)
    target[::3] = -100
    leaves = [hidden, weight, *([b] if b is not None else [])]
    got = mlm_cross_entropy(hidden, weight, b, target, reduction=reduction)
    wide = F.linear(hidden, weight, b).to(torch.promote_types(dtype, torch.float32))
    expected = F.cross_entropy(wide, target, reduction=reduction)
    torch.testing.assert_close(got, expected)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_under_autocast_no_further_from_the_truth_than_twice_eager(kind):
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*shape, generator=generator) for shape in ((250, 32), (400, 32), (400,))]
    target = torch.randint(0, 400, (250,), generator=generator)

    def run(loss, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in leaves]
        with torch.autocast("cpu", kind, enabled=dtype == torch.float32):
            value = loss(*inputs)
        return value, *torch.autograd.grad(value, inputs)

    eager = lambda hidden, weight, bias: F.cross_entropy(F.linear(hidden, weight, bias).float(), target)  # noqa: E731
    truth = run(lambda *inputs: F.cross_entropy(F.linear(*inputs), target), torch.float64)
    for exact, ours, theirs in zip(truth, run(lambda *inputs: mlm_cross_entropy(*inputs, target), torch.float32),
                                   run(eager, torch.float32), strict=True):  # fmt: skip
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


SMALL = [case for case in cases() if case.values[0] == "softmax_loss" and case.values[4] == "odd"]


@pytest.mark.parametrize(EVERY, [case for case in SMALL if case.values[3].itemsize == 2])
def test_a_slope_is_rounded_once(name, suffix, device, dtype, label):
    logits, target = sample(name, dtype, device, label)
    logits = logits.scatter(1, target[:, None], 10)  # p near 1, where 16 bits leave no digits of 1 - p
    _, slopes = op(name, suffix)(logits, target)
    true = torch.softmax(logits.double(), 1).scatter_add(1, target[:, None], -torch.ones_like(logits[:, :1]).double())
    torch.testing.assert_close(slopes.double(), true, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(EVERY, SMALL)
def test_logits_at_the_end_of_their_range(name, suffix, device, dtype, label):
    logits = torch.full((2, 100), torch.finfo(dtype).min, dtype=dtype, device=device)  # as attention masks are filled
    logits[1, 7] = 0
    losses, slopes = op(name, suffix)(logits, torch.tensor([3, 7], device=device))
    expected = F.cross_entropy(logits.double(), torch.tensor([3, 7], device=device), reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)
    wanted = torch.softmax(logits.double(), 1)
    wanted[0, 3], wanted[1, 7] = wanted[0, 3] - 1, 0
    torch.testing.assert_close(slopes.double(), wanted, rtol=8 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(EVERY, [case for case in SMALL if case.values[2:4] == ("cpu", torch.float32)])
@pytest.mark.parametrize("column", [-1, 100])
def test_the_op_itself_refuses_what_is_no_column(name, suffix, device, dtype, label, column):
    logits, target = sample(name, dtype, device, label)
    target[3] = column
    with pytest.raises(RuntimeError, match=rf"expected target to be in \[0, V = 100\) or -100, got \[?{column}"):
        op(name, suffix)(logits, target)


@pytest.mark.parametrize("device", [pytest.param(d, marks=[pytest.mark.gpu] if d == "cuda" else []) for d in DEVICES[-1:]])
@pytest.mark.parametrize("label", [-1, 30, 32, 64])
def test_where_nothing_checks_it_a_target_that_is_no_word_gives_nan(label, device, monkeypatch):
    pytest.importorskip("triton")
    from cmlm_fast.kernels import softmax_loss as kernel

    monkeypatch.setattr(kernel, "interpreted", lambda tensor: False)  # the interpreter checks values
    logits = torch.randn(2, 32, device=device)
    logits[:, 30:] = float("-inf")  # a banned word: as in F.cross_entropy
    losses, slopes = kernel.softmax_loss(logits, torch.tensor([label, 3], device=device))
    assert losses[1].isfinite() and slopes[1].isfinite().all()
    if label == 30:
        assert losses[0] == float("inf") and slopes[0].isfinite().all() and slopes[0, 30] == -1
    else:
        assert losses[0].isnan() and slopes[0].isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_a_vocabulary_that_cublas_is_slow_with(bias, dtype):
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, 48, generator=generator).to(dtype) / 4 for n in (40, 1003)]
    leaves += [torch.randn(1003, generator=generator).to(dtype)] if bias else []
    target = torch.randint(0, 1003, (40,), generator=generator)
    target[0], target[::3] = 1002, -100
    truth = [x.double().requires_grad_() for x in leaves]
    exact = F.cross_entropy(F.linear(*truth), target)
    ours = [x.cuda().requires_grad_() for x in leaves]
    with torch.profiler.profile() as profile:
        got = mlm_cross_entropy(ours[0], ours[1], ours[2] if bias else None, target.cuda())
    assert "cmlm_fast::softmax_loss_triton" in {event.key for event in profile.key_averages()}
    beyond = mlm_cross_entropy(ours[0], ours[1], None, target.cuda().clamp_min(1003), reduction="none")
    assert beyond.isnan().all()  # not a word, though the product may have such a column
    near = 1e-5 if dtype == torch.float32 else 2e-2
    assert got.item() == pytest.approx(exact.item(), rel=near)
    for found, true in zip(torch.autograd.grad(got, ours), torch.autograd.grad(exact, truth), strict=True):
        assert found.dtype == dtype and (found.double().cpu() - true).norm() < near * true.norm()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_predict_gives_zero_not_nan(reduction, rows):
    hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    loss = mlm_cross_entropy(hidden, weight, None, torch.full((rows,), -100), reduction=reduction)
    loss.sum().backward()
    assert not loss.any() and not hidden.grad.any() and not weight.grad.any()


def test_target_outside_the_vocabulary():
    with pytest.raises(RuntimeError, match=r"expected target to be in \[0, V = 20\) or -100, got \[1, 20\]"):
        mlm_cross_entropy(torch.randn(3, 8), torch.randn(20, 8), None, torch.tensor([1, 20, -100]))


def test_two_dtypes_are_one_too_many_outside_autocast():
    hidden, weight, target = torch.randn(3, 8), torch.randn(9, 8, dtype=torch.bfloat16), torch.tensor([1, 2, 8])
    with pytest.raises(ValueError, match=r"weight to be torch.float32 like hidden, got torch.bfloat16"):
        mlm_cross_entropy(hidden, weight, None, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert mlm_cross_entropy(hidden, weight, None, target).isfinite()


@pytest.mark.parametrize("stride", [0, 2])
def test_a_bias_of_any_stride(stride):
    hidden, weight, target = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([1, 0, 4])
    bias = torch.randn(10).as_strided((5,), (stride,))
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    ours, theirs = mlm_cross_entropy(*leaves, bias, target), F.cross_entropy(F.linear(*leaves, bias), target)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_there_is_no_second_derivative():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = mlm_cross_entropy(hidden, weight, None, torch.tensor([1, 0, 4]))
    with pytest.raises(RuntimeError, match=r"expected create_graph to be False \(there is no second derivative\), got True"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="expected create_graph to be False"):
        torch.autograd.grad(_Linear.apply(hidden, weight, None).sum(), hidden, create_graph=True)


def test_compiled_an_ignored_row_is_nothing_to_the_weights_either():
    hidden = torch.randn(3, 4).index_fill(0, torch.tensor([1]), float("nan")).requires_grad_()
    weight, target = torch.randn(5, 4, requires_grad=True), torch.tensor([1, -100, 4])
    compiled = torch.compile(mlm_cross_entropy, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(mlm_cross_entropy(hidden, weight, None, target), (hidden, weight))
    torch.testing.assert_close(torch.autograd.grad(compiled(hidden, weight, None, target), (hidden, weight)), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shapes_alone_and_traces_hold_every_row(reduction):
    leaves = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True), torch.randn(5, requires_grad=True)

    def gradients(*inputs):
        loss = mlm_cross_entropy(*inputs, reduction=reduction)
        return loss, *torch.autograd.grad(loss.sum(), inputs[:3])

    target = torch.tensor([1, -100, 4])
    traced = make_fx(gradients)(*leaves, target)
    for other in (target, torch.tensor([-100, 0, -100])):  # also with a number of rows that the trace has not seen
        for got, expected in zip(traced(*leaves, other), gradients(*leaves, other), strict=True):
            torch.testing.assert_close(got, expected)
    with FakeTensorMode() as mode:
        loss = mlm_cross_entropy(*map(mode.from_tensor, (*leaves, target)), reduction=reduction)
        assert loss.shape == (() if reduction == "mean" else (3,))


def test_all_stand_on_one_device():
    hidden, weight, target = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([1, 0, 4])
    with pytest.raises(ValueError, match="expected bias to be on cpu like hidden, got meta"):
        mlm_cross_entropy(hidden, weight, torch.zeros(5, device="meta"), target)
    shapes = [x.to("meta") for x in (hidden, weight)]
    assert token_contrastive(*shapes, target.to("meta")).shape == ()
    assert mlm_cross_entropy(*shapes, None, target.to("meta")).is_meta


def test_what_is_no_tensor_says_so():
    with pytest.raises(ValueError, match="cmlm_fast::token_contrastive: expected query to be a tensor, got ndarray"):
        token_contrastive(torch.randn(2, 4).numpy(), torch.randn(3, 4).numpy(), torch.tensor([0, 1]))
