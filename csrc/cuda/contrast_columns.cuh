// The softmax of a symmetric cross's columns, which are anchors too, from the chunks that contrast_rows.cuh turns into weights.
//
// Grid:   columns: one block per 256 vectors of 16 bytes of columns and share of the chunk's rows. merge: one thread per column.
// Loop:   down the rows, four at a time, with the softmax of each column in registers.
// Memory: reads each score once; passes 3 numbers per column and share to merge.
// Determinism: a column's shares are merged in a fixed order.
#pragma once

#include "cuda/contrast_chunk.cuh"

namespace cmlm {

// The softmax of each column over a share of the chunk's rows, for a symmetric cross: a row's positive is also the column's.
template <class P>
__global__ void __launch_bounds__(kRowThreads, sizeof(typename P::M) == 8 ? 1 : 2) contrast_columns(RowTask<P> task) {
  using T = typename P::Number;
  using M = typename P::M;
  using Score = typename RowTask<P>::Score;
  constexpr int kPack = 16 / sizeof(Score);
  const P& p = task.p;
  const int s = task.side, o = p.other(s);
  const int64_t columns = p.side[o].rows, column = (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) * kPack;
  if (column >= columns) return;
  const M inverse_temperature = 1 / *p.temperature;
  ColumnStats<M, kPack> facts;
  facts.load(task, o, column, columns);
  Softmax<M> mine[kPack];
#pragma unroll
  for (int k = 0; k < kPack; ++k) mine[k].largest = kStart<M>;
  const int64_t begin = blockIdx.y * task.share_rows, end = least(begin + task.share_rows, task.rows);
  for (int64_t row = begin; row < end; row += kRowsPerBlock) {
    M at[kRowsPerBlock][kPack], down[kPack][kRowsPerBlock];
#pragma unroll
    for (int i = 0; i < kRowsPerBlock; ++i)
      load_scores(task.scores + least(row + i, end - 1) * task.pitch + column, columns - column, at[i]);
#pragma unroll
    for (int i = 0; i < kRowsPerBlock; ++i) {
      const int64_t r = task.first + least(row + i, end - 1);
      const M scale = p.stats[s].scale[r];
#pragma unroll
      for (int k = 0; k < kPack; ++k)
        down[k][i] = row + i < end ? biased_score(at[i][k], scale, facts.scale[k], inverse_temperature, facts.bias[k]) : kOut<M>;
      at_column<kPack>(column, static_cast<int32_t>(p.partner(s, r)), [&](int k) { down[k][i] = kOut<M>; });
    }
#pragma unroll
    for (int k = 0; k < kPack; ++k) add_scores<T>(mine[k], down[k]);
  }
  M* part = task.parts + (1 + blockIdx.y) * 3 * columns;
  for (int k = 0; k < kPack && column + k < columns; ++k) {
    part[column + k] = mine[k].largest;
    part[columns + column + k] = mine[k].sum;
    part[2 * columns + column + k] = mine[k].moment;
  }
}

// Merges a chunk's shares into the result of the chunks before it; after the last chunk, finishes the columns as anchors.
template <class P>
__global__ void __launch_bounds__(kRowThreads) contrast_merge(RowTask<P> task) {
  using M = typename P::M;
  const P& p = task.p;
  const int o = p.other(task.side);
  const int64_t columns = p.side[o].rows, column = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (column >= columns) return;
  Anchor<M> anchor;
  anchor.others.largest = kStart<M>;
  M* const parts = task.parts + column;
  for (int i = task.first > 0 ? 0 : 1; i <= task.shares; ++i) {
    const M* part = parts + i * 3 * columns;
    anchor.others.merge({part[0], part[columns], part[2 * columns]});
  }
  if (!task.last) {
    parts[0] = anchor.others.largest, parts[columns] = anchor.others.sum, parts[2 * columns] = anchor.others.moment;
    return;
  }
  anchor.positive = task.positives[p.side[0].rows + column], anchor.count = 1;
  finish_anchor(p, o, column, anchor, true, p.valid(column));
}

}  // namespace cmlm
