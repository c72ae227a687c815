"""Loads the CUDA library into PyTorch with CUDA, resolving every symbol at once; run by `make cuda-link`. Needs no GPU.

    python benchmarks/cuda_link.py cmlm_fast/_C_cuda.so
"""

from __future__ import annotations

import ctypes
import os
import sys

import torch

OPS = ("complementary_mask", "token_contrastive", "token_contrastive_backward", "token_similarity", "info_nce",
       "info_nce_backward")  # fmt: skip


def main(library: str) -> None:
    if torch.version.cuda is None:
        raise SystemExit(f"cuda_link: expected a PyTorch with CUDA, got {torch.__version__}")
    ctypes.CDLL(os.path.abspath(library), mode=os.RTLD_NOW)  # resolves every symbol, not only those that are called
    missing = [op for op in OPS if not torch._C._dispatch_has_kernel_for_dispatch_key(f"cmlm_fast::{op}", "CUDA")]
    if missing:
        raise SystemExit(f"cuda_link: loaded, but not registered for CUDA: {', '.join(missing)}")
    if not hasattr(ctypes.CDLL("libtorch_cuda.so", mode=os.RTLD_NOLOAD | os.RTLD_NOW), "cublasGemmEx"):
        raise SystemExit("cuda_link: libtorch_cuda.so brings no cublasGemmEx")
    print(f"{library} loads into PyTorch {torch.__version__} (CUDA {torch.version.cuda}); {len(OPS)} ops registered")


if __name__ == "__main__":
    main(sys.argv[1])
