"""Runs every CUDA op on every sample and dtype, forward and backward, for compute-sanitizer; prints how many samples ran.

    python -m benchmarks.gpu_samples
"""

from __future__ import annotations

import torch

from cmlm_fast import available
from cmlm_fast._library import contracts, op
from cmlm_fast.testing import value_and_gradients


def main() -> None:
    ran = 0
    for name, contract in contracts.items():
        absent = available(name, "cuda")["cuda"]
        if absent is not None:
            print(f"{name}: {absent}")
            continue
        for dtype in contract.dtypes:
            for _, args in contract.samples(dtype, torch.device("cuda")):
                op(name)(*args) if contract.exact else value_and_gradients(op(name), name, args)
                ran += 1
    torch.cuda.synchronize()
    if ran == 0:
        raise SystemExit("gpu_samples: expected CUDA kernels, found none")
    print(f"{ran} samples ran")


if __name__ == "__main__":
    main()
