// Input checks of the CUDA ops. Host code only.
#pragma once

#include <optional>
#include <string>

#include "common/tensors.h"
#include "cuda/launch.h"

namespace cmlm {

// The tensor made contiguous, checked to have this dtype and shape (size -1 matches any) and the device of `like`.
inline Tensor take(const char* op, const char* argument, const Tensor& tensor, ScalarType dtype,
                   std::initializer_list<int64_t> shape, const Tensor& like) {
  Tensor dense = torch::stable::contiguous(tensor);
  check_tensor(op, argument, dense, dtype, shape, kDevice);
  CMLM_CHECK(op, tensor.get_device_index() == like.get_device_index(), argument,
             "on device " + std::to_string(like.get_device_index()), tensor.get_device_index());
  return dense;
}

inline std::optional<Tensor> take(const char* op, const char* argument, const std::optional<Tensor>& tensor, ScalarType dtype,
                                  std::initializer_list<int64_t> shape, const Tensor& like) {
  return tensor ? std::optional(take(op, argument, *tensor, dtype, shape, like)) : tensor;
}

template <class X>
const X* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const X*>(tensor->const_data_ptr()) : nullptr;
}
template <class X>
X* pointer(const Tensor& tensor) {
  return static_cast<X*>(tensor.mutable_data_ptr());
}

inline bool on_16_bytes(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace cmlm
