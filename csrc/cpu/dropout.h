// Shared by csrc/cpu/dropout.cpp and its kernel.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "cpu/vec.h"

namespace cmlm {

template <class T>
struct DropoutArgs {
  const T* x;  // [rows, width]
  T* out;
  int64_t width;
  math_t<T> factor;  // 1 / (1 − p)
  uint64_t seed;
  uint32_t below;  // an element is dropped if its random word is less than this
};

CMLM_DECLARE_KERNEL(template <class T> void, dropout, (const DropoutArgs<T>& args, int64_t begin, int64_t end))

}  // namespace cmlm
