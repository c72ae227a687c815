// A contrast between matrix products, for score matrices too large for tiles: cuBLAS multiplies a chunk of anchors' rows
// with the other side, the kernels here turn the chunk in place into the gradient with respect to the products, and cuBLAS
// multiplies it back (contrast_host.h).
//
// Grid:   prepare, project: one warp per row. rows: one block per 4 rows of the chunk, so that a column's facts are loaded once
//         for all four. unit, totals: one block.
// Tile:   16 bytes of scores per thread and row.
// Loop:   rows: once over the row for the softmax (one exponential per score), once more for the weights (another).
// Memory: rows: reads each score twice and writes its weight once: 6 bytes (float16 10, float 12), and 4 to 24 bytes per column for
//         four rows. prepare: each row once. project: sums, rows and gradient once.
// Types:  scores and weights in T (float16: scores in float, since dot products may overflow it; rows scaled by powers of two
//         to a length near 1, since weights may underflow it); all arithmetic and sums in float, double for double.
// Determinism: a row belongs to one block, and its sums are folded in a fixed order.
#pragma once

#include "cuda/contrast_chunk.cuh"

namespace cmlm {

template <class P>
__global__ void __launch_bounds__(kRowThreads) contrast_prepare(RowTask<P> task) {
  using T = typename P::Number;
  using M = typename P::M;
  const P& p = task.p;
  int64_t r = static_cast<int64_t>(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32;
  const int s = r < p.side[0].rows ? 0 : 1, lane = threadIdx.x % 32;
  if (s == 1) r -= p.side[0].rows;
  if (r >= (s == 1 && p.self ? 0 : p.side[s].rows)) return;
  const Matrix<T> x = p.side[s], y = p.side[p.other(s)];
  const int64_t partner = s < p.anchors() ? p.partner(s, r) : -1;
  const T *own = x.row(r), *other = partner >= 0 ? y.row(partner) : own;
  M squares = 0, others = 0, product = 0;
  for_packs<T>(x.width, x.vector, [&](int64_t d, auto count) {
    constexpr int kCount = decltype(count)::value;
    const auto a = load_pack<kCount>(own + d), b = load_pack<kCount>(other + d);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const M left = widen(a.at[k]), right = widen(b.at[k]);
      squares += left * left, others += right * right, product += left * right;
    }
  });
  squares = warp_sum(squares), others = warp_sum(others), product = warp_sum(product);
  const M scale = p.normalize ? 1 / most(std::sqrt(squares), M(1e-12)) : M(1);
  const M power = task.rescale ? static_cast<M>(power_below(static_cast<float>(scale))) : M(1);
  if (task.copy[s] != nullptr)
    for_packs<T>(x.width, x.vector, [&](int64_t d, auto count) {
      constexpr int kCount = decltype(count)::value;
      auto pack = load_pack<kCount>(own + d);
#pragma unroll
      for (int k = 0; k < kCount; ++k) pack.at[k] = narrow<T>(widen(pack.at[k]) * power);
      *reinterpret_cast<Pack<T, kCount>*>(task.copy[s] + r * x.width + d) = pack;
    });
  if (lane > 0) return;
  p.check(s, r);
  p.stats[s].scale[r] = scale / power;
  task.full_scale[s][r] = scale;
  if (task.marks[s] != nullptr) task.marks[s][r] = p.mark(s, r);
  if (s >= p.anchors() || !p.single_positive()) return;
  const M other_scale = p.normalize ? 1 / most(std::sqrt(others), M(1e-12)) : M(1);
  task.positives[s * p.side[0].rows + r] = partner >= 0 ? score_of(product, scale, other_scale, 1 / *p.temperature) : kNaN<M>;
}

template <class P>
__global__ void __launch_bounds__(kTotalThreads) contrast_unit(RowTask<P> task) {
  Shared shared;
  if (threadIdx.x == 0) task.p.check_temperature();
  finish_unit(task.p, shared.take<double>(32));
}
template <class P>
__global__ void __launch_bounds__(kTotalThreads) contrast_totals(RowTask<P> task) {
  Shared shared;
  finish_totals(task.p, shared.take<double>(32));
}
constexpr size_t kTotalsShared = room<double>(32);

// A row of the block.
template <class M>
struct RowStats {
  M scale, reference, negative_weight, positive_weight;
  int64_t mark;
  int32_t partner, own;  // the columns of its positive and of itself, or -1
};

// What the softmax stored for a thread's columns, if they are anchors: as Contrast::load_stats, without the positives' weights.
template <class M, int kPack>
struct AnchorStats {
  M reference[kPack], negative_weight[kPack];

  template <class P>
  __device__ __forceinline__ void load(const P& p, int o, int64_t column, int64_t columns) {
    const auto references = load_pack<kPack>(p.stats[o].reference + column);
    const auto weights = load_pack<kPack>(p.stats[o].negative_weight + column);
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      const bool inside = column + k < columns;
      const M weight = inside ? p.anchor_weight(column + k) : M(0);
      reference[k] = inside ? references.at[k] : -kLowest<M>;
      negative_weight[k] = inside ? weights.at[k] * weight : M(0);
    }
  }
};

template <class M>
constexpr size_t kRowsShared = room<Anchor<M>>(kRowThreads / 32 * kRowsPerBlock) + room<RowStats<M>>(kRowsPerBlock);

template <class P>
__global__ void __launch_bounds__(kRowThreads, sizeof(typename P::M) == 8 ? 1 : 2) contrast_rows(RowTask<P> task) {
  using T = typename P::Number;
  using M = typename P::M;
  using Score = typename RowTask<P>::Score;
  constexpr int kPack = 16 / sizeof(Score);
  Shared shared;
  Anchor<M>* anchors = shared.take<Anchor<M>>(kRowThreads / 32 * kRowsPerBlock);
  RowStats<M>* rows = shared.take<RowStats<M>>(kRowsPerBlock);
  const P& p = task.p;
  const int s = task.side, o = p.other(s);
  const int64_t columns = p.side[o].rows, begin = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock, row0 = task.first + begin;
  const int count = static_cast<int>(least<int64_t>(kRowsPerBlock, task.rows - begin)), q = threadIdx.x;
  const M inverse_temperature = 1 / *p.temperature;
  const bool single_positive = p.single_positive(), marked = task.marks[s] != nullptr;
  if (q < kRowsPerBlock) {
    const int64_t r = row0 + least(q, count - 1);
    rows[q].scale = p.stats[s].scale[r];
    rows[q].mark = marked ? task.marks[s][r] : 0;
    rows[q].partner = static_cast<int32_t>(p.partner(s, r));
    rows[q].own = p.self ? static_cast<int32_t>(r) : -1;
  }
  __syncthreads();
  const auto scores_of = [&](int i, int64_t column, M(&at)[kPack]) {
    load_scores(task.scores + (begin + least(i, count - 1)) * task.pitch + column, columns - column, at);
  };

  if (task.softmax) {
    Anchor<M> mine[kRowsPerBlock];
#pragma unroll
    for (int i = 0; i < kRowsPerBlock; ++i) mine[i].others.largest = kStart<M>;
    for (int64_t column = threadIdx.x * kPack; column < columns; column += kRowThreads * kPack) {
      M at[kRowsPerBlock][kPack];
#pragma unroll
      for (int i = 0; i < kRowsPerBlock; ++i) scores_of(i, column, at[i]);
      ColumnStats<M, kPack> facts;
      facts.load(task, o, column, columns);
#pragma unroll
      for (int i = 0; i < kRowsPerBlock; ++i) {
        const RowStats<M>& row = rows[i];
#pragma unroll
        for (int k = 0; k < kPack; ++k)
          at[i][k] = biased_score(at[i][k], row.scale, facts.scale[k], inverse_temperature, facts.bias[k]);
        if (marked) {
#pragma unroll
          for (int k = 0; k < kPack; ++k) {
            const bool same = (P::kEqualMarksArePositive ? task.marks[o][column + k] : facts.mark[k]) == row.mark;
            if constexpr (P::kEqualMarksArePositive) {
              if (same && column + k < columns && column + k != row.own) mine[i].positive += at[i][k], mine[i].count += 1;
            } else if (same) {
              at[i][k] = kOut<M>;
            }
          }
        }
        const auto leave_out = [&](int k) { at[i][k] = kOut<M>; };
        at_column<kPack>(column, row.partner, leave_out);
        if constexpr (P::kTwoSided) at_column<kPack>(column, row.own, leave_out);
        add_scores<T>(mine[i].others, at[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsPerBlock; ++i) {
      for (int lane = 16; lane > 0; lane /= 2) mine[i].merge(mine[i].across(lane));
      if (threadIdx.x % 32 == 0) anchors[threadIdx.x / 32 * kRowsPerBlock + i] = mine[i];
    }
    __syncthreads();
    if (q < count) {
      Anchor<M> anchor = anchors[q];
      for (int warp = 1; warp < kRowThreads / 32; ++warp) anchor.merge(anchors[warp * kRowsPerBlock + q]);
      if (single_positive) anchor.positive = task.positives[s * p.side[0].rows + row0 + q], anchor.count = 1;
      finish_anchor(p, s, row0 + q, anchor, single_positive, p.valid(row0 + q));
    }
  }
  if (!task.weigh) return;
  if (q < count) {
    Facts<M> known{};
    p.load_stats(s, row0 + q, known);
    rows[q].reference = known.reference;
    rows[q].negative_weight = known.negative_weight, rows[q].positive_weight = known.positive_weight;
  }
  __syncthreads();
  const bool both = P::kTwoSided && p.stats[o].negative_weight != nullptr;  // a score also counts in its column's loss
  for (int64_t column = threadIdx.x * kPack; column < columns; column += kRowThreads * kPack) {
    M at[kRowsPerBlock][kPack];
#pragma unroll
    for (int i = 0; i < kRowsPerBlock; ++i) scores_of(i, column, at[i]);
    ColumnStats<M, kPack> facts;
    facts.load(task, o, column, columns);
    AnchorStats<M, kPack> anchors_of;
    if (both) anchors_of.load(p, o, column, columns);
#pragma unroll
    for (int i = 0; i < kRowsPerBlock; ++i) {
      if (i >= count) continue;
      const RowStats<M>& row = rows[i];
      const auto positive = [&](int k) {  // few pairs are positive: what they need stays in memory
        const bool anchor = both && column + k < columns;
        return anchor ? -(row.positive_weight + p.stats[o].positive_weight[column + k] * p.anchor_weight(column + k))
                      : -row.positive_weight;
      };
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        M& g = at[i][k];
        const M score = biased_score(g, row.scale, facts.scale[k], inverse_temperature, facts.bias[k]);
        g = row.negative_weight * exponential<T>(score - row.reference);
        if (both) g += anchors_of.negative_weight[k] * exponential<T>(score - anchors_of.reference[k]);
        if (marked && (P::kEqualMarksArePositive ? task.marks[o][column + k] : facts.mark[k]) == row.mark)
          g = P::kEqualMarksArePositive ? g + positive(k) : M(0);
      }
      at_column<kPack>(column, row.partner, [&](int k) { at[i][k] = positive(k); });
      if constexpr (P::kTwoSided) at_column<kPack>(column, row.own, [&](int k) { at[i][k] = 0; });
      Pack<T, kPack> weights;
#pragma unroll
      for (int k = 0; k < kPack; ++k) weights.at[k] = narrow<T>(at[i][k] * (row.scale * facts.scale[k]));
      *reinterpret_cast<Pack<T, kPack>*>(task.weights + (begin + i) * task.pitch + column) = weights;
    }
  }
}

// Rows [first, first + rows) of a side's gradient; sums start at row `first`.
template <class P, class A>
struct ProjectTask {
  P p;
  const A* sums;
  const typename P::M* full_scale;
  int64_t first, rows;
  int side;
};
template <class P, class A>
__global__ void __launch_bounds__(kRowThreads, 4) contrast_project(ProjectTask<P, A> task) {
  using M = typename P::M;
  const P& p = task.p;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32, r = task.first + at;
  if (at >= task.rows) return;
  auto* out = p.gradient_row(task.side, r);
  if (out == nullptr) return;
  const int64_t width = p.side[task.side].width;
  // The weights already contain the scales of this row and of the other side.
  const M scale = p.stats[task.side].scale[r], factor = *p.unit * task.full_scale[r] / (*p.temperature * scale);
  project_row(task.sums + at * width, p.side[task.side].row(r), scale, factor, p.normalize, width, p.side[task.side].vector, out);
}

}  // namespace cmlm
