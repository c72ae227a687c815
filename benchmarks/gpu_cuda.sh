#!/usr/bin/env bash
# The CUDA kernels on a GPU: parity, opcheck and compile on every sample; graphs, streams, no wait for the device; compute-sanitizer.
# PYTHON names the interpreter (default .venv/bin/python). Speed: python -m benchmarks.bench_ops.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
"$python" -c 'import sys, cmlm_fast; absent = cmlm_fast.available("info_nce", "cuda")["cuda"]; sys.exit(absent and f"no CUDA kernels: {absent}")'
"$python" -m pytest -q -m gpu -k "cuda" tests/test_parity.py tests/test_registration.py tests/test_cuda_gpu.py
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --kernel-name-exclude kernel_substring=at:: \
      --error-exitcode 1 "$python" -m benchmarks.gpu_cuda
  done
else
  echo "compute-sanitizer is not on PATH: memcheck, racecheck and synccheck were not run" >&2
fi
