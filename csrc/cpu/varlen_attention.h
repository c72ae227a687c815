// Shared by csrc/cpu/varlen_attention.cpp and its kernel.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "cpu/vec.h"

namespace cmlm {

// [T, H, D] with D contiguous.
template <class T>
struct Packed {
  T* data;
  int64_t token, head;  // strides
};

template <class T>
struct VarlenArgs {
  using M = math_t<T>;
  Packed<const T> query, key, value, grad_out;  // the last for the backward pass
  Packed<T> out, grad_query, grad_key, grad_value;
  M* lse;  // [H, T]
  const int32_t* cu_seqlens;
  int64_t tokens, heads, width, window;  // window 0: none
  M scale, keep_factor;                  // 1 / (1 − dropout)
  uint64_t seed;
  uint32_t drop_below;  // a weight is dropped if its random word is less; 0: no dropout
};

constexpr int64_t kVarlenBlock = 32;  // query rows whose scores are held at a time
// Elements of D, or tokens, rounded up to whole vectors.
inline int64_t varlen_pad(int64_t n) { return (n + 31) / 32 * 32; }
// Elements of scratch for the longest sequence.
inline int64_t varlen_scratch(int64_t length, int64_t width) {
  const int64_t rows = varlen_pad(length), columns = varlen_pad(width);
  return (5 * columns + 2 * kVarlenBlock + 1) * rows + 3 * kVarlenBlock * columns;
}

// One sequence and head.
CMLM_DECLARE_KERNEL(template <class T> void, varlen_forward, (const VarlenArgs<T>& args, int64_t sequence, int64_t head, math_t<T>* scratch))
CMLM_DECLARE_KERNEL(template <class T> void, varlen_backward, (const VarlenArgs<T>& args, int64_t sequence, int64_t head, math_t<T>* scratch))

}  // namespace cmlm
