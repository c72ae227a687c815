// Building blocks of vectorised CPU loops, as plain branch-free functions of one element: the compiler turns a loop over them
// into SSE2, NEON, AVX2 or AVX-512 code, whichever the file is compiled for. This requires that every function is inlined,
// without branches or calls into libm, that bit patterns go through __builtin_bit_cast, and that loops carry no dependence
// between iterations (so a sum runs over kLanes accumulators and is folded at the end, in the same order on every machine).
//
//   for (int64_t j = 0; j < n; ++j) y[j] = narrow<T>(exp(widen(x[j]) - shift));      // T: float, BFloat16, Half, double
//
// Everything is in the namespace of its instruction set: code compiled for AVX-512 never serves an older machine.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#ifndef CMLM_ISA
#define CMLM_ISA baseline
#endif
#define CMLM_INLINE [[gnu::always_inline]] inline

namespace cmlm {

// The type that arithmetic runs in: double for double, float for all others.
template <class T>
using math_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace cmlm

namespace cmlm::CMLM_ISA {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Accumulators of a reduction: two of the widest vectors, so that the order of a sum does not depend on the instruction set
// (and GCC vectorises the loop over them; it would unroll one of 16 steps first).
constexpr int64_t kLanes = 32;

template <class X>
CMLM_INLINE X max(X a, X b) {
  return a > b ? a : b;
}

// ---- 16-bit types <-> float ----

CMLM_INLINE float widen(float x) { return x; }
CMLM_INLINE double widen(double x) { return x; }

CMLM_INLINE float widen(BFloat16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.x) << 16);
}

// The bits of a half, moved to a float's positions, are a float that is too small by 2^112, subnormals included; infinity and
// NaN need their exponent filled.
CMLM_INLINE float widen(Half x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.x & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.x & 0x8000u) << 16;
  const uint32_t finite = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) * 0x1p112f);
  return __builtin_bit_cast(float, (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite) | sign);
}

template <class T>
CMLM_INLINE T narrow(math_t<T> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    // Round to nearest even by a carry out of the lower half; NaN keeps a bit of its payload.
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t nan = (bits >> 16) | 0x40u;
    return BFloat16(static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded), BFloat16::from_bits());
  } else if constexpr (std::is_same_v<T, Half>) {
    // Normal: rebias the exponent and round by a carry. Subnormal: adding 0.5 moves the mantissa to the end of the word, and
    // the addition rounds. Too large: infinity.
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const float small = __builtin_bit_cast(float, magnitude < 0x38800000u ? magnitude : 0u) + 0.5f;
    const uint32_t subnormal = __builtin_bit_cast(uint32_t, small) - 0x3f000000u;
    uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x477ff000u ? 0x7c00u : result;
    result = magnitude > 0x7f800000u ? 0x7e00u : result;
    return Half(static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u)), Half::from_bits());
  } else {
    return x;
  }
}

// ---- exp ----

// e^x to 1 ulp; 0 below 2^-125 (x < -86.6) and at -inf, inf above 88.7, NaN at NaN.
// x = n·ln 2 + r with |r| <= ln 2 / 2: 2^n is built in the exponent bits, e^r is a polynomial.
CMLM_INLINE float exp(float x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the integer in the low bits
  const float shifted = x * 0x1.715476p+0f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // ln 2 in two pieces; n·first is exact
  float p = 0x1.6850e4p-10f;
  p = p * r + 0x1.123bccp-7f;
  p = p * r + 0x1.555b98p-5f;
  p = p * r + 0x1.55548ep-3f;
  p = p * r + 0x1.fffff8p-2f;
  p = (p * r) * r + r;  // e^r - 1
  const uint32_t power = (__builtin_bit_cast(uint32_t, shifted) << 23) + 0x3f000000u;  // 2^(n-1): n = 128 stays finite
  const float scale = __builtin_bit_cast(float, power);
  float y = (p * scale + scale) * 2.0f;
  y = x < -86.6f ? 0.0f : y;
  return x > 88.722839f ? std::numeric_limits<float>::infinity() : y;
}

CMLM_INLINE double exp(double x) { return std::exp(x); }  // gradcheck's dtype: exact, not fast

// ---- sums ----

// Σ a_i b_i.
template <class T, class U>
CMLM_INLINE math_t<T> dot(const T* a, const U* b, int64_t n) {
  math_t<T> sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) sum[l] += widen(a[i + l]) * widen(b[i + l]);
  for (int64_t l = 0; i + l < n; ++l) sum[l] += widen(a[i + l]) * widen(b[i + l]);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t l = 0; l < width; ++l) sum[l] += sum[l + width];
  return sum[0];
}

}  // namespace cmlm::CMLM_ISA
