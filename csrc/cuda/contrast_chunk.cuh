// A chunk of scores that lies in memory: what its kernels are given, and what they read of it and of its columns.
#pragma once

#include "cuda/contrast.cuh"

namespace cmlm {

constexpr int kRowThreads = 256, kRowsPerBlock = 4, kTotalThreads = 1024;
constexpr int kColumnPad = 8;  // arrays over columns are as much longer as a thread may read beyond their end

template <class P>
struct RowTask {
  using T = typename P::Number;
  using M = typename P::M;
  // What dot products are kept in until the softmax.
  using Score = std::conditional_t<std::is_same_v<T, Fp16>, float, T>;
  P p;
  T* copy[2];         // prepare: rows to write, scaled if `rescale`; or null
  bool rescale;
  M* positives;       // of each anchor, side 0 first
  int64_t* marks[2];  // tokens or labels of a side's rows; null without
  M* full_scale[2];   // ‖row‖⁻¹ of the rows before they were scaled
  Score* scores;      // chunk: rows [first, first + rows) of `side`, `pitch` numbers apart
  T* weights;         // may be scores
  int64_t pitch, first, rows;
  int side;
  bool softmax, weigh;
  M* parts;           // columns: [1 + shares, 3, columns], the softmax of all chunks so far, and of each share of this one's rows
  int64_t share_rows;
  int shares;
  bool last;          // this is the last chunk
};

// What takes no part in a softmax: finite, lest 0 · ∞ be made of it, and so far below where every softmax starts that its
// exponential is 0.
template <class M>
constexpr M kOut = kLowest<M>;
template <class M>
constexpr M kStart = kLowest<M> / 2;

// What is known of a thread's columns.
template <class M, int kPack>
struct ColumnFacts {
  M scale[kPack], bias[kPack];  // bias: 0, or kOut for a column that takes no part
  int64_t mark[kPack];          // tokens; labels, which few calls have, are read where they are compared

  template <class P>
  __device__ __forceinline__ void load(const RowTask<P>& task, int o, int64_t column, int64_t columns) {
    const auto scales = load_pack<kPack>(task.p.stats[o].scale + column);
    Pack<int64_t, kPack> marks{};
    if (!P::kMarksJoin && task.marks[o] != nullptr) marks = load_pack<kPack>(task.marks[o] + column);
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      scale[k] = column + k < columns ? scales.at[k] : M(0);
      mark[k] = marks.at[k];
      bias[k] = column + k >= columns || (!P::kMarksJoin && task.marks[o] != nullptr && mark[k] == -1) ? kOut<M> : M(0);
    }
  }
};

// Scores of kPack columns in one row; beyond the last column lie numbers that nobody wrote.
template <class Score, int kPack, class M>
__device__ __forceinline__ void load_scores(const Score* from, int64_t left, M (&at)[kPack]) {
  const auto raw = load_pack<kPack>(from);
#pragma unroll
  for (int k = 0; k < kPack; ++k) at[k] = k < left ? widen(raw.at[k]) : M(0);
}

// The score of a product, kOut where the column takes no part. Softmax and weights must round it alike.
template <class M>
__device__ __forceinline__ M biased_score(M product, M scale, M other_scale, M coldness, M bias) {
  return std::fma(product * (scale * other_scale), coldness, bias);
}

// f(k) for the one of kPack columns from `column` on that is `wanted`, if it is one of them.
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
