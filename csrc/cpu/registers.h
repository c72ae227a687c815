// Small matrices in vector registers: products, transposes, and sums over lanes, in GCC's vector types, which clang also has.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/vec.h"
#include "cpu/width.h"

namespace cmlm::CMLM_ISA {

template <class M>
struct Vector {
  using Index = std::conditional_t<sizeof(M) == 8, int64_t, int32_t>;
  typedef M type __attribute__((vector_size(kBytes)));
  typedef Index indices __attribute__((vector_size(kBytes)));
  typedef M unaligned __attribute__((vector_size(kBytes), aligned(alignof(M)), may_alias));
  static constexpr int kWidth = kBytes / sizeof(M);
};

// Lane indices of `shuffle` for each distance 1, 2, 4, ..., as constants: written lane by lane they would be built at run time.
template <class M>
struct LaneTable {
  static constexpr int kWidth = Vector<M>::kWidth;
  alignas(kBytes) typename Vector<M>::Index low[kWidth][kWidth], high[kWidth][kWidth], other[kWidth][kWidth];
  constexpr LaneTable() : low{}, high{}, other{} {
    for (int far = 1; far < kWidth; far *= 2)
      for (int lane = 0; lane < kWidth; ++lane) {
        low[far][lane] = lane & far ? lane - far + kWidth : lane;
        high[far][lane] = lane & far ? lane + kWidth : lane + far;
        other[far][lane] = lane ^ far;
      }
  }
};
template <class M>
constexpr LaneTable<M> kLaneOf;

// Lane l of the result is lane index[l] of a and b, concatenated.
template <class M>
CMLM_INLINE typename Vector<M>::type shuffle(typename Vector<M>::type a, typename Vector<M>::type b,
                                             const typename Vector<M>::Index* index) {
#if defined(__clang__)
  typename Vector<M>::type out;
  for (int lane = 0; lane < Vector<M>::kWidth; ++lane)
    out[lane] = index[lane] < Vector<M>::kWidth ? a[index[lane]] : b[index[lane] - Vector<M>::kWidth];
  return out;
#else
  return __builtin_shuffle(a, b, *reinterpret_cast<const typename Vector<M>::indices*>(index));
#endif
}

// A strided matrix: element (i, k) is at data[i * row + k * column].
template <class M>
struct Strided {
  const M* data;
  int64_t row, column;
};

// Transposes a square of vectors in place: each step swaps the off-diagonal blocks of the previous step's blocks.
template <class M>
CMLM_INLINE void transpose(typename Vector<M>::type* x) {
#pragma GCC unroll 4
  for (int far = Vector<M>::kWidth / 2; far >= 1; far /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < Vector<M>::kWidth; ++i) {
      if (i & far) continue;
      const auto a = x[i], b = x[i + far];
      x[i] = shuffle<M>(a, b, kLaneOf<M>.low[far]);
      x[i + far] = shuffle<M>(a, b, kLaneOf<M>.high[far]);
    }
}

// kRows rows of out (+)= a · b; the columns of b [depth, n] and out are contiguous.
template <int kRows, bool kAdd, class M>
CMLM_INLINE void multiply_rows(Strided<M> a, const M* b, int64_t b_row, M* out, int64_t out_row, int64_t depth, int64_t n) {
  using V = typename Vector<M>::type;
  using U = typename Vector<M>::unaligned;
  constexpr int64_t kWidth = Vector<M>::kWidth;
  for (int64_t j = 0; j < n; j += 2 * kWidth) {
    V low[kRows] = {}, high[kRows] = {};
    for (int64_t k = 0; k < depth; ++k) {
      const V first = *reinterpret_cast<const U*>(b + k * b_row + j);
      const V second = *reinterpret_cast<const U*>(b + k * b_row + j + kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const M x = a.data[r * a.row + k * a.column];
        low[r] += x * first;
        high[r] += x * second;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      U* to = reinterpret_cast<U*>(out + r * out_row + j);
      U* next = reinterpret_cast<U*>(out + r * out_row + j + kWidth);
      *to = kAdd ? *to + low[r] : low[r];
      *next = kAdd ? *next + high[r] : high[r];
    }
  }
}

// out [m, n] (+)= a [m, depth] · b [depth, n]; n a multiple of 32. Computes and writes m rows, rounded up to a multiple of 4.
template <bool kAdd, class M>
CMLM_INLINE void multiply(Strided<M> a, const M* b, int64_t b_row, M* out, int64_t out_row, int64_t m, int64_t depth, int64_t n) {
  int64_t i = 0;
  if constexpr (kBytes == 64)  // 32 registers hold 8 rows of sums
    for (; i + 4 < m; i += 8)
      multiply_rows<8, kAdd>({a.data + i * a.row, a.row, a.column}, b, b_row, out + i * out_row, out_row, depth, n);
  for (; i < m; i += 4)
    multiply_rows<4, kAdd>({a.data + i * a.row, a.row, a.column}, b, b_row, out + i * out_row, out_row, depth, n);
}

// Reduces kLanes numbers to one, pair by pair, in the same order on every machine.
template <class M, class Pair>
CMLM_INLINE M fold(const M* lanes, Pair pair) {
  constexpr int kVectors = kLanes / Vector<M>::kWidth;
  typename Vector<M>::type x[kVectors];
  __builtin_memcpy(x, lanes, sizeof x);
#pragma GCC unroll 4
  for (int half = kVectors / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] = pair(x[i], x[i + half]);
#pragma GCC unroll 4
  for (int far = Vector<M>::kWidth / 2; far > 0; far /= 2)
    x[0] = pair(x[0], shuffle<M>(x[0], x[0], kLaneOf<M>.other[far]));
  return x[0][0];
}

template <class M>
CMLM_INLINE M sum_of(M* lanes) {
  return fold(lanes, [](auto a, auto b) { return a + b; });
}

}  // namespace cmlm::CMLM_ISA
