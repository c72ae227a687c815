// Shared by token_contrastive and info_nce on CUDA. Both take a softmax over the scores s = x·y / (‖x‖‖y‖τ) of two sides' rows:
//
//   token_contrastive   side 0: queries (anchors)   side 1: keys
//   info_nce cross      side 0: z1 (anchors)        side 1: z2 (anchors if symmetric)
//   info_nce self       side 0: [z1; z2] (anchors), against itself
//
// A problem P (token_contrastive.cuh, info_nce.cuh) defines which pairs are negatives and which are positives. An anchor's
// softmax runs over its negatives. A single positive is kept out of it, so that neither a loss near 0 nor its gradient is
// computed as a difference of nearly equal numbers. The softmax reduces an anchor to four numbers (Stats), from which the
// gradient of any tile can be recomputed.
#pragma once

#include "common/cuda.cuh"
#include "cuda/mma.cuh"

namespace cmlm {

// One entry per row of a side. On a side without anchors, all but scale are null.
template <class M>
struct Stats {
  M* scale;  // 1 / max(‖row‖, 1e-12), or 1
  M* reference;
  M* negative_weight;  // a score's gradient: negative_weight · exp(s − reference) if negative, less
  M* positive_weight;  // positive_weight if positive
};

// What its pairs need to know of a row.
template <class M>
struct Facts {
  M scale, reference, negative_weight, positive_weight;
  int64_t target;      // token_contrastive: index of a query's positive
  int64_t token;       // or label
  int32_t start, end;  // candidate range of a query
};

enum class Reduce : int { none, mean, sum, weighted };

template <class T>
struct Contrast {
  using Number = T;
  using M = math_t<T>;
  Matrix<T> side[2];
  Stats<M> stats[2];
  bool self, symmetric, normalize;
  Reduce reduce;
  const M* temperature;
  const M* row_weight;  // per anchor of a side, if weighted
  M *losses, *tau_terms;    // per anchor, side 0 first; tau_term: −τ · ∂loss/∂τ
  M *loss, *grad_temperature;
  M* unit;              // an anchor's largest weight, factored out of gradients until they are written, lest float16 lose them
  unsigned* tickets;    // of the softmax [row tiles + 1] and of the gradient [row tiles], initially zero
  unsigned* gradient_tickets;
  M* partial;           // [anchors, splits, 5]
  int splits;
  M* sums[2];           // [shares, rows, width] per side: the gradient before backpropagation through the normalisation
  T* gradient[2][2];    // for each side's first and second piece; null if not wanted

  __device__ __forceinline__ int other(int s) const { return self ? 0 : 1 - s; }
  __device__ __forceinline__ int anchors() const { return !self && symmetric ? 2 : 1; }  // number of sides with anchors
  __device__ __forceinline__ M half() const { return !self && symmetric ? M(0.5) : M(1); }
  __device__ __forceinline__ T* gradient_row(int s, int64_t r) const {
    const bool second = r >= side[s].split;
    T* piece = gradient[s][second];
    return piece == nullptr ? nullptr : piece + (r - (second ? side[s].split : 0)) * side[s].width;
  }

  // Weight of anchor r in the loss, in multiples of the unit.
  __device__ __forceinline__ M anchor_weight(int64_t r) const {
    return half() * (reduce == Reduce::weighted ? row_weight[r] / *unit : M(1));
  }
  // Loads what the softmax stored for row r, times the anchor's weight.
  __device__ __forceinline__ void load_stats(int s, int64_t r, Facts<M>& facts) const {
    const Stats<M>& known = stats[s];
    facts.scale = known.scale[r];
    facts.reference = known.negative_weight != nullptr ? known.reference[r] : -kLowest<M>;
    const M weight = known.negative_weight == nullptr ? M(0) : anchor_weight(r);
    facts.negative_weight = known.negative_weight != nullptr ? known.negative_weight[r] * weight : M(0);
    facts.positive_weight = known.negative_weight != nullptr ? known.positive_weight[r] * weight : M(0);
  }
};

// The score of a dot product. Softmax and gradient must round it identically, whichever row comes first: a weight is the
// exponential of a difference between scores, which are as large as 1/τ.
template <class M>
__device__ __forceinline__ M score_of(M product, M scale, M other_scale, M inverse_temperature) {
  return product * (scale * other_scale) * inverse_temperature;
}

// The gradient with respect to the score s of anchor a (facts of row i) and row j of the other side, in multiples of the unit.
template <class P, class M>
__device__ __forceinline__ M part(const P& p, const Facts<M>& a, const Facts<M>& b, int64_t i, int64_t j, M s) {
  M g = p.negative(a, b, i, j) ? a.negative_weight * std::exp(s - a.reference) : M(0);
  return p.positive(a, b, i, j) ? g - a.positive_weight : g;
}

// One anchor's softmax, and the sum and number of its positives.
template <class M>
struct Anchor {
  Softmax<M> others;
  M positive = 0, count = 0;

  __device__ __forceinline__ void merge(const Anchor& other) {
    others.merge(other.others);
    positive += other.positive;
    count += other.count;
  }
  // The value held by the lane whose index differs in the bit `by`.
  __device__ __forceinline__ Anchor across(int by) const {
    const auto from = [&](M value) { return __shfl_xor_sync(kWarp, value, by); };
    return {{from(others.largest), from(others.sum), from(others.moment)}, from(positive), from(count)};
  }
};

// Writes loss, tau_term and Stats of anchor r. `single_positive`: it has a single positive, which is not among the others.
template <class T, class M>
__device__ __forceinline__ void finish_anchor(const Contrast<T>& p, int s, int64_t r, Anchor<M> anchor, bool single_positive,
                                              bool valid) {
  M loss = 0, tau_term = 0, negative_weight = 0, positive_weight = 0, reference = -kLowest<M>;
  if (valid) {
    Softmax<M>& others = anchor.others;
    const M positive = anchor.positive / anchor.count;
    if (single_positive) {
      others.raise(most(others.largest, positive));
      const M own = std::exp(positive - others.largest), total = others.sum + own;
      loss = others.sum < own ? std::log1p(others.sum / own) : std::log(total) + (others.largest - positive);
      tau_term = (others.moment + others.sum * (others.largest - positive)) / total;
      positive_weight = others.sum / total;
      negative_weight = 1 / total;
    } else {
      loss = std::log(others.sum) + (others.largest - positive);
      tau_term = others.moment / others.sum + (others.largest - positive);
      positive_weight = 1 / anchor.count;
      negative_weight = 1 / others.sum;
    }
    reference = others.largest;
  }
  p.stats[s].reference[r] = reference;
  p.stats[s].negative_weight[r] = negative_weight;
  p.stats[s].positive_weight[r] = positive_weight;
  const int64_t at = s * p.side[0].rows + r;
  p.losses[at] = loss;
  p.tau_terms[at] = tau_term;
}

// Computes the unit with one block; scratch [32].
template <class P>
__device__ __forceinline__ void finish_unit(const P& p, double* scratch) {
  using M = typename P::M;
  const int64_t rows = p.side[0].rows;
  double valid = 0;
  M largest = 0;
  for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) {
    valid += p.valid(i);
    if (p.reduce == Reduce::weighted) largest = most(largest, std::abs(p.row_weight[i]));
  }
  valid = block_sum(valid, scratch);
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) largest = most(largest, __shfl_xor_sync(kWarp, largest, lane));
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = largest;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) largest = most(largest, static_cast<M>(scratch[warp]));
  *p.unit = p.reduce == Reduce::weighted ? (largest > 0 ? largest : M(1))
                                         : static_cast<M>(p.reduce == Reduce::mean ? 1 / most(valid, 1.0) : 1.0);
}

// Computes the reduced loss and the temperature's gradient with one block, from what all anchors and finish_unit have written.
template <class P>
__device__ __forceinline__ void finish_totals(const P& p, double* scratch) {
  using M = typename P::M;
  const int64_t rows = p.side[0].rows, all = rows * p.anchors();
  double loss = 0, tau_term = 0;
  for (int64_t i = threadIdx.x; i < all; i += blockDim.x) {
    const M weight = p.reduce == Reduce::weighted ? p.row_weight[i < rows ? i : i - rows] : M(1);
    const M own = load_fresh(p.losses + i);
    loss += static_cast<double>(weight) * own;
    tau_term += static_cast<double>(weight) * load_fresh(p.tau_terms + i);
    if (p.reduce == Reduce::none && i < rows) p.loss[i] = all > rows ? (own + load_fresh(p.losses + i + rows)) / 2 : own;
  }
  loss = block_sum(loss, scratch);
  tau_term = block_sum(tau_term, scratch);
  if (threadIdx.x > 0) return;
  const double factor = p.reduce == Reduce::mean ? *p.unit * static_cast<double>(p.half()) : static_cast<double>(p.half());
  if (p.reduce == Reduce::mean || p.reduce == Reduce::sum) *p.loss = static_cast<M>(factor * loss);
  *p.grad_temperature = p.reduce == Reduce::none ? M(0) : static_cast<M>(-factor * tau_term / *p.temperature);
}

// The tile of 64 rows that a block owns.
struct Place {
  int side;
  int64_t tile, row;
};
template <class T>
__device__ __forceinline__ Place place_of(const Contrast<T>& p, int64_t block) {
  const int64_t tiles = ceil_div(p.side[0].rows, kTile);
  const int side = block < tiles ? 0 : 1;
  const int64_t tile = side == 0 ? block : block - tiles;
  return {side, tile, tile * kTile};
}

// Checks the temperature, which only the device sees; `message` states the rule.
template <class M>
__device__ __forceinline__ void check_temperature(M temperature, const char* message) {
  if (!(temperature > 0 && temperature < kInfinity<M>)) stop(message);
}

// A warp computes out = factor · (gradient with respect to the unit row, backpropagated through the normalisation); out may
// alias sums.
template <class T, class A>
__device__ __forceinline__ void project_row(const A* sums, const T* x, math_t<T> scale, math_t<T> factor, bool normalize,
                                            int64_t width, bool vector, T* out) {
  using M = math_t<T>;
  M along = 0;
  if (normalize) {
    for_packs<T>(width, vector, [&](int64_t d, auto count) {
      constexpr int kCount = decltype(count)::value;
      const auto sum = load_pack<kCount>(sums + d);
      const auto row = load_pack<kCount>(x + d);
#pragma unroll
      for (int k = 0; k < kCount; ++k) along += widen(sum.at[k]) * widen(row.at[k]);
    });
    along = warp_sum(along) * scale * scale;
  }
  for_packs<T>(width, vector, [&](int64_t d, auto count) {
    constexpr int kCount = decltype(count)::value;
    const auto sum = load_pack<kCount>(sums + d);
    const auto row = load_pack<kCount>(x + d);
    Pack<T, kCount> gradient;
#pragma unroll
    for (int k = 0; k < kCount; ++k) gradient.at[k] = narrow<T>(factor * (widen(sum.at[k]) - along * widen(row.at[k])));
    *reinterpret_cast<Pack<T, kCount>*>(out + d) = gradient;
  });
}

}  // namespace cmlm
