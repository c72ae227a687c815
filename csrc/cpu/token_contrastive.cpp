// Token-level contrast, CPU: the ops. The algorithm is in token_engine.h.
#include <torch/csrc/stable/library.h>

#include <numeric>
#include <optional>
#include <string>
#include <tuple>

#include "common/tensors.h"
#include "cpu/token_engine.h"

namespace cmlm {
namespace {

constexpr const char* kOp = "token_contrastive";

struct Result {
  Tensor loss, grad_query, grad_key, grad_temperature;
};

// weight: [N] in the loss dtype, or nothing to compute only losses.
template <class T>
Result compute(const TokenPairs& pairs, bool normalize, const std::optional<Tensor>& weight, bool query_grad, bool key_grad) {
  using O = math_t<T>;
  Tensor loss = empty<O>({pairs.n}), grad_temperature = empty<O>({});
  std::fill_n(data<O>(loss), pairs.n, O(0));
  TokenEngine<T> engine(pairs, normalize, weight ? data<O>(*weight) : nullptr, query_grad, key_grad, data<O>(loss));
  auto gradients = engine.run();
  *data<O>(grad_temperature) = static_cast<O>(gradients.temperature);
  return {loss, gradients.query, gradients.key, grad_temperature};
}

// float16 runs as float32: torch's CPU product of float16 is no faster, and q·k of unnormalised vectors may exceed 65504.
Result run(TokenPairs pairs, bool normalize, const std::optional<Tensor>& weight, bool query_grad, bool key_grad) {
  isa();  // a wrong CMLM_FAST_ISA is reported here, not from a worker thread
  return dispatch_floating(kOp, "query", pairs.query, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<T, torch::headeronly::Half>) {
      pairs.query = torch::stable::to(pairs.query, ScalarType::Float);
      pairs.key = torch::stable::to(pairs.key, ScalarType::Float);
      Result result = compute<float>(pairs, normalize, weight, query_grad, key_grad);
      result.grad_query = torch::stable::to(result.grad_query, ScalarType::Half);
      result.grad_key = torch::stable::to(result.grad_key, ScalarType::Half);
      return result;
    } else {
      return compute<T>(pairs, normalize, weight, query_grad, key_grad);
    }
  });
}

// Weight of each row in the reduced loss, Σ weight·loss.
template <class O>
void row_weights(const TokenPairs& pairs, bool mean, O* weight) {
  int64_t count = 0;
  for (int64_t i = 0; i < pairs.n; ++i) count += pairs.targets()[i] >= 0;
  for (int64_t i = 0; i < pairs.n; ++i) weight[i] = pairs.targets()[i] < 0 ? O(0) : mean ? O(1) / static_cast<O>(count) : O(1);
}

template <class O>
void weighted_sum(const Tensor& weight, const Tensor& loss, Tensor& total) {
  *data<O>(total) = static_cast<O>(std::inner_product(data<O>(loss), data<O>(loss) + loss.numel(), data<O>(weight), 0.0));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_contrastive(Tensor query, Tensor key, Tensor target, Tensor temperature,
                                                             std::optional<Tensor> key_start, std::optional<Tensor> key_end,
                                                             std::optional<Tensor> query_token, std::optional<Tensor> key_token,
                                                             bool normalize, std::string reduction, bool query_grad,
                                                             bool key_grad) {
  check_reduction(kOp, reduction);
  const TokenPairs pairs = token_pairs(kOp, query, key, target, temperature, key_start, key_end, query_token, key_token);
  if (reduction == "none") {
    Result result = run(pairs, normalize, std::nullopt, false, false);
    return {result.loss, result.grad_query, result.grad_key, result.grad_temperature};
  }
  const bool wide = temperature.scalar_type() == ScalarType::Double;
  Tensor weight = torch::stable::empty({pairs.n}, temperature.scalar_type());
  Tensor total = torch::stable::empty({}, temperature.scalar_type());
  wide ? row_weights(pairs, reduction == "mean", data<double>(weight)) : row_weights(pairs, reduction == "mean", data<float>(weight));
  Result result = run(pairs, normalize, weight, query_grad, key_grad);
  wide ? weighted_sum<double>(weight, result.loss, total) : weighted_sum<float>(weight, result.loss, total);
  return {total, result.grad_query, result.grad_key, result.grad_temperature};
}

std::tuple<Tensor, Tensor, Tensor> token_contrastive_backward(Tensor grad_loss, Tensor query, Tensor key, Tensor target,
                                                              Tensor temperature, std::optional<Tensor> key_start,
                                                              std::optional<Tensor> key_end, std::optional<Tensor> query_token,
                                                              std::optional<Tensor> key_token, bool normalize, bool query_grad,
                                                              bool key_grad) {
  const TokenPairs pairs = token_pairs(kOp, query, key, target, temperature, key_start, key_end, query_token, key_token);
  const Tensor weight = torch::stable::contiguous(grad_loss);
  check_tensor(kOp, "grad_loss", weight, temperature.scalar_type(), {pairs.n});
  Result result = run(pairs, normalize, weight, query_grad, key_grad);
  return {result.grad_query, result.grad_key, result.grad_temperature};
}

}  // namespace
}  // namespace cmlm

STABLE_TORCH_LIBRARY_IMPL(cmlm_fast, CPU, m) {
  m.impl("token_contrastive", TORCH_BOX(&cmlm::token_contrastive));
  m.impl("token_contrastive_backward", TORCH_BOX(&cmlm::token_contrastive_backward));
}
