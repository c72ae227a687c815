// Products of 64×64 tiles in shared memory by a block of 4 warps, and the copies that fill the tiles: tensor cores (mma.sync)
// for 16-bit types, fused multiply-adds for float and double. Both leave element (row, column) in the same thread and register:
//
//   warp w, lane l, at[n][2h + e]: row 16·w + l/4 + 8·h, column 8·n + 2·(l%4) + e
#pragma once

#include "common/cuda.cuh"

namespace cmlm {

constexpr int kTile = 64, kTileThreads = 128;

// A slice holds 128 bytes of each of 64 rows; 16 bytes of padding per row spread the rows over the banks.
template <class T>
constexpr int kDepth = 128 / sizeof(T);
template <class T>
constexpr int kPitch = 144 / sizeof(T);
template <class T>
constexpr int kSlice = kTile * kPitch<T>;
constexpr int kStages = 3;  // slices, or pairs of them, of which all but the current one are in flight

// Row and column of a thread's elements in a tile.
__device__ __forceinline__ int tile_row(int half) { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * half; }
__device__ __forceinline__ int tile_column(int n, int e) { return 8 * n + threadIdx.x % 4 * 2 + e; }

#if !defined(CMLM_CUDA_HOST)  // else defined by tests/cuda_host/cuda_runtime.h
// Copies 16 bytes from global to shared memory asynchronously; zeros, and no read, unless `whole`.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool whole) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(whole ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but this thread's last kOpen committed groups have arrived.
template <int kOpen>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

// Loads four 8×8 matrices of 16-bit elements; lane l supplies the address of row l%8 of matrix l/8.
template <bool kTranspose>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}

// d [16, 8] += a [16, 16] · b [16, 8]
template <class T>
__device__ __forceinline__ void multiply_fragments(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, Bf16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// A matrix in two pieces: the rows below `split` start at `first`, the others at `second`.
template <class T>
struct Matrix {
  const T *first, *second;
  int64_t split, rows, width;
  bool vector;  // every row is aligned to 16 bytes and a multiple of 16 bytes long

  __device__ __forceinline__ const T* row(int64_t r) const { return r < split ? first + r * width : second + (r - split) * width; }
};

// Loads rows [r0, r0 + 64), elements [d0, d0 + kDepth) of x into a slice, with zeros beyond its ends.
template <class T>
__device__ __forceinline__ void load_slice(const Matrix<T>& x, int64_t r0, int64_t d0, T* slice) {
  constexpr int kPack = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < kTile * 8 / kTileThreads; ++i) {
    const int row = i * (kTileThreads / 8) + threadIdx.x / 8, at = threadIdx.x % 8 * kPack;
    T* to = slice + row * kPitch<T> + at;
    const bool inside = r0 + row < x.rows && d0 + at < x.width;
    const T* from = inside ? x.row(r0 + row) + d0 + at : x.first;
    if (x.vector) {
      copy_async(to, from, inside);
    } else {
      for (int k = 0; k < kPack; ++k) to[k] = inside && d0 + at + k < x.width ? from[k] : T{};
    }
  }
}

template <class T, int kColumns>
struct Product {
  math_t<T> at[kColumns / 8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) at[n][i] = 0;
  }
};

// product += x · yᵀ over the depth of two slices.
template <class T>
__device__ __forceinline__ void multiply_slices(const T* x, const T* y, Product<T, kTile>& product) {
  const int lane = threadIdx.x % 32;
  if constexpr (kNarrow<T>) {
    const T* x_row = x + (threadIdx.x / 32 * 16 + lane % 16) * kPitch<T> + lane / 16 * 8;
    const T* y_row = y + (lane / 16 * 8 + lane % 8) * kPitch<T> + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < kDepth<T>; k += 16) {
      uint32_t a[4];
      load_matrices<false>(a, x_row + k);
#pragma unroll
      for (int n = 0; n < kTile / 8; n += 2) {
        uint32_t b[4];
        load_matrices<false>(b, y_row + n * 8 * kPitch<T> + k);
        multiply_fragments<T>(product.at[n], a, {b[0], b[1]});
        multiply_fragments<T>(product.at[n + 1], a, {b[2], b[3]});
      }
    }
  } else {
    constexpr int kPack = 16 / sizeof(T);
    using Numbers = Pack<T, kPack>;
    for (int k = 0; k < kDepth<T>; k += kPack) {
      const Numbers left[2] = {*reinterpret_cast<const Numbers*>(x + tile_row(0) * kPitch<T> + k),
                               *reinterpret_cast<const Numbers*>(x + tile_row(1) * kPitch<T> + k)};
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const Numbers right = *reinterpret_cast<const Numbers*>(y + tile_column(n, e) * kPitch<T> + k);
#pragma unroll
          for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int l = 0; l < kPack; ++l) product.at[n][2 * h + e] += left[h].at[l] * right.at[l];
        }
    }
  }
}

// product += weights · y: weights [64, 64] with rows `pitch` elements apart, y a slice of 64 rows.
template <class T>
__device__ __forceinline__ void multiply_weights(const T* weights, int pitch, const T* y, Product<T, kDepth<T>>& product) {
  const int lane = threadIdx.x % 32;
  if constexpr (kNarrow<T>) {
    const T* weights_row = weights + (threadIdx.x / 32 * 16 + lane % 16) * pitch + lane / 16 * 8;
    const T* y_row = y + (lane / 8 % 2 * 8 + lane % 8) * kPitch<T> + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kTile; k += 16) {
      uint32_t a[4];
      load_matrices<false>(a, weights_row + k);
#pragma unroll
      for (int n = 0; n < kDepth<T> / 8; n += 2) {
        uint32_t b[4];
        load_matrices<true>(b, y_row + k * kPitch<T> + n * 8);
        multiply_fragments<T>(product.at[n], a, {b[0], b[1]});
        multiply_fragments<T>(product.at[n + 1], a, {b[2], b[3]});
      }
    }
  } else {
    constexpr int kPack = 16 / sizeof(T);
    using Numbers = Pack<T, kPack>;
    for (int k = 0; k < kTile; k += kPack) {
      const Numbers left[2] = {*reinterpret_cast<const Numbers*>(weights + tile_row(0) * pitch + k),
                               *reinterpret_cast<const Numbers*>(weights + tile_row(1) * pitch + k)};
#pragma unroll
      for (int l = 0; l < kPack; ++l)
#pragma unroll
        for (int n = 0; n < kDepth<T> / 8; ++n) {
          const auto right = *reinterpret_cast<const Pack<T, 2>*>(y + (k + l) * kPitch<T> + tile_column(n, 0));
#pragma unroll
          for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int e = 0; e < 2; ++e) product.at[n][2 * h + e] += left[h].at[l] * right.at[e];
        }
    }
  }
}

// Pipelines the slices: load(step, stage) starts copying one, use(step, stage) finds it in shared memory.
template <class Load, class Use>
__device__ __forceinline__ void pipeline(int steps, const Load& load, const Use& use) {
  const auto start = [&](int step) {
    if (step < steps) load(step, step % kStages);
    commit_copies();
  };
  __syncthreads();
  for (int step = 0; step < kStages - 1; ++step) start(step);
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // all threads' copies have arrived, and none uses the stage that is filled next
    start(step + kStages - 1);
    use(step, step % kStages);
  }
}

// The sum of squares of this thread's half of a slice's row threadIdx.x/2.
template <class T>
__device__ __forceinline__ math_t<T> half_squares(const T* slice) {
  constexpr int kPack = 16 / sizeof(T);
  const T* half = slice + threadIdx.x / 2 * kPitch<T> + threadIdx.x % 2 * (kDepth<T> / 2);
  math_t<T> squares = 0;
#pragma unroll
  for (int d = 0; d < kDepth<T> / 2; d += kPack) {
    const auto pack = load_pack<kPack>(half + d);
#pragma unroll
    for (int k = 0; k < kPack; ++k) squares += widen(pack.at[k]) * widen(pack.at[k]);
  }
  return squares;
}

// The product of 64 rows of x with 64 of y. If kSquares, also the squares of half of row threadIdx.x/2 of x, and of y.
template <bool kSquares, class T>
__device__ __forceinline__ void multiply_rows(const Matrix<T>& x, int64_t x0, const Matrix<T>& y, int64_t y0, T* slices,
                                              Product<T, kTile>& product, math_t<T> (&squares)[2]) {
  product.clear();
  pipeline(
      static_cast<int>(ceil_div(x.width, kDepth<T>)),
      [&](int step, int stage) {
        load_slice(x, x0, static_cast<int64_t>(step) * kDepth<T>, slices + stage * 2 * kSlice<T>);
        load_slice(y, y0, static_cast<int64_t>(step) * kDepth<T>, slices + (stage * 2 + 1) * kSlice<T>);
      },
      [&](int, int stage) {
        const T* slice = slices + stage * 2 * kSlice<T>;
        multiply_slices(slice, slice + kSlice<T>, product);
        if constexpr (kSquares) {
          squares[0] += half_squares(slice);
          squares[1] += half_squares(slice + kSlice<T>);
        }
      });
}

}  // namespace cmlm
