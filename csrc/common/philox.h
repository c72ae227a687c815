// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers, as easy as 1, 2, 3; SC'11). CPU and CUDA share this code,
// and so draw the same bits.
//
// A Word (one uint64_t, or a vector of them) carries a 32-bit value in the low half of 64 bits; the high half is garbage. So a
// round is two products, two shifts and two three-way xors, with no masking: a 32x32 -> 64 multiply reads low halves only.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CMLM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CMLM_HOST_DEVICE inline __attribute__((always_inline))  // no copy that instruction sets share
#endif

namespace cmlm {

template <class Word>
struct PhiloxWords {
  Word w0, w1, w2, w3;  // low halves
};

// Low half of `word` times `factor`, for a plain uint64_t; vectors supply their own.
struct MultiplyLow {
  CMLM_HOST_DEVICE uint64_t operator()(uint64_t word, uint32_t factor) const {
    return static_cast<uint64_t>(static_cast<uint32_t>(word)) * factor;
  }
};

// The draws at counters (c, step, low half of sample, high half of sample) under key (low half of seed, high half of seed), one
// for each c. The constructor computes what does not depend on c: the key schedule, and one product in each of rounds 1 and 2.
template <class Word, class Multiply = MultiplyLow>
class Philox {
 public:
  CMLM_HOST_DEVICE Philox(uint32_t step, uint64_t sample, uint64_t seed) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    const uint64_t product1 = MultiplyLow{}(sample, kMultiplier1);
    const uint64_t product0 = MultiplyLow{}((product1 >> 32) ^ step ^ key0, kMultiplier0);
    first_ = Word() ^ ((sample >> 32) ^ key1);
    third_ = Word() ^ product0;
    for (int i = 0; i < 9; ++i) {
      key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
      keys0_[i] = Word() ^ static_cast<uint64_t>(key0);
      keys1_[i] = Word() ^ static_cast<uint64_t>(key1);
    }
    keys0_[0] ^= product1;
    keys1_[0] ^= product0 >> 32;
  }

  CMLM_HOST_DEVICE PhiloxWords<Word> operator()(Word c) const {
    const Multiply multiply;
    const Word varying1 = multiply(c, kMultiplier0), varying2 = multiply((varying1 >> 32) ^ first_, kMultiplier1);
    Word c0 = (varying2 >> 32) ^ keys0_[0], c1 = varying2, c2 = varying1 ^ keys1_[0], c3 = third_;
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 8
#endif
    for (int i = 1; i < 9; ++i) {  // rounds 3 to 10
      const Word product0 = multiply(c0, kMultiplier0), product1 = multiply(c2, kMultiplier1);
      c0 = (product1 >> 32) ^ c1 ^ keys0_[i];
      c2 = (product0 >> 32) ^ c3 ^ keys1_[i];
      c1 = product1;
      c3 = product0;
    }
    return {c0, c1, c2, c3};
  }

 private:
  static constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  Word first_, third_, keys0_[9], keys1_[9];
};

}  // namespace cmlm
