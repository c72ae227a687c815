// Shared by csrc/cpu/softmax_loss.cpp and its kernel.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "cpu/vec.h"

namespace cmlm {

template <class T>
struct SoftmaxLossArgs {
  const T* logits;        // [rows, width]
  const int64_t* target;  // [rows], a column, or negative: the row is ignored
  math_t<T>* losses;      // [rows]
  T* grad_logits;              // [rows, width]
  int64_t width;
};

// Rows [begin, end); scratch of `width` elements.
CMLM_DECLARE_KERNEL(template <class T> void, softmax_loss,
                    (const SoftmaxLossArgs<T>& args, int64_t begin, int64_t end, math_t<T>* scratch))

}  // namespace cmlm
