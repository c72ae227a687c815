// The host side of a CUDA op: its device, stream and launches. tests/cuda_host defines the same names for the CPU.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <library_types.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <string>

#include "common/check.h"
#include "common/cuda.cuh"

namespace cmlm {

constexpr auto kDevice = torch::headeronly::DeviceType::CUDA;

// Size of a chunk of scores (contrast_host.h), deliberately larger than the L2 cache of any current GPU: the other side's
// gradient is read and written once per chunk, in float. With at least kChunkRows rows, the product that adds to it does 512
// operations per byte, twice the intensity below which memory is the bound; measured on an H100, 2,048 rows also suit the two
// other products best.
constexpr int64_t kChunkBytes = int64_t{128} << 20, kChunkRows = 2048;
constexpr int64_t kSharedBytes = 512 << 10;  // size of an allocation that small arrays share

// Whether a contrast goes by tiles: as its op wishes. The version in tests/cuda_host can be overridden.
inline bool goes_by_tiles(bool wish) { return wish; }

// cublasGemmEx from the library that torch itself is linked to: nothing is linked here, and no second copy can be loaded.
using CublasGemm = int (*)(void* handle, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha, const void* a,
                           int a_type, int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc,
                           int compute_type, int algorithm);
inline CublasGemm cublas_gemm() {
  static const CublasGemm found = [] {
    void* torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = torch == nullptr ? nullptr : dlsym(torch, "cublasGemmEx");  // also searches its dependencies
    if (symbol == nullptr) throw std::runtime_error("cmlm_fast: expected libtorch_cuda.so to provide cublasGemmEx, got none");
    return reinterpret_cast<CublasGemm>(symbol);
  }();
  return found;
}
constexpr int kCompute32 = 68, kCompute64 = 70;  // CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F
template <class T>
constexpr int kBlasType = std::is_same_v<T, double>  ? CUDA_R_64F
                          : std::is_same_v<T, float> ? CUDA_R_32F
                          : std::is_same_v<T, Bf16>  ? CUDA_R_16BF
                                                     : CUDA_R_16F;

// Launches on a tensor's device and its current stream. No call waits for the device.
class Launcher {
 public:
  explicit Launcher(const Tensor& on) : device_(on.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class P>
  void operator()(void (*kernel)(P), dim3 grid, unsigned threads, size_t shared, const P& params) const {
    if (shared > 48 << 10)
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
    kernel<<<grid, threads, shared, stream_>>>(params);
    check(cudaGetLastError());
  }
  // Column-major c [m, n] = op(a) [m, k] · op(b) [k, n] + beta · c, with the cuBLAS handle that torch keeps for this stream.
  template <class T, class O>
  void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, int beta, const T* a, int64_t lda, const T* b,
            int64_t ldb, O* c, int64_t ldc) const {
    const auto size = [](int64_t x) {
      if (x > std::numeric_limits<int>::max()) throw std::runtime_error("cmlm_fast: a matrix dimension beyond 2^31");
      return static_cast<int>(x);
    };
    constexpr bool wide = std::is_same_v<T, double>;
    const double one64 = 1, beta64 = beta;
    const float one32 = 1, beta32 = static_cast<float>(beta);
    const void* one = wide ? static_cast<const void*>(&one64) : &one32;
    const void* factor = wide ? static_cast<const void*>(&beta64) : &beta32;
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
    const int status =
        cublas_gemm()(handle, transpose_a, transpose_b, size(m), size(n), size(k), one, a, kBlasType<T>, size(lda), b, kBlasType<T>,
                      size(ldb), factor, c, kBlasType<O>, size(ldc), wide ? kCompute64 : kCompute32, -1);
    if (status != 0) throw std::runtime_error("cmlm_fast: cublasGemmEx returned status " + std::to_string(status));
  }
  void clear(void* memory, size_t bytes) const { check(cudaMemsetAsync(memory, 0, bytes, stream_)); }

  int64_t multiprocessors() const {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_));
    return count;
  }

 private:
  static void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("cmlm_fast: CUDA error: ") + cudaGetErrorString(error));
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace cmlm
