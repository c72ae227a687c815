// Shared by the CUDA kernels: 16-bit types, shared memory, reductions, merging of softmax sums, detection of a launch's last
// block. Includes no torch header: tests/cuda_host compiles the kernels for the CPU against its own <cuda_runtime.h>.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace cmlm {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};
template <class T>
constexpr bool kNarrow = sizeof(T) == 2;

// The type that arithmetic runs in: double for double, float for all others.
template <class T>
using math_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
template <class X>
__host__ __device__ constexpr X least(X a, X b) { return a < b ? a : b; }
template <class X>
__host__ __device__ constexpr X most(X a, X b) { return a < b ? b : a; }

#if !defined(CMLM_CUDA_HOST)  // else defined by tests/cuda_host/cuda_runtime.h
__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
__device__ __forceinline__ uint16_t float_to_half(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ uint16_t float_to_bfloat(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t float_to_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float quick_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Bypasses L1, to see what another block has just written.
template <class X>
__device__ __forceinline__ X load_fresh(const X* from) { return __ldcg(from); }

}  // namespace cmlm
// The toolkit declares it only without NDEBUG.
extern "C" [[noreturn]] __host__ __device__ void __assert_fail(const char*, const char*, unsigned, const char*) noexcept;
namespace cmlm {
// Stops the device, as PyTorch's own kernels do on a bad index: the message goes to stderr, and the next synchronization with
// the device raises RuntimeError.
[[noreturn]] __device__ __forceinline__ void stop(const char* message) {
  __assert_fail(message, "cmlm_fast", 0, "kernel");
  __builtin_unreachable();
}

__device__ __forceinline__ unsigned char* shared_memory(size_t, size_t offset, size_t) {
  extern __shared__ __align__(16) unsigned char cmlm_shared[];
  return cmlm_shared + offset;
}
#endif

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(Bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float widen(Fp16 x) { return half_to_float(x.bits); }

// exp(x) for sums and weights over rows of T. For 16-bit T its error is about 10⁻⁶, far below the rounding of T.
template <class T>
__device__ __forceinline__ math_t<T> exponential(math_t<T> x) {
  if constexpr (kNarrow<T>)
    return quick_exp2(x * 1.44269504f);
  else
    return std::exp(x);
}

// The largest power of two that is no larger than x > 0.
__device__ __forceinline__ float power_below(float x) { return bits_to_float(float_to_bits(x) & 0x7f800000u); }

template <class T>
__device__ __forceinline__ T narrow(math_t<T> x) {
  if constexpr (std::is_same_v<T, Bf16>)
    return {float_to_bfloat(x)};
  else if constexpr (std::is_same_v<T, Fp16>)
    return {float_to_half(x)};
  else
    return x;
}

// N elements of at most 16 bytes in all: one load or store.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from) { return *reinterpret_cast<const Pack<T, N>*>(from); }

// A warp calls f(d, count) for elements [d, d + count) of a row. count, an integral_constant, is 16 bytes of T if `vector`,
// else 1.
template <class T, class F>
__device__ __forceinline__ void for_packs(int64_t width, bool vector, const F& f) {
  constexpr int kPack = 16 / sizeof(T);
  const int lane = threadIdx.x % 32;
  if (vector) {
#pragma unroll 2
    for (int64_t d = lane * kPack; d < width; d += 32 * kPack) f(d, std::integral_constant<int, kPack>{});
  } else {
#pragma unroll 2
    for (int64_t d = lane; d < width; d += 32) f(d, std::integral_constant<int, 1>{});
  }
}

// Carves arrays out of a block's shared memory, one after another. Every thread takes the same arrays in the same order; `room`
// tells the launch how many bytes an array needs.
template <class X>
__host__ __device__ constexpr size_t room(int64_t count) {
  return static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(X)), 16));
}
class Shared {
 public:
  template <class X>
  __device__ __forceinline__ X* take(int64_t count) {
    X* array = reinterpret_cast<X*>(shared_memory(index_++, used_, count * sizeof(X)));
    used_ += room<X>(count);
    return array;
  }

 private:
  size_t index_ = 0, used_ = 0;
};

constexpr unsigned kWarp = 0xffffffffu;
template <class M>
constexpr M kLowest = std::numeric_limits<M>::lowest();
template <class M>
constexpr M kInfinity = std::numeric_limits<M>::infinity();
template <class M>
constexpr M kNaN = std::numeric_limits<M>::quiet_NaN();

// The sum over a warp, in every lane.
template <class X>
__device__ __forceinline__ X warp_sum(X value) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(kWarp, value, lane);
  return value;
}

// The sum over a block, in every thread, added in a fixed order; scratch [32].
template <class X>
__device__ __forceinline__ X block_sum(X value, X* scratch) {
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  X sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += scratch[warp];
  return sum;
}

// Part of a softmax: the largest score, Σ exp(s − largest) and Σ exp(s − largest)·(s − largest).
template <class M>
struct Softmax {
  M largest = kLowest<M>, sum = 0, moment = 0;

  // Rescales the sums to a reference that is at least `largest`.
  __device__ __forceinline__ void raise(M reference) {
    const M down = largest - reference, factor = std::exp(down);
    moment = (moment + sum * down) * factor;
    sum *= factor;
    largest = reference;
  }
  __device__ __forceinline__ void add(M s) {  // s <= largest
    const M e = std::exp(s - largest);
    sum += e;
    moment += e > 0 ? e * (s - largest) : M(0);
  }
  __device__ __forceinline__ void merge(Softmax other) {
    const M reference = most(largest, other.largest);
    raise(reference);
    other.raise(reference);
    sum += other.sum;
    moment += other.moment;
  }
};

// True in the last of `blocks` blocks to arrive here, which then sees what the others wrote before, if its loads bypass L1.
// `ticket` starts at 0.
__device__ __forceinline__ bool last_block(unsigned* ticket, unsigned blocks, unsigned* shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *shared = atomicAdd(ticket, 1u);
  __syncthreads();
  const bool last = *shared == blocks - 1;
  if (last) __threadfence();
  return last;
}

}  // namespace cmlm
