// The elements that dropout keeps, from the words of Philox draws in order: word j of a row is w_(j mod 4) at c = j div 4.
// A vector of draws gives four vectors of words; nothing is read, and no mask reaches memory.
#pragma once

#include "common/philox.h"
#include "cpu/lanes.h"
#include "cpu/registers.h"

namespace cmlm::CMLM_ISA {

using Draws = Philox<Words, MultiplyLanes>;

struct DrawTables {
  int64_t count[kWidth], first[kWidth], second[kWidth];  // c of each lane; the pairs of words in each half of a vector
  constexpr DrawTables() : count{}, first{}, second{} {
    for (int lane = 0; lane < kWidth; ++lane) {
      count[lane] = lane;
      first[lane] = lane / 2 + lane % 2 * kWidth;
      second[lane] = first[lane] + kWidth / 2;
    }
  }
};
alignas(kBytes) constexpr DrawTables kDraws;

// keep[j − begin] = 0 if word j is below `below`, else factor; begin and end are multiples of 32.
template <class M>
CMLM_INLINE void draw_keep(const Draws& draws, uint32_t below, M factor, int64_t begin, int64_t end, M* keep) {
  constexpr int64_t kDrawn = 4 * kWidth;
  Words c = (Words)load(kDraws.count) + static_cast<uint64_t>(begin / 4);
  for (int64_t j = begin; j < end; j += kDrawn, c += kWidth) {
    const auto words = draws(c);
    const Words even = (words.w0 & 0xffffffff) | (words.w1 << 32), odd = (words.w2 & 0xffffffff) | (words.w3 << 32);
    const Words pairs[2] = {shuffle<uint64_t>(even, odd, kDraws.first), shuffle<uint64_t>(even, odd, kDraws.second)};
    uint32_t drawn[kDrawn];
    __builtin_memcpy(drawn, pairs, sizeof drawn);
    for (int lane = 0; lane < kDrawn; ++lane) keep[j - begin + lane] = drawn[lane] < below ? M(0) : factor;
  }
}

}  // namespace cmlm::CMLM_ISA
