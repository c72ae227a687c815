// Vectors of 64-bit lanes, as wide as the instruction set allows, for integer kernels. GCC's vector extension provides +, ^, <
// and ?: on every machine; what it compiles badly, or cannot express, is spelled out here.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/philox.h"
#include "cpu/width.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace cmlm::CMLM_ISA {

constexpr int kWidth = kBytes / 8;

typedef int64_t Lanes __attribute__((vector_size(8 * kWidth)));  // a comparison gives -1 or 0 in each lane
typedef uint64_t Words __attribute__((vector_size(8 * kWidth)));
template <class T>
struct Narrow {
  typedef T type __attribute__((vector_size(sizeof(T) * kWidth)));
};

struct MultiplyLanes {
  CMLM_HOST_DEVICE Words operator()(Words word, uint32_t factor) const {
    const Words factors = Words() + factor;
#if defined(CMLM_ISA_avx512)
    return (Words)_mm512_mul_epu32((__m512i)word, (__m512i)factors);
#elif defined(CMLM_ISA_avx2)
    return (Words)_mm256_mul_epu32((__m256i)word, (__m256i)factors);
#elif defined(__x86_64__)
    return (Words)_mm_mul_epu32((__m128i)word, (__m128i)factors);
#else
    return (word & 0xffffffff) * factors;
#endif
  }
};

// Integers of any type, widened to lanes and narrowed back.
template <class T>
inline Lanes load(const T* from) {
  typename Narrow<T>::type narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  return __builtin_convertvector(narrow, Lanes);
}

// GCC converts between bytes and 64-bit lanes one lane at a time.
#if defined(CMLM_ISA_avx512)
inline Lanes load(const uint8_t* from) {
  return (Lanes)_mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)from));
}

inline void store(uint8_t* to, __m128i bytes) {
  _mm_storel_epi64((__m128i*)to, bytes);
}
#elif defined(CMLM_ISA_avx2)
inline Lanes load(const uint8_t* from) {
  return (Lanes)_mm256_cvtepu8_epi64(_mm_loadu_si32(from));
}
#endif

template <class T>
inline void store(T* to, Lanes values) {
  const auto narrow = __builtin_convertvector(values, typename Narrow<T>::type);
  std::memcpy(to, &narrow, sizeof narrow);
}

// Bypasses the caches, if the address allows it.
inline void store_around(int64_t* to, Lanes values) {
#if defined(__x86_64__)
  if (reinterpret_cast<uintptr_t>(to) % sizeof values == 0) {
#if defined(CMLM_ISA_avx512)
    return _mm512_stream_si512((__m512i*)to, (__m512i)values);
#elif defined(CMLM_ISA_avx2)
    return _mm256_stream_si256((__m256i*)to, (__m256i)values);
#else
    return _mm_stream_si128((__m128i*)to, (__m128i)values);
#endif
  }
#endif
  store(to, values);
}

inline void store_around(int32_t* to, Lanes values) {
  store(to, values);
}

inline bool any(Lanes lanes) {
  int64_t all = 0;
  for (int lane = 0; lane < kWidth; ++lane) all |= lanes[lane];
  return all != 0;
}

}  // namespace cmlm::CMLM_ISA
