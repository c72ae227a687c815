// What dropout keeps: the words of Philox draws in order, word j of a row being w_(j mod 4) at c = j div 4.
// Eight draws give 32 numbers; nothing is read, and no mask reaches memory.
#pragma once

#include "common/philox.h"
#include "cpu/vec.h"

namespace cmlm::CMLM_ISA {

struct MultiplyWords {
  typedef uint64_t Words __attribute__((vector_size(64)));
  CMLM_HOST_DEVICE Words operator()(Words word, uint32_t factor) const { return (word & 0xffffffff) * factor; }
};

using Draws = Philox<MultiplyWords::Words, MultiplyWords>;

// keep[j − begin] = 0 where word j is below `below`, else factor; begin and end are multiples of 32.
template <class M>
CMLM_INLINE void draw_keep(const Draws& draws, uint32_t below, M factor, int64_t begin, int64_t end, M* keep) {
  using Words = MultiplyWords::Words;
  const uint64_t first = begin / 4;
  Words quad = Words{0, 1, 2, 3, 4, 5, 6, 7} + first;
  for (int64_t j = begin; j < end; j += 32, quad += 8) {
    const auto words = draws(quad);
    const Words even = (words.w0 & 0xffffffff) | (words.w1 << 32), odd = (words.w2 & 0xffffffff) | (words.w3 << 32);
    const Words pairs[2] = {__builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11),
                            __builtin_shufflevector(even, odd, 4, 12, 5, 13, 6, 14, 7, 15)};
    uint32_t drawn[32];
    __builtin_memcpy(drawn, pairs, sizeof drawn);
    for (int lane = 0; lane < 32; ++lane) keep[j - begin + lane] = drawn[lane] < below ? M(0) : factor;
  }
}

}  // namespace cmlm::CMLM_ISA
