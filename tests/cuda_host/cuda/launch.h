// The host side of a CUDA op with the CPU as device: the names of csrc/cuda/launch.h, over fibers and a plain matrix product.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/check.h"
#include "common/cuda.cuh"

#define CUDA CPU  // the dispatch key that STABLE_TORCH_LIBRARY_IMPL(cmlm_fast, CUDA, m) registers under

namespace cmlm {

constexpr auto kDevice = torch::headeronly::DeviceType::CPU;
constexpr int64_t kChunkBytes = 32 << 10, kChunkRows = 8;  // so that small samples are split as large ones are
constexpr int64_t kSharedBytes = 0;  // each array has its own, for AddressSanitizer to see its end

// CMLM_HOST_PATH=tiles|rows overrides the path that a contrast's size selects.
inline bool goes_by_tiles(bool wish) {
  const char* path = std::getenv("CMLM_HOST_PATH");
  return path == nullptr ? wish : std::string(path) == "tiles";
}

class Launcher {
 public:
  explicit Launcher(const Tensor&) {}

  template <class P>
  void operator()(void (*kernel)(P), dim3 grid, unsigned threads, size_t shared, const P& params) const {
    cmlm_host::run_grid(grid, threads, shared, [&] { kernel(params); });
  }
  // cublasGemmEx as its manual has it: column-major c [m, n] = op(a) [m, k] · op(b) [k, n] + beta · c; beta 0: c is not read.
  template <class T, class O>
  void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, int beta, const T* a, int64_t lda, const T* b,
            int64_t ldb, O* c, int64_t ldc) const {
    if (lda < (transpose_a ? k : m) || ldb < (transpose_b ? n : k) || ldc < m)
      cmlm_host::fail("a leading dimension below its matrix");
    std::vector<double> left(m * k), right(k * n);  // rows of op(a), columns of op(b)
    for (int64_t l = 0; l < k; ++l) {
      for (int64_t i = 0; i < m; ++i) left[i * k + l] = widen(a[transpose_a ? l + i * lda : i + l * lda]);
      for (int64_t j = 0; j < n; ++j) right[j * k + l] = widen(b[transpose_b ? j + l * ldb : l + j * ldb]);
    }
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < m; ++i) {
        double sum = 0;
        for (int64_t l = 0; l < k; ++l) sum += left[i * k + l] * right[j * k + l];
        c[i + j * ldc] = narrow<O>(beta == 0 ? sum : sum + beta * static_cast<double>(widen(c[i + j * ldc])));
      }
  }
  void clear(void* memory, size_t bytes) const { std::memset(memory, 0, bytes); }
  int64_t multiprocessors() const { return 8; }  // so that blocks share small samples as they do large ones
};

}  // namespace cmlm
