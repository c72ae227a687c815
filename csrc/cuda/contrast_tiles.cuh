// The softmax of a contrast, tile by tile: scores never leave the chip. The gradient is in contrast_gradient.cuh.
//
// Grid:   one block per 64 anchors, or per 64 anchors and share (split) of the other side's rows.
// Tile:   64×64 scores, accumulated over D in slices of 128 bytes per row; cp.async fetches the next slices while tensor cores
//         (float, double: multiply-adds) work on this one. Tiles that none of the 64 rows wants are skipped.
// Loop:   over the other side's tiles, keeping the softmax of each row; norms come from the same slices.
// Memory: each block reads its rows once per tile and the other side once, mostly from L2; writes 4 numbers per row.
// Types:  scores and softmax in float (double for double).
// Determinism: a row belongs to one block; the last block to arrive merges a row's shares in order, and the last of all adds up
//         the rows' losses. Several blocks may write one scale: always the same number.
#pragma once

#include "cuda/contrast.cuh"

namespace cmlm {

template <class T>
constexpr size_t kForwardShared = room<T>(2 * kStages * kSlice<T>) + 2 * room<Facts<math_t<T>>>(kTile) + room<unsigned>(1) + room<double>(32);

// A thread's scores: in registers or, for double, whose exponentials need the registers, where the slices were.
template <class T>
class Scores {
  static constexpr bool kStaged = sizeof(math_t<T>) == 8;

 public:
  static constexpr int kUnroll = kStaged ? 1 : kTile / 8;

  __device__ __forceinline__ Scores(Product<T, kTile>& product, T* slices) : product_(product), own_(slices) {
    if constexpr (kStaged) {
      static_assert(kTile * kTile <= 2 * kStages * kSlice<T>);
#pragma unroll
      for (int i = 0; i < kTile / 2; ++i) slices[i * kTileThreads + threadIdx.x] = product.at[i / 4][i % 4];
    }
  }
  __device__ __forceinline__ math_t<T>& operator()(int n, int i) {
    if constexpr (kStaged)
      return own_[(n * 4 + i) * kTileThreads + threadIdx.x];
    else
      return product_.at[n][i];
  }

 private:
  Product<T, kTile>& product_;
  T* own_;
};

template <class M>
__device__ __forceinline__ M inverse_norm(M squares, bool normalize) {
  return normalize ? 1 / most(std::sqrt(squares), M(1e-12)) : M(1);
}

template <class P>
__global__ void __launch_bounds__(kTileThreads, 2) contrast_forward(P p) {
  using T = typename P::Number;
  using M = typename P::M;
  Shared shared;
  T* slices = shared.take<T>(2 * kStages * kSlice<T>);
  Facts<M>* rows = shared.take<Facts<M>>(kTile);
  Facts<M>* columns = shared.take<Facts<M>>(kTile);
  unsigned* flag = shared.take<unsigned>(1);
  double* scratch = shared.take<double>(32);
  const Place place = place_of(p, blockIdx.x);
  const int s = place.side, o = p.other(s);
  const Matrix<T> x = p.side[s], y = p.side[o];
  const int mine = threadIdx.x / 2;  // the row and the column whose facts and half of whose squares this thread computes
  const bool first_half = threadIdx.x % 2 == 0;
  if (first_half && place.row + mine < x.rows) {
    p.check(s, place.row + mine);
    rows[mine] = p.facts(s, place.row + mine);
  }
  if (threadIdx.x == 0) p.check_temperature();
  __syncthreads();
  const auto reach = p.reach(rows, least<int64_t>(kTile, x.rows - place.row));
  if (threadIdx.x == 0) p.keep_reach(place.tile, reach);

  const M inverse_temperature = 1 / *p.temperature;
  Anchor<M> anchors[2];
  for (int64_t tile = blockIdx.y; tile * kTile < y.rows; tile += p.splits) {
    if (!p.touches(reach, tile * kTile, (tile + 1) * kTile)) continue;
    const int64_t column = tile * kTile;
    Product<T, kTile> product;
    M squares[2] = {0, 0};
    multiply_rows<true>(x, place.row, y, column, slices, product, squares);
    for (int m = 0; m < 2; ++m) squares[m] = inverse_norm(squares[m] + __shfl_xor_sync(kWarp, squares[m], 1), p.normalize);
    if (first_half && place.row + mine < x.rows) p.stats[s].scale[place.row + mine] = rows[mine].scale = squares[0];
    if (first_half && column + mine < y.rows) {
      columns[mine] = p.facts(o, column + mine);
      p.stats[o].scale[column + mine] = columns[mine].scale = squares[1];
    }
    __syncthreads();
    Scores<T> scores(product, slices);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Facts<M> row = rows[tile_row(h)];
      const int64_t i = place.row + tile_row(h);
      Anchor<M>& anchor = anchors[h];
      M largest = anchor.others.largest;
#pragma unroll Scores<T>::kUnroll
      for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const Facts<M>& other = columns[tile_column(n, e)];
          const int64_t j = column + tile_column(n, e);
          const bool inside = i < x.rows && j < y.rows;
          M& at = scores(n, 2 * h + e);
          const M score = inside ? score_of(at, row.scale, other.scale, inverse_temperature) : M(0);
          const bool positive = inside && p.positive(row, other, i, j);
          anchor.positive += positive ? score : M(0);
          anchor.count += positive ? M(1) : M(0);
          at = inside && p.negative(row, other, i, j) ? score : -kInfinity<M>;
          largest = most(largest, at);
        }
      anchor.others.raise(largest);
#pragma unroll Scores<T>::kUnroll
      for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) anchor.others.add(scores(n, 2 * h + e));
    }
  }

  M* partial = p.partial + ((s * p.side[0].rows + place.row) * p.splits) * 5;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    for (int lane = 1; lane < 4; lane *= 2) anchors[h].merge(anchors[h].across(lane));
    if (p.splits == 1 || threadIdx.x % 4 != 0 || place.row + tile_row(h) >= x.rows) continue;
    const Anchor<M>& a = anchors[h];
    M* to = partial + (static_cast<int64_t>(tile_row(h)) * p.splits + blockIdx.y) * 5;
    to[0] = a.others.largest, to[1] = a.others.sum, to[2] = a.others.moment, to[3] = a.positive, to[4] = a.count;
  }
  if (p.splits > 1 && !last_block(p.tickets + 1 + blockIdx.x, p.splits, flag)) return;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t i = place.row + tile_row(h);
    if (threadIdx.x % 4 != 0 || i >= x.rows) continue;
    Anchor<M> anchor = anchors[h];
    for (int split = 0; p.splits > 1 && split < p.splits; ++split) {
      const M* from = partial + (static_cast<int64_t>(tile_row(h)) * p.splits + split) * 5;
      const Softmax<M> others{load_fresh(from), load_fresh(from + 1), load_fresh(from + 2)};
      const Anchor<M> share{others, load_fresh(from + 3), load_fresh(from + 4)};
      if (split == 0)
        anchor = share;
      else
        anchor.merge(share);
    }
    finish_anchor(p, s, i, anchor, p.single_positive(), p.valid(i));
  }
  if (!last_block(p.tickets, gridDim.x, flag)) return;
  finish_unit(p, scratch);
  finish_totals(p, scratch);
}

}  // namespace cmlm
