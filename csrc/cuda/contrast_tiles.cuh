// The softmax of a contrast and its gradient, tile by tile: no score leaves the chip.
//
// Grid:   forward: a block for 64 anchors, or one for each of several shares (splits) of the other side's rows; gradient: a block
//         for 64 rows of either side.
// Tile:   64×64 scores over D in slices of 128 bytes a row, the next slice on its way by cp.async while tensor cores (float,
//         double: multiply-adds) work on this one. Tiles that none of the 64 rows wants are skipped.
// Loop:   forward: over the other side's tiles, keeping the softmax of each row; norms are made of the same slices. gradient: the
//         scores again, turned into weights in shared memory until 512 bytes a row are full; then weights · rows of the other side,
//         128 bytes of D at a time, into `sums`; at the end through the normalisation.
// Memory: each block reads its rows once a tile and the other side once (forward) or twice (gradient), from L2 for the most part;
//         writes 4 numbers a row (forward), the gradient once and sums once for each 512 bytes of weights (gradient).
// Types:  scores, softmax and sums in float (double for double); weights in T between the products.
// Same bits every time: a row belongs to one block, sums run in the order of tiles; shares of a row are merged in order by the
//         last block to arrive, as are all rows' losses. Several blocks may write one scale: always the same number.
#pragma once

#include "cuda/contrast.cuh"

namespace cmlm {

template <class T>
constexpr int kWeightPitch = 528 / sizeof(T);  // 512 bytes of weights a row, and 16 against bank conflicts
template <class T>
constexpr int kSlots = 512 / sizeof(T) / kTile;  // tiles of weights

template <class T>
constexpr size_t kForwardShared = room<T>(4 * kSlice<T>) + 2 * room<Facts<math_t<T>>>(kTile) + room<unsigned>(1) + room<double>(32);
template <class T>
constexpr size_t kGradientShared = room<T>(4 * kSlice<T>) + room<T>(kTile * kWeightPitch<T>) + 2 * room<Facts<math_t<T>>>(kTile) +
                                   room<int64_t>(kSlots<T>) + room<float>(kSlots<T> * kTile);

// A thread's scores: in registers, or for double, whose exponentials need these, where the slices were.
template <class T>
class Scores {
  static constexpr bool kStaged = sizeof(math_t<T>) == 8;

 public:
  static constexpr int kUnroll = kStaged ? 1 : kTile / 8;

  __device__ __forceinline__ Scores(Product<T, kTile>& product, T* slices) : product_(product), own_(slices) {
    if constexpr (kStaged) {
      static_assert(kTile * kTile <= 4 * kSlice<T>);
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
  T* slices = shared.take<T>(4 * kSlice<T>);
  Facts<M>* rows = shared.take<Facts<M>>(kTile);
  Facts<M>* columns = shared.take<Facts<M>>(kTile);
  unsigned* flag = shared.take<unsigned>(1);
  double* scratch = shared.take<double>(32);
  const Place place = place_of(p, blockIdx.x);
  const int s = place.side, o = p.other(s);
  const Matrix<T> x = p.side[s], y = p.side[o];
  const int mine = threadIdx.x / 2;  // the row, and column, of which this thread makes facts and half the squares
  const bool first_half = threadIdx.x % 2 == 0;
  if (first_half && place.row + mine < x.rows) rows[mine] = p.facts(s, place.row + mine);
  __syncthreads();
  const auto reach = p.reach(rows, least<int64_t>(kTile, x.rows - place.row));
  if (threadIdx.x == 0) p.keep_reach(place.tile, reach);

  const M coldness = 1 / *p.temperature;
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
          const M score = inside ? score_of(at, row.scale, other.scale, coldness) : M(0);
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
    finish_anchor(p, s, i, anchor, p.lone(), p.valid(i));
  }
  if (!last_block(p.tickets, gridDim.x, flag)) return;
  finish_unit(p, scratch);
  finish_totals(p, scratch);
}

// sums (+)= weights · y over the tiles in `list`.
template <class T>
__device__ __forceinline__ void add_products(const Matrix<T>& y, const T* weights, const int64_t* list, int slots,
                                             const float* powers, T* slices, bool fresh, int64_t row0, int64_t rows,
                                             math_t<T>* sums) {
  const auto steps = static_cast<int>(ceil_div(y.width, kDepth<T>)) * slots;
  const auto load = [&](int step) {
    load_slice(y, list[step % slots] * kTile, static_cast<int64_t>(step / slots) * kDepth<T>, slices + step % 2 * kSlice<T>);
    commit_copies();
  };
  Product<T, kDepth<T>> product;
  __syncthreads();
  load(0);
  for (int step = 0; step < steps; ++step) {
    const int slot = step % slots;
    if (slot == 0) product.clear();
    wait_copies<0>();
    __syncthreads();
    T* slice = slices + step % 2 * kSlice<T>;
    if constexpr (std::is_same_v<T, Fp16>) {  // to a length between 1/2 and 1
      T* half = slice + threadIdx.x / 2 * kPitch<T> + threadIdx.x % 2 * (kDepth<T> / 2);
      for (int d = 0; d < kDepth<T> / 2; ++d) half[d] = narrow<T>(widen(half[d]) * powers[slot * kTile + threadIdx.x / 2]);
      __syncthreads();
    }
    if (step + 1 < steps) load(step + 1);
    multiply_weights(weights + slot * kTile, kWeightPitch<T>, slice, product);
    if (slot + 1 < slots) continue;
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int n = 0; n < kDepth<T> / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int64_t i = row0 + tile_row(h), d = static_cast<int64_t>(step / slots) * kDepth<T> + tile_column(n, e);
          if (i >= rows || d >= y.width) continue;
          math_t<T>& sum = sums[i * y.width + d];
          sum = fresh ? product.at[n][2 * h + e] : sum + product.at[n][2 * h + e];
        }
  }
}

template <class P>
__global__ void __launch_bounds__(kTileThreads, 2) contrast_gradient(P p) {
  using T = typename P::Number;
  using M = typename P::M;
  Shared shared;
  T* slices = shared.take<T>(4 * kSlice<T>);
  T* weights = shared.take<T>(kTile * kWeightPitch<T>);
  Facts<M>* rows = shared.take<Facts<M>>(kTile);
  Facts<M>* columns = shared.take<Facts<M>>(kTile);
  int64_t* list = shared.take<int64_t>(kSlots<T>);
  float* powers = shared.take<float>(kSlots<T> * kTile);
  const Place place = place_of(p, blockIdx.x);
  const int s = place.side, o = p.other(s);
  const Matrix<T> x = p.side[s], y = p.side[o];
  const int64_t end = least<int64_t>(place.row + kTile, x.rows);
  if (p.gradient_row(s, place.row) == nullptr && p.gradient_row(s, end - 1) == nullptr) return;
  const int mine = threadIdx.x;

  const M coldness = 1 / *p.temperature;
  int slots = 0;
  bool fresh = true, known = false;
  for (int64_t tile = 0; tile * kTile < y.rows || slots > 0; ++tile) {
    const int64_t column = tile * kTile;
    const bool ends = column >= y.rows;
    if (!ends && p.wants(s, place.tile, tile)) {
      Product<T, kTile> product;
      M squares[2];
      multiply_rows<false>(x, place.row, y, column, slices, product, squares);
      if (!known && mine < kTile && place.row + mine < x.rows) {
        rows[mine] = p.facts(s, place.row + mine);
        p.recall(s, place.row + mine, rows[mine]);
      }
      known = true;
      if (mine < kTile && column + mine < y.rows) {
        columns[mine] = p.facts(o, column + mine);
        p.recall(o, column + mine, columns[mine]);
      }
      if constexpr (std::is_same_v<T, Fp16>)
        if (mine < kTile) powers[slots * kTile + mine] = column + mine < y.rows ? power_below(columns[mine].scale) : 1.0f;
      if (mine == 0) list[slots] = tile;
      __syncthreads();
      Scores<T> scores(product, slices);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Facts<M> row = rows[tile_row(h)];
        const int64_t i = place.row + tile_row(h);
#pragma unroll Scores<T>::kUnroll
        for (int n = 0; n < kTile / 8; ++n) {
          Pack<T, 2> pair;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int64_t j = column + tile_column(n, e);
            M g = 0;
            if (i < x.rows && j < y.rows) {
              const Facts<M>& other = columns[tile_column(n, e)];
              g = p.weight(s, row, other, i, j, score_of(scores(n, 2 * h + e), row.scale, other.scale, coldness)) * other.scale;
              if constexpr (std::is_same_v<T, Fp16>) g /= powers[slots * kTile + tile_column(n, e)];
            }
            pair.at[e] = narrow<T>(g);
          }
          *reinterpret_cast<Pack<T, 2>*>(weights + tile_row(h) * kWeightPitch<T> + slots * kTile + tile_column(n, 0)) = pair;
        }
      }
      ++slots;
    }
    if (slots == kSlots<T> || (ends && slots > 0)) {
      add_products(y, weights, list, slots, powers, slices, fresh, place.row, x.rows, p.sums[s]);
      fresh = false;
      slots = 0;
    }
    if (ends) break;
  }
  __syncthreads();
  const M factor = *p.unit * coldness;
  for (int64_t i = place.row + threadIdx.x / 32; i < end; i += kTileThreads / 32) {
    T* out = p.gradient_row(s, i);
    if (out == nullptr) continue;
    if (fresh) {
      for (int64_t d = threadIdx.x % 32; d < x.width; d += 32) out[d] = narrow<T>(0);
    } else {
      const M scale = rows[i - place.row].scale;
      project_row(p.sums[s] + i * x.width, x.row(i), scale, factor * scale, p.normalize, x.width, out);
    }
  }
}

}  // namespace cmlm
