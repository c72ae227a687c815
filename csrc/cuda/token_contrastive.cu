// token_contrastive and token_similarity, CUDA: checks, outputs, choice of kernels. contrast_host.h has the order of launches.
//
// Ranges are on the device, so the host cannot see how long they are. If they are given, tiles outside them are skipped and
// scores are computed once per output; if not, and the matrix is large, chunks of rows go through cuBLAS.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/contrast_host.h"
#include "cuda/token_contrastive.cuh"
#include "cuda/token_similarity.cuh"

namespace cmlm {
namespace {

constexpr int64_t kTiledScores = 128 * 128;  // fewer are not worth the launches of the path by rows

struct TokenInputs {
  Tensor query, key, temperature;
  std::optional<Tensor> target, start, end, query_token, key_token;
};

TokenInputs take_inputs(const char* op, const Tensor& query, const Tensor& key, const std::optional<Tensor>& target,
                        const Tensor& temperature, const std::optional<Tensor>& key_start, const std::optional<Tensor>& key_end,
                        const std::optional<Tensor>& query_token, const std::optional<Tensor>& key_token) {
  const ScalarType dtype = query.scalar_type();
  TokenInputs in{};
  in.query = take(op, "query", query, dtype, {-1, -1}, query);
  const int64_t n = query.size(0), d = query.size(1);
  CMLM_CHECK(op, d >= 1, "query", "of D >= 1", describe(query));
  in.key = take(op, "key", key, dtype, {-1, d}, query);
  const int64_t m = key.size(0);
  CMLM_CHECK(op, std::max(n, m) < std::numeric_limits<int32_t>::max(), "query and key", "of fewer than 2^31 rows", std::max(n, m));
  in.target = take(op, "target", target, ScalarType::Long, {n}, query);
  in.start = take(op, "key_start", key_start, ScalarType::Int, {n}, query);
  in.end = take(op, "key_end", key_end, ScalarType::Int, {n}, query);
  CMLM_CHECK(op, key_token || !query_token, "key_token", "given when query_token is", "None");
  if (key_token) {
    const ScalarType kind = key_token->scalar_type();
    CMLM_CHECK(op, kind == ScalarType::Long || kind == ScalarType::Int, "key_token", "int64 or int32", describe(*key_token));
    in.query_token = take(op, "query_token", query_token, kind, {n}, query);
    in.key_token = take(op, "key_token", key_token, kind, {m}, query);
  }
  in.temperature = take(op, "temperature", temperature, loss_type(query), {}, query);
  return in;
}

template <class T>
TokenContrast<T> problem_of(const TokenInputs& in, bool normalize) {
  using M = math_t<T>;
  TokenContrast<T> p{};
  set_sides(p, in.query, in.key, false);
  p.normalize = normalize;
  p.temperature = pointer<const M>(in.temperature);
  p.target = pointer<int64_t>(in.target);
  p.start = pointer<int32_t>(in.start);
  p.end = pointer<int32_t>(in.end);
  p.query_token = pointer<void>(in.query_token);
  p.key_token = pointer<void>(in.key_token);
  p.wide = in.key_token && in.key_token->scalar_type() == ScalarType::Long;
  return p;
}

ContrastResult contrast(const char* op, const TokenInputs& in, bool normalize, Reduce reduce,
                        const std::optional<Tensor>& row_weight, bool query_grad, bool key_grad) {
  const int64_t n = in.query.size(0), m = in.key.size(0);
  const bool gradient = reduce != Reduce::none, rows = reduce == Reduce::none;
  return dispatch_numbers(op, "query", in.query, [&](auto number) {
    using T = decltype(number);
    using M = math_t<T>;
    const Launcher launcher(in.query);
    TokenContrast<T> p = problem_of<T>(in, normalize);
    ContrastResult result{};
    set_gradients(p, result, in.query, in.key, query_grad && gradient, key_grad && gradient);
    result.loss = rows ? empty(in.temperature, {n}, in.temperature.scalar_type()) : torch::stable::empty_like(in.temperature);
    result.grad_temperature = torch::stable::empty_like(in.temperature);
    if (n == 0 || m == 0) {
      set_zero(result);
      return result;
    }
    p.reduce = reduce;
    p.row_weight = pointer<M>(row_weight);
    p.loss = pointer<M>(result.loss);
    p.grad_temperature = pointer<M>(result.grad_temperature);
    ContrastRun<TokenContrast<T>> run(launcher, in.query, p);
    const bool ranged = in.start || in.end;
    if (ranged || goes_by_tiles(n * m <= kTiledScores)) {
      const Tensor reaches = empty(in.query, {ceil_div(n, kTile) * static_cast<int64_t>(sizeof(Reach))}, ScalarType::Byte);
      p.reaches = pointer<Reach>(reaches);
      run.by_tiles(gradient, !ranged);
    } else {
      run.by_rows(gradient);
    }
    return result;
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_contrastive(Tensor query, Tensor key, Tensor target, Tensor temperature,
                                                             std::optional<Tensor> key_start, std::optional<Tensor> key_end,
                                                             std::optional<Tensor> query_token, std::optional<Tensor> key_token,
                                                             bool normalize, std::string reduction, bool query_grad,
                                                             bool key_grad) {
  constexpr const char* op = "token_contrastive";
  const Reduce reduce = reduce_of(op, reduction);
  const TokenInputs in = take_inputs(op, query, key, target, temperature, key_start, key_end, query_token, key_token);
  const ContrastResult result = contrast(op, in, normalize, reduce, std::nullopt, query_grad, key_grad);
  return {result.loss, result.grad1, result.grad2, result.grad_temperature};
}

std::tuple<Tensor, Tensor, Tensor> token_contrastive_backward(Tensor grad_loss, Tensor query, Tensor key, Tensor target,
                                                              Tensor temperature, std::optional<Tensor> key_start,
                                                              std::optional<Tensor> key_end, std::optional<Tensor> query_token,
                                                              std::optional<Tensor> key_token, bool normalize, bool query_grad,
                                                              bool key_grad) {
  constexpr const char* op = "token_contrastive";
  const TokenInputs in = take_inputs(op, query, key, target, temperature, key_start, key_end, query_token, key_token);
  const Tensor weight = take(op, "grad_loss", grad_loss, temperature.scalar_type(), {query.size(0)}, query);
  const ContrastResult result = contrast(op, in, normalize, Reduce::weighted, weight, query_grad, key_grad);
  return {result.grad1, result.grad2, result.grad_temperature};
}

Tensor token_similarity(Tensor query, Tensor key, std::optional<Tensor> target, Tensor temperature, std::optional<Tensor> key_start,
                        std::optional<Tensor> key_end, std::optional<Tensor> query_token, std::optional<Tensor> key_token,
                        bool normalize) {
  constexpr const char* op = "token_similarity";
  const TokenInputs in = take_inputs(op, query, key, target, temperature, key_start, key_end, query_token, key_token);
  const int64_t n = query.size(0), m = key.size(0);
  return dispatch_numbers(op, "query", in.query, [&](auto number) {
    using T = decltype(number);
    using M = math_t<T>;
    const Launcher launcher(in.query);
    const Tensor out = empty(in.query, {n, m}, query.scalar_type());
    if (n == 0 || m == 0) return out;
    SimilarityTask<T> task{};
    task.p = problem_of<T>(in, normalize);
    task.p.keep_ignored = true;
    std::vector<Tensor> memory;
    const auto numbers = [&](int64_t count) {
      memory.push_back(empty(in.temperature, {count}, in.temperature.scalar_type()));
      return pointer<M>(memory.back());
    };
    const Matrix<T>&x = task.p.side[0], &y = task.p.side[1];
    for (int s = 0; s < 2; ++s) task.p.stats[s].scale = numbers(task.p.side[s].rows);
    const unsigned blocks = static_cast<unsigned>(ceil_div(n + m, kSimilarityThreads / 32));
    launcher(similarity_norms<T>, dim3(blocks), kSimilarityThreads, 0, task);
    // Products of float16 rows may overflow float16, so they are computed in float, a chunk at a time.
    const int64_t chunk = std::is_same_v<T, Fp16> ? std::clamp<int64_t>(kChunkBytes / (4 * m), 1, n) : n;
    M* products = std::is_same_v<T, Fp16> ? numbers(chunk * m) : nullptr;
    for (int64_t first = 0; first < n; first += chunk) {
      task.first = first, task.rows = std::min(chunk, n - first);
      task.out = pointer<T>(out) + first * m;
      const Rows<const T> rows{x.first + first * x.width, task.rows, x.width, x.width}, columns{y.first, m, y.width, y.width};
      if constexpr (std::is_same_v<T, Fp16>) {
        task.products = products;
        multiply_transposed(launcher, rows, columns, Rows<M>{products, task.rows, m, m});
      } else {
        task.products = task.out;
        multiply_transposed(launcher, rows, columns, Rows<T>{task.out, task.rows, m, m});
      }
      const int64_t across = std::min<int64_t>(ceil_div(m, 4 * kSimilarityThreads), 65535);
      const dim3 grid(static_cast<unsigned>(task.rows), static_cast<unsigned>(across));
      launcher(similarity_scores<T>, grid, kSimilarityThreads, 0, task);
    }
    return out;
  });
}

}  // namespace
}  // namespace cmlm

STABLE_TORCH_LIBRARY_IMPL(cmlm_fast, CUDA, m) {
  m.impl("token_contrastive", TORCH_BOX(&cmlm::token_contrastive));
  m.impl("token_contrastive_backward", TORCH_BOX(&cmlm::token_contrastive_backward));
  m.impl("token_similarity", TORCH_BOX(&cmlm::token_similarity));
}
