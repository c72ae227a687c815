// Checks beyond dtype and shape that host functions of several ops share, and the creation of new tensors. Host code only.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "common/check.h"

namespace cmlm {

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

inline void check_reduction(const char* op, const std::string& reduction) {
  CMLM_CHECK(op, reduction == "none" || reduction == "mean" || reduction == "sum", "reduction", "'mean', 'sum' or 'none'",
             "'" + reduction + "'");
}

// Checks the offsets of sequences packed end to end, cu [B + 1]; returns the length of the longest.
inline int64_t check_sequences(const char* op, const int32_t* cu, int64_t sequences, int64_t tokens) {
  int64_t longest = 0;
  bool good = cu[0] == 0 && cu[sequences] == tokens;
  for (int64_t b = 0; b < sequences; ++b) {
    good = good && cu[b] <= cu[b + 1];
    longest = std::max<int64_t>(longest, int64_t{cu[b + 1]} - cu[b]);
  }
  if (good) return longest;
  std::string first = "[";
  for (int64_t b = 0; b <= sequences && b < 8; ++b) first += (b ? ", " : "") + std::to_string(cu[b]);
  fail(op, "cu_seqlens", "non-decreasing from 0 to " + std::to_string(tokens), first + "]");
}

}  // namespace cmlm
