// Turns the arguments of complementary_mask into MaskOptions. Host code only.
#pragma once

#include <cmath>

#include "common/check.h"
#include "common/mask_options.h"

namespace cmlm {

inline MaskOptions mask_options(int64_t mask_id, int64_t vocab, double rate, double complement_rate, double mask_share,
                                double random_share, int64_t seed, int64_t step) {
  constexpr const char* op = "complementary_mask";
  CMLM_CHECK(op, 1 <= vocab && vocab < int64_t{1} << 31, "vocab_size", "in [1, 2^31)", vocab);
  CMLM_CHECK(op, 0 <= mask_id && mask_id < vocab, "mask_token_id", "in [0, vocab_size = " + std::to_string(vocab) + ")", mask_id);
  const auto share = [](const char* name, double value) { CMLM_CHECK(op, 0.0 <= value && value <= 1.0, name, "in [0, 1]", value); };
  share("rate", rate);
  share("complement_rate", complement_rate);
  share("mask_share", mask_share);
  share("random_share", random_share);
  // The slack admits shares such as 0.9 and 0.1, whose sum may exceed 1 by a rounding error.
  CMLM_CHECK(op, mask_share + random_share <= 1.0 + 1e-9, "mask_share + random_share", "<= 1", mask_share + random_share);
  CMLM_CHECK(op, 0 <= step && step < int64_t{1} << 32, "step", "in [0, 2^32)", step);
  const double two32 = 4294967296.0;
  const auto floor32 = [](double x) { return static_cast<int64_t>(std::floor(x)); };
  MaskOptions options{};
  options.mask_id = mask_id;
  options.vocab = vocab;
  options.below_role1 = floor32(rate * two32);
  options.below_role2 = options.below_role1 + floor32((two32 - static_cast<double>(options.below_role1)) * complement_rate);
  options.below_mask = floor32(mask_share * two32);
  options.below_random = options.below_mask + floor32(random_share * two32);
  options.rate = rate;
  options.complement_rate = complement_rate;
  options.seed = static_cast<uint64_t>(seed);
  options.step = static_cast<uint32_t>(step);
  return options;
}

}  // namespace cmlm
