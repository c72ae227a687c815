"""info_nce over real gloo processes with uneven batches: loss and gradients equal one process's on the joined batch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cmlm_fast import info_nce
from cmlm_fast.losses import InfoNCELoss

SIZES = [5, 0, 9]  # a rank may have no sequence at all
KINDS = {
    "cross": {},
    "one-sided": {"symmetric": False},
    "nt_xent": {"scheme": "nt_xent"},
    "supcon": {},
    "sum": {"reduction": "sum"},
}


def batch():
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn(sum(SIZES), 16, generator=generator, dtype=torch.float64) for _ in range(2))
    return z1, z2, torch.randint(0, 4, (sum(SIZES),), generator=generator)


def loss_and_gradients(z1, z2, labels, kind, group=None):
    z1, z2, tau = z1.clone().requires_grad_(), z2.clone().requires_grad_(), torch.tensor(0.1, dtype=torch.float64)
    tau.requires_grad_()
    options = {**KINDS[kind], **({"labels": labels} if kind == "supcon" else {})}
    loss = info_nce(z1, z2, temperature=tau, group=group, **options)
    (2 * loss).backward()
    return loss.detach(), z1.grad, z2.grad, tau.grad


def half(z1, z2, labels, kind, group=None):
    """Gradients of float16 rows under a loss scale; unscaled, they are so small that float16 holds few of their bits."""
    z1, z2 = ((5000 * z).half().requires_grad_() for z in (z1, z2))
    options = {**KINDS[kind], **({"labels": labels} if kind == "supcon" else {})}
    (2.0**16 * info_nce(z1, z2, temperature=0.1, group=group, **options)).backward()
    return z1.grad.double() / 2**16, z2.grad.double() / 2**16


def learned(z1, z2, group):
    """Gradient of a learned temperature, with the group given to the "module", to its "call", or not at all."""
    given = {"group": dist.group.WORLD} if group else {}
    loss = InfoNCELoss(0.1, learn_temperature=True, **(given if group == "module" else {}))
    loss(z1, z2, **({} if group == "module" else given)).backward()
    return loss.temperature.logit_scale.grad


def worker(rank, world, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    first, last = sum(SIZES[:rank]), sum(SIZES[: rank + 1]) if rank < world - 1 else sum(SIZES)
    own = [t[first:last] for t in batch()]
    found = {kind: loss_and_gradients(*own, kind, dist.group.WORLD) for kind in KINDS}
    found["float16"] = {kind: half(*own, kind, dist.group.WORLD) for kind in KINDS}
    found["learned"] = [learned(*own[:2], group) for group in ("call", "module")]
    results[rank] = found
    with pytest.raises(ValueError, match="expected reduction to be 'mean' or 'sum' when group is given, got 'none'"):
        info_nce(own[0], own[1], reduction="none", group=dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_equals_one_process_on_the_joined_batch(world, tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, (world, tmp_path / "store", results), nprocs=world)
        ranks = [results[rank] for rank in range(world)]
    for kind in KINDS:
        loss, grad1, grad2, grad_tau = loss_and_gradients(*batch(), kind)
        for rank in ranks:
            torch.testing.assert_close(rank[kind][0], loss)
        # As for any parameter, the ranks' parts add up, so that DDP treats a temperature like the weights behind z1, z2.
        torch.testing.assert_close(sum(rank[kind][3] for rank in ranks), grad_tau)
        torch.testing.assert_close(torch.cat([rank[kind][1] for rank in ranks]), grad1)
        torch.testing.assert_close(torch.cat([rank[kind][2] for rank in ranks]), grad2)
        joined = [(5000 * z).half().double() for z in batch()[:2]]
        _, *exact, _ = loss_and_gradients(*joined, batch()[2], kind)
        for which in (0, 1):
            got = torch.cat([rank["float16"][kind][which] for rank in ranks])
            assert (got - exact[which] / 2).norm() < 2e-3 * exact[which].norm()
    for rank in ranks:
        assert torch.equal(*rank["learned"])
    torch.testing.assert_close(sum(rank["learned"][0] for rank in ranks), learned(*batch()[:2], None))


COMPILED = """
import sys, torch, torch.distributed as dist
from cmlm_fast import info_nce

dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{sys.argv[1]}")
z1, z2 = torch.randn(30, 8, requires_grad=True), torch.randn(30, 8)
for _ in range(3):
    torch._dynamo.reset()
    loss = torch.compile(lambda a, b: info_nce(a, b, group=dist.group.WORLD), backend="aot_eager")(z1, z2)
    loss.backward()
    torch.testing.assert_close(loss, info_nce(z1, z2))
print("done")
"""


def test_torch_compile_does_not_wait_for_a_collective_that_it_traces(tmp_path):
    command = [sys.executable, "-c", COMPILED, str(tmp_path / "meeting")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0 and "done" in run.stdout, run.stderr
