// info_nce, CPU: the order of steps, the matrix products and the outputs. The scores are processed in info_nce_kernel.cpp.
// Definition: cmlm_fast/ops/info_nce.py.
//
// Work:   chunks of rows of the N×N scores (N = B for cross, 2B for nt_xent and labels). One-sided cross: a chunk's scores,
//         sums, gradient and products, then the next chunk: 6·N²·D operations. Otherwise a gradient needs the sums of all
//         columns first (nt_xent and labels: of all rows, since S is symmetric; its gradient is too, so one product serves both
//         views): pass 1 computes the sums and keeps the chunks that fit kKeptScores, pass 2 recomputes the rest.
//         6 to 8·N²·D operations for cross, 4 to 6 for nt_xent and labels.
// Memory: kKeptScores or one chunk of scores, whichever is more; a chunk of a product; 12 numbers per row and one or two per
//         row and block of the chunk. Rows are copied only for nt_xent, labels and float16.
// Determinism: chunks and blocks do not depend on the number of threads, and are merged in order.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/tensors.h"
#include "cpu/gemm.h"
#include "cpu/info_nce.h"

namespace cmlm {

constexpr int64_t kChunkScores = int64_t{1} << 20, kLeastRows = 128, kMostRows = 1024;
constexpr int64_t kKeptScores = int64_t{1} << 24;  // those of 4,096 pairs: 64 MiB in float32
constexpr int64_t kGrain = int64_t{1} << 15;  // elements that are worth a thread
constexpr double kFixedScale = 32;            // a loss scaled by 2^32, divided by e^(-2·32), still fits a float

struct InfoNceRequest {
  Tensor z1, z2;
  const int64_t* labels = nullptr;  // [B]
  double temperature = 1, weight = 1;
  const void* row_weight = nullptr;  // [N], replaces weight if not null
  bool self = false, symmetric = true, normalize = true, gradient = true, z1_grad = false, z2_grad = false;
};

struct InfoNceResult {
  std::vector<double> loss;  // per row
  Tensor grad1, grad2;
  double grad_temperature = 0;
};

template <class F>
void parallel(int64_t n, int64_t work, const F& f) {  // work: elements in each of the n
  if (n > 0) torch::stable::parallel_for(0, n, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work)), f);
}

template <class T>
struct InfoNceRun {
  using C = info_nce_rows_t<T>;
  using M = math_t<T>;

  explicit InfoNceRun(const InfoNceRequest& asked)
      : request(asked), batch(asked.z1.size(0)), width(asked.z1.size(1)), n(asked.self ? 2 * batch : batch) {
    chunk = std::min(n, std::clamp(kChunkScores / std::max<int64_t>(n, 1), kLeastRows, kMostRows));
    // In a last chunk of few rows, BLAS would round the scores s_ij differently from s_ji, which are in the sums.
    while (asked.self && n > chunk && n % chunk > 0 && n % chunk < kInfoNceBlock) --chunk;
    blocks = (chunk + kInfoNceBlock - 1) / kInfoNceBlock;
    nce.size = n;
    nce.self = asked.self;
    nce.two_sided = asked.self || asked.symmetric;
    nce.scale = static_cast<M>(1 / asked.temperature);
    nce.fixed = asked.normalize && nce.scale <= kFixedScale;
    columns = nce.two_sided && !nce.self;
    const int64_t chunks = n > 0 ? (n + chunk - 1) / chunk : 0;
    const int64_t fitting = nce.two_sided ? kKeptScores / std::max<int64_t>(1, chunk * n) : 1;
    slots = std::clamp<int64_t>(fitting, 1, std::max<int64_t>(chunks, 1));
    kept = slots == chunks ? chunks : slots - 1;  // the last slot serves all chunks that are recomputed
  }

  InfoNceResult operator()() {
    InfoNceResult result;
    const bool grad1 = request.gradient && request.z1_grad, grad2 = request.gradient && request.z2_grad;
    const auto rows = [&](bool wanted) { return wanted ? torch::stable::empty_like(request.z1) : empty(request.z1, {0}, request.z1.scalar_type()); };
    result.grad1 = rows(grad1);
    result.grad2 = rows(grad2);
    if (n == 0) return result;
    out1 = grad1 ? static_cast<T*>(result.grad1.mutable_data_ptr()) : nullptr;
    out2 = grad2 ? static_cast<T*>(result.grad2.mutable_data_ptr()) : nullptr;
    allocate();
    rows_and_classes();
    for (int64_t first = 0; first < n; first += chunk) {
      make_scores(first);
      make_sums(first);
      if (nce.two_sided) continue;
      finish_sums(first, last(first), result);
      if (request.gradient) make_gradient(first);
    }
    if (nce.two_sided) finish_sums(0, n, result);
    for (int64_t first = 0; request.gradient && nce.two_sided && first < n; first += chunk) {
      if (first / chunk >= kept) make_scores(first);
      make_gradient(first);
    }
    if (columns_sum() && out2 != nullptr) project(right_sum, right, right_scale, out2, n);
    for (int64_t i = 0; request.gradient && i < n; ++i) result.grad_temperature -= static_cast<double>(nce.tau_term[i]);
    result.grad_temperature *= (nce.self ? 0.5 : 1) / request.temperature;
    return result;
  }

 private:
  // nt_xent and labels have one matrix of rows and its gradient; cross has two.
  bool columns_sum() const { return !nce.self; }
  int64_t last(int64_t first) const { return std::min(first + chunk, n); }
  C* scores_of(int64_t first) const { return scores + std::min(first / chunk, slots - 1) * chunk * n; }

  template <class X>
  X* take(int64_t count) {
    memory.push_back(empty(request.z1, {count * static_cast<int64_t>(sizeof(X))}, ScalarType::Byte));
    return static_cast<X*>(memory.back().mutable_data_ptr());
  }

  void allocate() {
    M* numbers = take<M>(12 * n);
    const auto next = [&] { return std::exchange(numbers, numbers + n); };
    left_scale = next(), weight = next(), positive_gradient = next(), row_share = next();
    right_scale = nce.self ? left_scale : next();
    nce.row_sum = next(), nce.row_reference = next(), nce.positive = next(), nce.tau_term = next();
    nce.column_sum = nce.self ? nce.row_sum : next();
    nce.column_reference = nce.self ? nce.row_reference : next();
    column_share = nce.self ? row_share : next();
    scores = take<C>(slots * chunk * n);
    if (columns) block_sum = take<M>((nce.fixed ? 1 : 2) * blocks * n);
    if (!request.gradient) return;
    constexpr bool narrow = !std::is_same_v<C, M>;
    part = take<C>((narrow && out2 != nullptr && !nce.self ? n : chunk) * width);
    if (out2 == nullptr || nce.self) return;
    if constexpr (std::is_same_v<T, M>)
      right_sum = out2;
    else
      right_sum = take<M>(n * width);
  }

  void rows_and_classes() {
    constexpr bool widened = !std::is_same_v<T, C>;
    const T* z[2] = {static_cast<const T*>(request.z1.const_data_ptr()), static_cast<const T*>(request.z2.const_data_ptr())};
    C* copy = nce.self || widened ? take<C>(2 * batch * width) : nullptr;
    const auto kernel = CMLM_KERNEL(info_nce_rows<T>);
    for (int view = 0; view < 2; ++view) {
      M* scale = view == 0 ? left_scale : nce.self ? left_scale + batch : right_scale;
      C* to = copy == nullptr ? nullptr : copy + view * batch * width;
      parallel(batch, width, [&](int64_t begin, int64_t end) { kernel(z[view], width, request.normalize, begin, end, scale, to); });
    }
    if constexpr (!widened) left = z[0], right = z[1];
    if (copy != nullptr) left = copy, right = nce.self ? copy : copy + batch * width;

    int32_t* classes = request.labels == nullptr ? nullptr : take<int32_t>(n);
    std::unordered_map<int64_t, std::pair<int32_t, int64_t>> members;  // label -> class, number of its rows
    for (int64_t i = 0; classes != nullptr && i < n; ++i) {
      const auto found = members.try_emplace(request.labels[i % batch], static_cast<int32_t>(members.size()), 0).first;
      classes[i] = found->second.first;
      ++found->second.second;
    }
    const M* given = static_cast<const M*>(request.row_weight);
    for (int64_t i = 0; i < n; ++i) {
      weight[i] = (given != nullptr ? given[i] : static_cast<M>(request.weight)) * (columns ? M(0.5) : M(1));
      // A row always has a positive: the other view has its label.
      if (classes != nullptr) positive_gradient[i] = -weight[i] / static_cast<M>(members.at(request.labels[i % batch]).second - 1);
    }
    nce.left_scale = left_scale;
    nce.right_scale = right_scale;
    nce.classes = classes;
    nce.positive_gradient = positive_gradient;
    nce.row_share = row_share;
    nce.column_share = column_share;
    if (!columns) return;
    std::fill_n(nce.column_sum, n, M(0));
    std::fill_n(nce.column_reference, n, nce.fixed ? nce.scale : std::numeric_limits<M>::lowest());
  }

  void make_scores(int64_t first) {
    const int64_t rows = last(first) - first;
    C* to = scores_of(first);
    multiply(matrix(to, rows, n), matrix(left + first * width, rows, width), transposed(right, n, width));
    if (!nce.self || n > kLeastRows) return;
    // With few rows, BLAS may round s_ij and s_ji differently, and row j's sums hold s_ji: in a saturated softmax, the weights
    // would be off by as much as a score is.
    for (int64_t i = 1; i < n; ++i)
      for (int64_t j = 0; j < i; ++j) to[i * n + j] = to[j * n + i];
  }

  void make_sums(int64_t first) {
    const auto sums = CMLM_KERNEL(info_nce_sums<C>);
    const auto merge = CMLM_KERNEL(info_nce_merge<C>);
    const int64_t count = (last(first) - first + kInfoNceBlock - 1) / kInfoNceBlock;
    M* block_reference = block_sum + blocks * n;
    parallel(count, kInfoNceBlock * n, [&](int64_t begin, int64_t end) {
      sums(nce, scores_of(first), first, first + begin * kInfoNceBlock, std::min(first + end * kInfoNceBlock, last(first)),
           block_sum + begin * n, block_reference + begin * n);
    });
    if (columns) parallel(n, count, [&](int64_t begin, int64_t end) { merge(nce, block_sum, block_reference, count, begin, end); });
  }

  // Adds the loss of row (or column) i, from its sums. `share` becomes weight / the whole sum, and the gradient's reference
  // the larger of the others' maximum and the positive. Returns minus the gradient with respect to a single positive's score.
  double finish(int64_t i, const M* sum, M* reference, M* share, double& loss) const {
    const double positive = nce.positive[i], before = nce.fixed ? nce.scale : reference[i];
    if (nce.classes != nullptr) {
      share[i] = weight[i] / sum[i];
      loss += std::log(static_cast<double>(sum[i])) + (nce.fixed ? -positive : before - positive);
      return -positive_gradient[i];
    }
    const double after = nce.fixed ? before : std::max(before, positive);
    const double others = sum[i] * std::exp(before - after), own = std::exp(positive - after);
    if (!nce.fixed) reference[i] = static_cast<M>(after);
    share[i] = static_cast<M>(weight[i] / (others + own));
    loss += others < own ? std::log1p(others / own) : std::log(others + own) + (after - positive);
    return weight[i] * (others / (others + own));
  }

  void finish_sums(int64_t begin, int64_t end, InfoNceResult& result) {
    result.loss.resize(n);
    for (int64_t i = begin; i < end; ++i) {
      double loss = 0, pushed = finish(i, nce.row_sum, nce.row_reference, row_share, loss);
      if (columns) pushed += finish(i, nce.column_sum, nce.column_reference, column_share, loss);
      result.loss[i] = columns ? loss / 2 : loss;
      positive_gradient[i] = static_cast<M>(-pushed);
    }
  }

  void make_gradient(int64_t first) {
    const int64_t rows = last(first) - first;
    C* scores = scores_of(first);
    const auto kernel = CMLM_KERNEL(info_nce_gradient<C>);
    const bool again = nce.two_sided && first / chunk >= kept;
    parallel(rows, n, [&](int64_t begin, int64_t end) { kernel(nce, scores, first, again, first + begin, first + end); });
    if (nce.self) {
      if (out1 != nullptr) left_product(scores, first, std::min(last(first), batch), first, out1);
      if (out2 != nullptr) left_product(scores, std::max(first, batch), last(first), first, out2 - batch * width);
      return;
    }
    if (out1 != nullptr) left_product(scores, first, last(first), first, out1);
    if (out2 == nullptr) return;
    const Tensor weights = transposed(scores, rows, n), of = matrix(left + first * width, rows, width);
    if constexpr (std::is_same_v<C, M>) {
      const Tensor sum = matrix(right_sum, n, width);
      first == 0 ? multiply(sum, weights, of) : multiply_add(sum, weights, of);
    } else {
      multiply(matrix(part, n, width), weights, of);
      const auto accumulate = CMLM_KERNEL(info_nce_accumulate<C>);
      parallel(n * width, 1, [&](int64_t begin, int64_t end) { accumulate(part, right_sum, first == 0, begin, end); });
    }
  }

  // Writes rows [begin, end) of the gradient with respect to z1 (self: z); `out` points to where row 0 would be.
  void left_product(const C* scores, int64_t begin, int64_t end, int64_t first, T* out) {
    if (begin >= end) return;
    multiply(matrix(part, end - begin, width), matrix(scores + (begin - first) * n, end - begin, n), matrix(right, n, width));
    project(part, left + begin * width, left_scale + begin, out + begin * width, end - begin);
  }

  template <class A>
  void project(const A* gradient, const C* rows, const M* scale, T* out, int64_t count) {
    using Projection = InfoNceProjection<A, T>;
    const Projection projection{gradient, rows, scale, width, request.normalize, out};
    const auto kernel = CMLM_KERNEL(info_nce_project<Projection>);
    parallel(count, width, [&](int64_t begin, int64_t end) { kernel(projection, begin, end); });
  }

  const InfoNceRequest& request;
  const int64_t batch, width, n;
  int64_t chunk, blocks, slots, kept;
  bool columns;  // columns have sums of their own
  InfoNce<C> nce{};
  std::vector<Tensor> memory;
  const C *left = nullptr, *right = nullptr;
  M *left_scale = nullptr, *right_scale = nullptr, *weight = nullptr;
  M *positive_gradient = nullptr, *row_share = nullptr, *column_share = nullptr;
  M *block_sum = nullptr, *right_sum = nullptr;
  C *scores = nullptr, *part = nullptr;
  T *out1 = nullptr, *out2 = nullptr;
};

}  // namespace cmlm
