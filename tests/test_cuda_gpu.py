"""The CUDA kernels on a GPU: captured in a graph, never waiting for the device, on the current stream and device."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cmlm_fast import available, complementary_mask, info_nce, token_contrastive

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
VOCABULARY = {"mask_token_id": 3, "vocab_size": 1000, "special_ids": (0, 1, 2, 3)}


@pytest.fixture(autouse=True)
def kernels_are_there():
    assert available("info_nce", "cuda")["cuda"] is None, available("info_nce", "cuda")["cuda"]


def rows(n, d=64, seed=0, device="cuda", dtype=torch.bfloat16):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed + n), dtype=torch.float32).to(device, dtype)


class Step:
    """One training step's ops on fixed memory; calling it returns losses, gradients and masks."""

    def __init__(self, device="cuda", large=False):
        n, m, b = (2048, 4097, 5001) if large else (200, 300, 70)  # odd sizes, whose products take padded copies
        self.leaves = [rows(k, seed=s, device=device).requires_grad_() for s, k in enumerate((n, m, b, b))]
        self.leaves.append(torch.tensor(0.07, device=device, requires_grad=True))
        self.target = torch.arange(n, device=device)
        self.start = torch.arange(n, device=device, dtype=torch.int32) // 2
        self.ids = torch.randint(4, 1000, (8, 128), device=device)
        complementary_mask(self.ids, **VOCABULARY, backend="cuda")  # copies the special ids to the device, once

    def __call__(self):
        query, key, z1, z2, tau = self.leaves
        options = {"temperature": tau, "backend": "cuda"}
        loss = token_contrastive(query, key, self.target, **options)
        loss = loss + token_contrastive(query, key, self.target, key_start=self.start, reduction="none", **options).mean()
        loss = loss + info_nce(z1, z2, **options) + info_nce(z1, z2, scheme="nt_xent", **options)
        masked = complementary_mask(self.ids, **VOCABULARY, backend="cuda")
        return [loss.detach(), *torch.autograd.grad(loss, self.leaves), *masked]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batched_gradients(dtype):
    query, key, several = rows(9, dtype=dtype).requires_grad_(), rows(12, dtype=dtype), torch.tensor([1.0, 2.0], device="cuda")
    loss = token_contrastive(query, key, torch.arange(9, device="cuda"))
    (found,) = torch.autograd.grad(loss, query, several, is_grads_batched=True, retain_graph=True)
    for got, factor in zip(found, several, strict=True):
        assert torch.equal(got, torch.autograd.grad(loss, query, factor, retain_graph=True)[0])


@pytest.mark.parametrize("large", [False, True])
def test_a_step_never_waits_for_the_device(large):
    step = Step(large=large)
    step()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("large", [False, True])
def test_a_step_is_captured_in_a_graph(large):
    step = Step(large=large)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [step() for _ in range(3)][-1]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in captured:
        tensor.zero_()
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, captured, expected))


def test_work_goes_to_the_current_stream():
    step = Step()
    expected = step()
    torch.cuda.synchronize()
    late, side = [leaf.detach().clone() for leaf in step.leaves], torch.cuda.Stream()
    torch.cuda.synchronize()  # otherwise the side stream may overwrite what is still being copied
    with torch.no_grad(), torch.cuda.stream(side):
        for leaf in step.leaves[:4]:
            leaf.zero_()
        torch.cuda._sleep(50_000_000)  # work on another stream would see the zeros
        for leaf, value in zip(step.leaves, late, strict=True):
            leaf.copy_(value)
        with torch.enable_grad():
            got = step()
    side.synchronize()
    assert all(map(torch.equal, got, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_work_goes_to_the_tensors_device():
    expected = Step("cuda:0")()
    got = Step("cuda:1")()
    assert torch.cuda.current_device() == 0
    assert all(value.device.index == 1 for value in got)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got[:-3], expected[:-3], strict=True))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [("token_contrastive(x, x, i + 1, backend='cuda')", "expected target to be in [0, M) or -100"),
     ("token_similarity(x, x, i - 1, backend='cuda')", "expected target to be in [0, M) or -100"),
     ("info_nce(x, x, temperature=x.new_zeros(()), backend='cuda')", "expected temperature to be finite and > 0"),
     ("complementary_mask(i[None], mask_token_id=1, vocab_size=9, special_ids=(), backend='cuda')",
      "expected input_ids to be in [0, vocab_size)")],
)  # fmt: skip
def test_wrong_values_stop_the_device(wrong, message):
    code = f"""
import torch, cmlm_fast as c
x, i = torch.randn(16, 8, device="cuda"), torch.arange(16, device="cuda")
try:
    c.{wrong}
    torch.cuda.synchronize()
except RuntimeError as error:
    print("raised", error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "raised" in ran.stdout  # by the wait, or by a launch that finds the device stopped
    assert f"cmlm_fast::{wrong.split('(')[0]}: {message}" in ran.stderr


def test_memory_beside_inputs_and_gradients():
    query, key = rows(8192, 768).requires_grad_(), rows(16384, 768, seed=1).requires_grad_()
    target = torch.arange(8192, device="cuda")
    gradients = query.nbytes + key.nbytes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_contrastive(query, key, target, backend="cuda").backward()
    # A chunk of scores, one of the query's gradient, and the key's gradient in float while it accumulates.
    assert torch.cuda.max_memory_allocated() - before <= 2 * gradients + (144 << 20) + key.numel() * 4
