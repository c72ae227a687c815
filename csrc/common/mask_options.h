// The options of complementary_mask as CPU and CUDA kernels take them: checked, and turned into thresholds on 32-bit words.
#pragma once

#include <cstdint>

namespace cmlm {

struct MaskOptions {
  int64_t mask_id, vocab;
  int64_t below_role1, below_role2;  // bernoulli: w0 below the first -> role 1, else below the second -> role 2
  int64_t below_mask, below_random;  // w1 below the first -> mask id, else below the second -> random id
  double rate, complement_rate;
  uint64_t seed;
  uint32_t step;
};

}  // namespace cmlm
