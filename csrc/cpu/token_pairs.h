// The inputs of token_contrastive and token_similarity: checked, contiguous and with 32-bit tokens. Host code only.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"

namespace cmlm {

struct TokenPairs {
  Tensor query, key;                    // [N, D], [M, D]
  std::optional<Tensor> target;         // int64 [N]
  std::optional<Tensor> start, end;     // int32 [N]
  std::vector<int32_t> query_token, key_token;  // empty when not given
  double temperature;
  int64_t n, m, d;

  const int64_t* targets() const { return target ? target->const_data_ptr<int64_t>() : nullptr; }
  // Candidates of row i by range alone: [first(i), last(i)).
  int64_t first(int64_t i) const { return start ? std::clamp<int64_t>(start->const_data_ptr<int32_t>()[i], 0, m) : 0; }
  int64_t last(int64_t i) const { return end ? std::clamp<int64_t>(end->const_data_ptr<int32_t>()[i], first(i), m) : m; }
};

// Tokens are only compared for equality, in 32 bits: unchanged if all fit, else replaced by their rank among all; -1 stays -1.
template <class Id>
void narrow_tokens(const Id* query, int64_t n, const Id* key, int64_t m, TokenPairs& pairs) {
  const auto fits = [](Id id) { return id == static_cast<int32_t>(id); };
  pairs.query_token.resize(n);
  pairs.key_token.resize(m);
  if (std::all_of(query, query + n, fits) && std::all_of(key, key + m, fits)) {
    std::copy_n(query, n, pairs.query_token.begin());
    std::copy_n(key, m, pairs.key_token.begin());
    return;
  }
  std::vector<Id> ids(query, query + n);
  ids.insert(ids.end(), key, key + m);
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  const auto rank = [&](Id id) {
    return id == -1 ? -1 : static_cast<int32_t>(std::lower_bound(ids.begin(), ids.end(), id) - ids.begin());
  };
  std::transform(query, query + n, pairs.query_token.begin(), rank);
  std::transform(key, key + m, pairs.key_token.begin(), rank);
}

inline void take_tokens(const char* op, const std::optional<Tensor>& query, const std::optional<Tensor>& key, TokenPairs& pairs) {
  CMLM_CHECK(op, key || !query, "key_token", "given when query_token is", "None");
  if (!key) return;
  check_tensor(op, "key_token", *key, key->scalar_type(), {pairs.m});
  if (query) check_tensor(op, "query_token", *query, key->scalar_type(), {pairs.n});
  dispatch_ids(op, "key_token", *key, [&](auto tag) {
    using Id = typename decltype(tag)::type;
    narrow_tokens(query ? query->const_data_ptr<Id>() : nullptr, query ? pairs.n : 0, key->const_data_ptr<Id>(), pairs.m, pairs);
  });
}

inline TokenPairs token_pairs(const char* op, const Tensor& query, const Tensor& key, const std::optional<Tensor>& target,
                              const Tensor& temperature, const std::optional<Tensor>& key_start,
                              const std::optional<Tensor>& key_end, const std::optional<Tensor>& query_token,
                              const std::optional<Tensor>& key_token) {
  TokenPairs pairs;
  pairs.query = torch::stable::contiguous(query);
  pairs.key = torch::stable::contiguous(key);
  check_tensor(op, "query", pairs.query, query.scalar_type(), {-1, -1});
  pairs.n = query.size(0), pairs.m = key.size(0), pairs.d = query.size(1);
  check_tensor(op, "key", pairs.key, query.scalar_type(), {-1, pairs.d});
  CMLM_CHECK(op, pairs.m < std::numeric_limits<int32_t>::max(), "key", "of fewer than 2^31 rows", pairs.m);
  const auto take = [&](const char* name, const std::optional<Tensor>& given, ScalarType dtype, std::optional<Tensor>& place) {
    if (!given) return;
    place = torch::stable::contiguous(*given);
    check_tensor(op, name, *place, dtype, {pairs.n});
  };
  take("target", target, ScalarType::Long, pairs.target);
  take("key_start", key_start, ScalarType::Int, pairs.start);
  take("key_end", key_end, ScalarType::Int, pairs.end);
  const auto dense = [](const std::optional<Tensor>& t) { return t ? std::optional(torch::stable::contiguous(*t)) : t; };
  take_tokens(op, dense(query_token), dense(key_token), pairs);

  for (int64_t i = 0; pairs.target && i < pairs.n; ++i) {
    const int64_t t = pairs.targets()[i];
    CMLM_CHECK(op, t == -100 || (0 <= t && t < pairs.m), "target", "in [0, M = " + std::to_string(pairs.m) + ") or -100", t);
  }
  const bool wide = query.scalar_type() == ScalarType::Double;
  check_tensor(op, "temperature", temperature, wide ? ScalarType::Double : ScalarType::Float, {});
  pairs.temperature = wide ? *temperature.const_data_ptr<double>() : *temperature.const_data_ptr<float>();
  CMLM_CHECK(op, pairs.temperature > 0.0 && std::isfinite(pairs.temperature), "temperature", "finite and > 0", pairs.temperature);
  return pairs;
}

}  // namespace cmlm
