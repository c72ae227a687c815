// A chunk of scores in global memory: the arguments of its kernels, and how they read its scores and columns.
#pragma once

#include "cuda/contrast.cuh"

namespace cmlm {

constexpr int kRowThreads = 256, kRowsPerBlock = 4, kTotalThreads = 1024;
constexpr int kColumnPad = 8;  // arrays over columns are longer by this, as far as a thread may read beyond their end

template <class P>
struct RowTask {
  using T = typename P::Number;
  using M = typename P::M;
  // The type of dot products until the softmax.
  using Score = std::conditional_t<std::is_same_v<T, Fp16>, float, T>;
  P p;
  T* copy[2];         // prepare: rows to write, scaled if `rescale`; or null
  bool rescale;
  M* positives;       // each anchor's score with its positive, side 0 first
  int64_t* marks[2];  // tokens or labels of a side's rows; null if none
  M* full_scale[2];   // ‖row‖⁻¹ of the rows before rescaling
  Score* scores;      // chunk: rows [first, first + rows) of `side`, `pitch` elements apart
  T* weights;         // may alias scores
  int64_t pitch, first, rows;
  int side;
  bool softmax, weigh;
  M* parts;           // columns: [1 + shares, 3, columns], the softmax over all chunks so far and each share of this one's rows
  int64_t share_rows;
  int shares;
  bool last;          // this is the last chunk
};

// The score of what is excluded from a softmax: finite, to avoid 0 · ∞, and so far below kStart, where every softmax starts,
// that its exponential is 0.
template <class M>
constexpr M kOut = kLowest<M>;
template <class M>
constexpr M kStart = kLowest<M> / 2;

// The facts of a thread's columns.
template <class M, int kPack>
struct ColumnStats {
  M scale[kPack], bias[kPack];  // bias: 0, or kOut for an excluded column
  int64_t mark[kPack];          // tokens; labels, which few calls have, are loaded where they are compared

  template <class P>
  __device__ __forceinline__ void load(const RowTask<P>& task, int o, int64_t column, int64_t columns) {
    const auto scales = load_pack<kPack>(task.p.stats[o].scale + column);
    Pack<int64_t, kPack> marks{};
    if (!P::kEqualMarksArePositive && task.marks[o] != nullptr) marks = load_pack<kPack>(task.marks[o] + column);
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      scale[k] = column + k < columns ? scales.at[k] : M(0);
      mark[k] = marks.at[k];
      bias[k] = column + k >= columns || (!P::kEqualMarksArePositive && task.marks[o] != nullptr && mark[k] == -1) ? kOut<M> : M(0);
    }
  }
};

// Loads the scores of kPack columns in one row; memory beyond the last column is uninitialized.
template <class Score, int kPack, class M>
__device__ __forceinline__ void load_scores(const Score* from, int64_t left, M (&at)[kPack]) {
  const auto raw = load_pack<kPack>(from);
#pragma unroll
  for (int k = 0; k < kPack; ++k) at[k] = k < left ? widen(raw.at[k]) : M(0);
}

// The score of a product, or kOut if the column is excluded. Softmax and weights must round it identically.
template <class M>
__device__ __forceinline__ M biased_score(M product, M scale, M other_scale, M inverse_temperature, M bias) {
  return std::fma(product * (scale * other_scale), inverse_temperature, bias);
}

// Calls f(k) if `wanted` is the k-th of the kPack columns from `column` on.
template <int kPack, class F>
__device__ __forceinline__ void at_column(int64_t column, int32_t wanted, const F& f) {
  const uint32_t off = static_cast<uint32_t>(wanted) - static_cast<uint32_t>(column);
  if (off >= static_cast<uint32_t>(kPack)) return;
#pragma unroll
  for (int k = 0; k < kPack; ++k)
    if (off == static_cast<uint32_t>(k)) f(k);
}

// Adds kPack scores to a softmax that started from kStart.
template <class T, class M, int kPack>
__device__ __forceinline__ void add_scores(Softmax<M>& softmax, const M (&at)[kPack]) {
  M largest = at[0];
#pragma unroll
  for (int k = 1; k < kPack; ++k) largest = std::fmax(largest, at[k]);
  if (largest > softmax.largest) softmax.raise(largest);
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    const M down = at[k] - softmax.largest, e = exponential<T>(down);
    softmax.sum += e;
    softmax.moment += e * down;
  }
}

}  // namespace cmlm
