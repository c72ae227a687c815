// Token-level scores, CPU: one product, then token_scores (token_contrastive_kernel.cpp) scales and masks each row in place.
//
// Memory: the product is written into the output, N·M elements, which are read and written once more; plus 4 bytes per key.
// Accumulation: float32 (float64 for float64). Determinism: that of torch's product.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/gemm.h"
#include "cpu/token_contrastive.h"
#include "cpu/token_pairs.h"

namespace cmlm {
namespace {

using torch::stable::parallel_for;
constexpr const char* kOp = "token_similarity";

template <class T>
Tensor compute(const TokenPairs& pairs, bool normalize) {
  using O = math_t<T>;
  const int64_t n = pairs.n, m = pairs.m, d = pairs.d;
  Tensor scores = empty<T>({n, m});
  if (n == 0 || m == 0) return scores;
  const T *query = data<T>(pairs.query), *key = data<T>(pairs.key);
  multiply(scores, matrix(query, n, d), transposed(key, m, d));

  const auto inverse_norms = CMLM_KERNEL(token_inverse_norms<T>);
  const auto finish = CMLM_KERNEL(token_scores<T>);
  std::vector<O> key_scale(m);
  parallel_for(0, m, 64, [&](int64_t begin, int64_t end) {
    inverse_norms(key + begin * d, end - begin, d, normalize, key_scale.data() + begin);
  });
  parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* row = data<T>(scores) + i * m;
      O scale;
      inverse_norms(query + i * d, 1, d, normalize, &scale);
      scale /= static_cast<O>(pairs.temperature);
      // Without query tokens, only keys marked -1 are excluded: passing -1 excludes no others.
      const int32_t token = pairs.query_token.empty() ? -1 : pairs.query_token[i];
      const int64_t target = pairs.target ? pairs.targets()[i] : -1;
      const O own = target < 0 ? O(0) : baseline::widen(row[target]) * (scale * key_scale[target]);
      finish({row, scale, key_scale.data(), m, pairs.first(i), pairs.last(i),
              pairs.key_token.empty() ? nullptr : pairs.key_token.data(), token});
      if (target >= 0) row[target] = baseline::narrow<T>(own);  // always a candidate, despite the other rules
    }
  });
  return scores;
}

Tensor token_similarity(Tensor query, Tensor key, std::optional<Tensor> target, Tensor temperature, std::optional<Tensor> key_start,
                        std::optional<Tensor> key_end, std::optional<Tensor> query_token, std::optional<Tensor> key_token,
                        bool normalize) {
  isa();  // a wrong CMLM_FAST_ISA is reported here, not from a worker thread
  TokenPairs pairs = token_pairs(kOp, query, key, target, temperature, key_start, key_end, query_token, key_token);
  return dispatch_floating(kOp, "query", pairs.query, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<T, torch::headeronly::Half>) {  // raw products of float16 may exceed 65504
      pairs.query = torch::stable::to(pairs.query, ScalarType::Float);
      pairs.key = torch::stable::to(pairs.key, ScalarType::Float);
      return torch::stable::to(compute<float>(pairs, normalize), ScalarType::Half);
    } else {
      return compute<T>(pairs, normalize);
    }
  });
}

}  // namespace
}  // namespace cmlm

STABLE_TORCH_LIBRARY_IMPL(cmlm_fast, CPU, m) {
  m.impl("token_similarity", TORCH_BOX(&cmlm::token_similarity));
}
