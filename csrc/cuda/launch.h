// The host side of a CUDA op: its device and stream, and launches. tests/cuda_host has the same names for the CPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/check.h"

namespace cmlm {

constexpr auto kDevice = torch::headeronly::DeviceType::CUDA;

// Launches on the device of a tensor and the stream that is current there. No call waits for the device.
class Launcher {
 public:
  explicit Launcher(const Tensor& on) : device_(on.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class P>
  void operator()(void (*kernel)(P), dim3 grid, unsigned threads, size_t shared, const P& params) const {
    if (shared > 48 << 10)
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
    kernel<<<grid, threads, shared, stream_>>>(params);
    check(cudaGetLastError());
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
