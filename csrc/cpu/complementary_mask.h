// Shared by csrc/cpu/complementary_mask.cpp and its kernel.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/mask_options.h"

namespace cmlm {

struct MaskArgs : MaskOptions {
  const void* ids;  // int64, or int32 if not wide
  const int32_t* cu_seqlens;
  const uint8_t* eligible;  // may be null, as may unit_ids and sample_ids
  const int32_t* unit_ids;
  const int64_t* sample_ids;
  void* view1;
  void* view2;
  uint8_t* role;
  int64_t special_first[16];  // special ids as runs of consecutive ids: first id and length
  uint64_t special_size[16];
  int special_runs;
  bool wide, exact;
  bool stream;  // outputs larger than the caches: bypass them
};

// The scratch of the longest sequence, in int64 words, holds its keys and corrupted ids and, with unit ids, the distinct keys
// and a table to find them. All parts have room for a whole last vector.
constexpr int64_t kMaskPad = 8;
inline int64_t mask_table(int64_t length) {
  int64_t size = 16;
  while (size < 2 * length) size *= 2;
  return size;
}

// Masks tokens [begin, end), all in sequence `sequence` (the whole of it for exact sampling). Returns false if some id is
// outside the vocabulary or an eligible token's unit id is negative; the caller then finds out whether a rule is broken.
CMLM_DECLARE_KERNEL(bool, mask_tokens, (const MaskArgs& args, int64_t sequence, int64_t begin, int64_t end, int64_t* scratch))

}  // namespace cmlm
