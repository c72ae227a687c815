// What the kernels express in PTX, as its manual defines it. Part of cuda_runtime.h in this folder.
#pragma once

// The PTX of csrc/common/cuda.cuh.
namespace cmlm {
inline float bits_to_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t float_to_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float half_to_float(uint16_t bits) { return static_cast<float>(__builtin_bit_cast(_Float16, bits)); }
inline uint16_t float_to_half(float x) { return __builtin_bit_cast(uint16_t, static_cast<_Float16>(x)); }
inline uint16_t float_to_bfloat(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  return x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float quick_exp2(float x) { return std::exp2(x); }
[[noreturn]] inline void stop(const char* message) { throw std::runtime_error(message); }
template <class X>
X load_fresh(const X* from) { return *from; }

inline unsigned char* shared_memory(size_t index, size_t offset, size_t bytes) {
  auto& block = cmlm_host::block;
  if (offset + bytes > block.shared_bytes)
    cmlm_host::fail("shared memory beyond the " + std::to_string(block.shared_bytes) + " bytes of the launch");
  if (index == block.shared.size()) {
    block.shared.emplace_back(static_cast<unsigned char*>(std::malloc(bytes)), bytes);
    std::memset(block.shared.back().first, block.garbage, bytes);
  }
  if (block.shared.at(index).second != bytes) cmlm_host::fail("threads take different arrays of shared memory");
  return block.shared[index].first;
}

// The PTX of csrc/cuda/mma.cuh.
inline void copy_async(void* to, const void* from, bool whole) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (whole && reinterpret_cast<uintptr_t>(from) % 16 != 0))
    cmlm_host::fail("cp.async off 16 bytes");
  cmlm_host::block.running->copies.back().push_back({to, from, whole});
}
inline void commit_copies() { cmlm_host::block.running->copies.emplace_back(); }
template <int kOpen>
void wait_copies() {
  auto& groups = cmlm_host::block.running->copies;
  while (groups.size() > kOpen + 1) {
    for (const auto& copy : groups.front()) {
      if (copy.whole)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

// Loads four 8×8 matrices of 16-bit elements, each lane supplying the address of a row (PTX: ldmatrix.x4).
template <bool kTranspose>
void load_matrices(uint32_t (&to)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) cmlm_host::fail("ldmatrix off 16 bytes");
  const auto rows = cmlm_host::exchange(row);
  const unsigned lane = cmlm_host::lane();
  for (unsigned m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (unsigned e = 0; e < 2; ++e) {
      const unsigned r = kTranspose ? lane % 4 * 2 + e : lane / 4, c = kTranspose ? lane / 4 : lane % 4 * 2 + e;
      pair[e] = static_cast<const uint16_t*>(rows(m * 8 + r))[c];
    }
    to[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

// d [16, 8] += a [16, 16] · b [16, 8], each lane holding its share (PTX: mma.m16n8k16, row·col).
template <class T>
void multiply_fragments(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Share {
    uint32_t a[4], b[2];
  } mine;
  std::memcpy(mine.a, a, sizeof mine.a), std::memcpy(mine.b, b, sizeof mine.b);
  const auto of = cmlm_host::exchange(mine);
  const unsigned group = cmlm_host::lane() / 4, within = cmlm_host::lane() % 4;
  const auto number = [&](uint32_t pair, unsigned k) { return widen(T{static_cast<uint16_t>(pair >> 16 * (k % 2))}); };
  for (unsigned k = 0; k < 16; ++k) {
    const Share left = of(group * 4 + k % 8 / 2);
    for (unsigned e = 0; e < 2; ++e) {
      const float right = number(of((within * 2 + e) * 4 + k % 8 / 2).b[k / 8], k);
      for (unsigned half = 0; half < 2; ++half) d[half * 2 + e] += number(left.a[k / 8 * 2 + half], k) * right;
    }
  }
}
}  // namespace cmlm
