// The host side of a CUDA op where the device is the CPU: csrc/cuda/launch.h's names, over fibers and a plain matrix product.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/check.h"

#define CUDA CPU  // the dispatch key that STABLE_TORCH_LIBRARY_IMPL(cmlm_fast, CUDA, m) registers under

namespace cmlm {

constexpr auto kDevice = torch::headeronly::DeviceType::CPU;

class Launcher {
 public:
  explicit Launcher(const Tensor&) {}

  template <class P>
  void operator()(void (*kernel)(P), dim3 grid, unsigned threads, size_t shared, const P& params) const {
    cmlm_host::run_grid(grid, threads, shared, [&] { kernel(params); });
  }
  void clear(void* memory, size_t bytes) const { std::memset(memory, 0, bytes); }
  int64_t multiprocessors() const { return 3; }  // few, so that small samples are split as large ones are
};

// cublasGemmEx as its manual has it: column-major C [m, n] = alpha · op(A) [m, k] · op(B) [k, n] + beta · C. C is not read if beta is 0.
template <class T, class O>
void host_gemm(bool transpose_a, bool transpose_b, int m, int n, int k, double beta, const T* a, int64_t lda, const T* b, int64_t ldb, O* c, int64_t ldc) {
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = 0; i < m; ++i) {
      math_t<T> sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += widen(transpose_a ? a[l + i * lda] : a[i + l * lda]) * widen(transpose_b ? b[j + l * ldb] : b[l + j * ldb]);
      c[i + j * ldc] = narrow<O>(beta == 0 ? sum : sum + static_cast<math_t<T>>(beta) * widen(c[i + j * ldc]));
    }
}

}  // namespace cmlm
