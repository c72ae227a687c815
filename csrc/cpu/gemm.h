// Matrix products by the BLAS that torch chose for this machine (MKL, oneDNN with AMX, ...), on raw pointers. A call inside a
// parallel_for runs on its own thread; outside, it uses all of them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>

#include <array>
#include <cstdint>
#include <type_traits>

namespace cmlm {

template <class T>
constexpr torch::headeronly::ScalarType scalar_type_of() {
  using torch::headeronly::ScalarType;
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) return ScalarType::BFloat16;
}

template <class T>
T* data(const torch::stable::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
torch::stable::Tensor empty(std::initializer_list<int64_t> sizes) {
  return torch::stable::empty(sizes, scalar_type_of<T>());
}

// A rows × columns view with rows `stride` elements apart.
template <class T>
torch::stable::Tensor matrix(const T* data, int64_t rows, int64_t columns, int64_t stride) {
  const std::array<int64_t, 2> sizes{rows, columns}, strides{stride, 1};
  return torch::stable::from_blob(const_cast<T*>(data), sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), scalar_type_of<T>());
}

template <class T>
torch::stable::Tensor matrix(const T* data, int64_t rows, int64_t columns) {
  return matrix(data, rows, columns, columns);
}

// The transpose of a dense rows × columns matrix.
template <class T>
torch::stable::Tensor transposed(const T* data, int64_t rows, int64_t columns) {
  const std::array<int64_t, 2> sizes{columns, rows}, strides{1, columns};
  return torch::stable::from_blob(const_cast<T*>(data), sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), scalar_type_of<T>());
}

// out = a · b, rounded to the operands' dtype once.
inline void multiply(const torch::stable::Tensor& out, const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out += a · b.
inline void multiply_add(const torch::stable::Tensor& out, const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
}

}  // namespace cmlm
