// The gradient of a contrast, tile by tile, after the softmax of contrast_tiles.cuh: scores never leave the chip.
//
// Grid:   one block per 64 rows of either side, or per 64 rows and share of the other side's rows.
// Tile:   as in contrast_tiles.cuh.
// Loop:   over the other side's tiles: recomputes their scores and turns them into weights in shared memory; once 512 bytes per
//         row are full, adds weights · rows of the other side to `sums`, 128 bytes of D at a time. At the end, backpropagates
//         through the normalisation.
// Memory: each block reads its rows once per tile and the other side twice, mostly from L2; writes the gradient once and `sums`
//         once per 512 bytes of weights. The last block of a row's shares reads all their sums once.
// Types:  scores and sums in float (double for double); weights in T between the products.
// Determinism: a row belongs to one block, sums run in the order of tiles, and shares are added in order by the last block to
//         arrive.
#pragma once

#include "cuda/contrast_tiles.cuh"

namespace cmlm {

template <class T>
constexpr int kWeightPitch = 528 / sizeof(T);  // 512 bytes of weights per row, and 16 against bank conflicts
template <class T>
constexpr int kSlots = 512 / sizeof(T) / kTile;  // tiles of weights that fit

template <class T>
constexpr size_t kGradientShared = room<T>(2 * kStages * kSlice<T>) + room<T>(kTile * kWeightPitch<T>) +
                                   2 * room<Facts<math_t<T>>>(kTile) + room<int64_t>(kSlots<T>) +
                                   room<float>(kSlots<T> * kTile) + room<unsigned>(1);
static_assert(kGradientShared<double> <= 99 << 10 && kGradientShared<Fp16> <= 99 << 10);  // the lowest limit: 8.6, 12.0

// sums (+)= weights · y over the tiles in `list`.
template <class T>
__device__ __forceinline__ void add_products(const Matrix<T>& y, const T* weights, const int64_t* list, int slots,
                                             const float* powers, T* slices, bool fresh, int64_t row0, int64_t rows,
                                             math_t<T>* sums) {
  Product<T, kDepth<T>> product;
  pipeline(
      static_cast<int>(ceil_div(y.width, kDepth<T>)) * slots,
      [&](int step, int stage) {
        load_slice(y, list[step % slots] * kTile, static_cast<int64_t>(step / slots) * kDepth<T>, slices + stage * kSlice<T>);
      },
      [&](int step, int stage) {
        const int slot = step % slots;
        if (slot == 0) product.clear();
        T* slice = slices + stage * kSlice<T>;
        if constexpr (std::is_same_v<T, Fp16>) {  // scale rows to a length between 1/2 and 1
          constexpr int kPack = 16 / sizeof(T);
          auto* half = reinterpret_cast<Pack<T, kPack>*>(slice + threadIdx.x / 2 * kPitch<T> + threadIdx.x % 2 * (kDepth<T> / 2));
#pragma unroll
          for (int d = 0; d < kDepth<T> / 2 / kPack; ++d) {
            Pack<T, kPack> pack = half[d];
#pragma unroll
            for (int k = 0; k < kPack; ++k) pack.at[k] = narrow<T>(widen(pack.at[k]) * powers[slot * kTile + threadIdx.x / 2]);
            half[d] = pack;
          }
          __syncthreads();
        }
        multiply_weights(weights + slot * kTile, kWeightPitch<T>, slice, product);
        if (slot + 1 < slots) return;
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int n = 0; n < kDepth<T> / 8; ++n) {
            const int64_t i = row0 + tile_row(h), d = static_cast<int64_t>(step / slots) * kDepth<T> + tile_column(n, 0);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              if (i >= rows || d + e >= y.width) continue;
              math_t<T>& sum = sums[i * y.width + d + e];
              sum = fresh ? product.at[n][2 * h + e] : sum + product.at[n][2 * h + e];
            }
          }
      });
}

template <class P>
__global__ void __launch_bounds__(kTileThreads, 2) contrast_gradient(P p) {
  using T = typename P::Number;
  using M = typename P::M;
  Shared shared;
  T* slices = shared.take<T>(2 * kStages * kSlice<T>);
  T* weights = shared.take<T>(kTile * kWeightPitch<T>);
  Facts<M>* rows = shared.take<Facts<M>>(kTile);
  Facts<M>* columns = shared.take<Facts<M>>(kTile);
  int64_t* list = shared.take<int64_t>(kSlots<T>);
  float* powers = shared.take<float>(kSlots<T> * kTile);
  unsigned* flag = shared.take<unsigned>(1);
  const Place place = place_of(p, blockIdx.x);
  const int s = place.side, o = p.other(s);
  const Matrix<T> x = p.side[s], y = p.side[o];
  const int64_t end = least<int64_t>(place.row + kTile, x.rows);
  if (p.gradient_row(s, place.row) == nullptr && p.gradient_row(s, end - 1) == nullptr) return;
  const int mine = threadIdx.x;
  const unsigned shares = gridDim.y;
  M* sums = p.sums[s] + blockIdx.y * (x.rows * x.width);

  const M inverse_temperature = 1 / *p.temperature;
  int slots = 0;
  bool fresh = true, known = false;
  for (int64_t tile = blockIdx.y; tile * kTile < y.rows || slots > 0; tile += shares) {
    const int64_t column = tile * kTile;
    const bool ends = column >= y.rows;
    if (!ends && p.wants(s, place.tile, tile)) {
      Product<T, kTile> product;
      M squares[2];
      multiply_rows<false>(x, place.row, y, column, slices, product, squares);
      if (!known && mine < kTile && place.row + mine < x.rows) {
        rows[mine] = p.facts(s, place.row + mine);
        p.load_stats(s, place.row + mine, rows[mine]);
      }
      known = true;
      if (mine < kTile && column + mine < y.rows) {
        columns[mine] = p.facts(o, column + mine);
        p.load_stats(o, column + mine, columns[mine]);
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
              const M score = score_of(scores(n, 2 * h + e), row.scale, other.scale, inverse_temperature);
              g = p.weight(s, row, other, i, j, score) * other.scale;
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
      add_products(y, weights, list, slots, powers, slices, fresh, place.row, x.rows, sums);
      fresh = false;
      slots = 0;
    }
    if (ends) break;
  }
  if (shares > 1) {
    if (fresh)
      for (int64_t at = place.row * x.width + threadIdx.x; at < end * x.width; at += kTileThreads) sums[at] = 0;
    if (!last_block(p.gradient_tickets + blockIdx.x, shares, flag)) return;
    fresh = true;
    for (int64_t tile = 0; fresh && tile * kTile < y.rows; ++tile) fresh = !p.wants(s, place.tile, tile);
  }
  __syncthreads();
  const M factor = *p.unit * inverse_temperature;
  const int64_t share_size = x.rows * x.width;
  for (int64_t i = place.row + threadIdx.x / 32; i < end; i += kTileThreads / 32) {
    T* out = p.gradient_row(s, i);
    if (out == nullptr) continue;
    if (fresh) {
      for (int64_t d = threadIdx.x % 32; d < x.width; d += 32) out[d] = narrow<T>(0);
      continue;
    }
    M* row = p.sums[s] + i * x.width;
    if (shares > 1) {
      for (int64_t d = threadIdx.x % 32; d < x.width; d += 32) {
        M sum = load_fresh(row + d);
        for (unsigned share = 1; share < shares; ++share) sum += load_fresh(row + share * share_size + d);
        row[d] = sum;
      }
      __syncwarp();
    }
    const M scale = p.stats[s].scale[i];
    project_row(row, x.row(i), scale, factor * scale, p.normalize, x.width, x.vector, out);
  }
}

}  // namespace cmlm
