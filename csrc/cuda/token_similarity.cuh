// token_similarity, CUDA: turns products into scores. Definition: cmlm_fast/ops/token_similarity.py. For plots, so kept simple.
//
// Grid:   norms: one warp per row of query and key. scores: row × runs of the row's columns.
// Loop:   scores: over the columns, neighbouring threads on neighbouring columns.
// Memory: reads a product and writes a score: 4 bytes in 16-bit types (float16: 6, since its products are float), 8 in float.
// Types:  float (double for double) for norms and scores.
// Determinism: one thread per output; norms are folded in a fixed order.
#pragma once

#include "cuda/token_contrastive.cuh"

namespace cmlm {

constexpr int kSimilarityThreads = 256;

template <class T>
struct SimilarityTask {
  using Number = std::conditional_t<std::is_same_v<T, Fp16>, float, T>;
  TokenContrast<T> p;
  const Number* products;  // [rows, M] from row `first` on; may alias out
  T* out;
  int64_t first, rows;
};

template <class T>
__global__ void __launch_bounds__(kSimilarityThreads) similarity_norms(SimilarityTask<T> task) {
  using M = math_t<T>;
  int64_t r = static_cast<int64_t>(blockIdx.x) * (kSimilarityThreads / 32) + threadIdx.x / 32;
  const int s = r < task.p.side[0].rows ? 0 : 1;
  if (s == 1) r -= task.p.side[0].rows;
  const Matrix<T>& x = task.p.side[s];
  if (r >= x.rows) return;
  M squares = 0;
  for_packs<T>(x.width, x.vector, [&](int64_t d, auto count) {
    constexpr int kCount = decltype(count)::value;
    const auto pack = load_pack<kCount>(x.row(r) + d);
#pragma unroll
    for (int k = 0; k < kCount; ++k) squares += widen(pack.at[k]) * widen(pack.at[k]);
  });
  squares = warp_sum(squares);
  if (threadIdx.x % 32 > 0) return;
  if (r == 0 && s == 0) task.p.check_temperature();
  task.p.check(s, r);
  task.p.stats[s].scale[r] = task.p.normalize ? 1 / most(std::sqrt(squares), M(1e-12)) : M(1);
}

template <class T>
__global__ void __launch_bounds__(kSimilarityThreads) similarity_scores(SimilarityTask<T> task) {
  using M = math_t<T>;
  const TokenContrast<T>& p = task.p;
  const int64_t at = blockIdx.x, i = task.first + at, columns = p.side[1].rows;
  const Facts<M> row = p.facts(0, i);
  const M factor = p.stats[0].scale[i] / *p.temperature;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kSimilarityThreads, stride = static_cast<int64_t>(gridDim.y) * kSimilarityThreads;
  for (int64_t j = first + threadIdx.x; j < columns; j += stride) {
    const Facts<M> other = p.facts(1, j);
    const bool candidate = p.negative(row, other, i, j) || p.positive(row, other, i, j);
    const M score = widen(task.products[at * columns + j]) * factor * p.stats[1].scale[j];
    task.out[at * columns + j] = narrow<T>(candidate ? score : -kInfinity<M>);
  }
}

}  // namespace cmlm
