// Maps a tensor's dtype to a C++ type: dispatch_ids and dispatch_floating call f with a Type<T> tag for the dtype.
//
//   dispatch_floating("info_nce", "z1", z1, [&](auto tag) { using T = typename decltype(tag)::type; ... });
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "common/check.h"

namespace cmlm {

template <class T>
struct Type {
  using type = T;
};

template <class F>
auto dispatch_floating(const char* op, const char* argument, const Tensor& tensor, F&& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(Type<float>{});
    case ScalarType::BFloat16:
      return f(Type<torch::headeronly::BFloat16>{});
    case ScalarType::Half:
      return f(Type<torch::headeronly::Half>{});
    case ScalarType::Double:
      return f(Type<double>{});
    default:
      fail(op, argument, "float32, bfloat16, float16 or float64", describe(tensor));
  }
}

template <class F>
auto dispatch_ids(const char* op, const char* argument, const Tensor& tensor, F&& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Long:
      return f(Type<int64_t>{});
    case ScalarType::Int:
      return f(Type<int32_t>{});
    default:
      fail(op, argument, "int64 or int32", describe(tensor));
  }
}

}  // namespace cmlm
