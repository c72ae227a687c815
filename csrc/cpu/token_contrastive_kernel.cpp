// Token-level contrast, CPU: the loops around the matrix products (token_engine.h has the algorithm).
//
// Work: a call handles one block of keys × a chunk of queries, or rows of D elements; threads take blocks or rows.
// Loop: over keys j, and inside over the chunk's queries i, 16 (AVX-512), 8 or 4 at a time: no reduction across a vector.
// Memory: each score is read once and replaced in place by its exponential (2·sizeof(T) bytes, in L2 since its product was just
//   written), which is added to two sums per query that stay in L1.
// Accumulation: float32 (float64 for float64); scores and weights are T between the products, as in eager PyTorch.
// Determinism: sums run over j in order, one accumulator per query and block; the caller adds blocks in order.
#include "cpu/token_contrastive.h"

namespace cmlm::CMLM_ISA {
namespace {

// The score of a non-candidate: its exponential is 0, and so is the product of the two.
constexpr float kNever = -1e38f;

template <bool kMax, bool kRange, bool kToken, class T>
void visit(const ScoreBlock<T>& block) {
  using O = math_t<T>;
  const int64_t columns = block.columns;
  O* __restrict sum = block.sum;
  O* __restrict moment = block.moment;
  const O* __restrict scale = block.scale;
  const O* __restrict shift = block.shift;
  const O* __restrict target = block.target;
  const int32_t* __restrict hidden = block.hidden;
  const int32_t* __restrict start = block.start;
  const int32_t* __restrict length = block.length;
  const int32_t* __restrict token = block.token;
  for (int64_t i = 0; i < columns; ++i) sum[i] = kMax ? -std::numeric_limits<O>::infinity() : O(0);
  for (int64_t i = 0; i < columns && !kMax; ++i) moment[i] = 0;
  for (int64_t j = 0; j < block.keys; ++j) {
    T* __restrict row = block.scores + j * columns;
    const int32_t key_token = block.key_token ? block.key_token[j] : 0;
    if (key_token == -1) {
      for (int64_t i = 0; i < columns && !kMax; ++i) row[i] = narrow<T>(0);
      continue;
    }
    const O key_scale = block.key_scale[j];
    const int32_t key = static_cast<int32_t>(block.first + j);
#pragma GCC ivdep
    for (int64_t i = 0; i < columns; ++i) {
      bool candidate = key != hidden[i];
      if constexpr (kRange) candidate &= static_cast<uint32_t>(key - start[i]) < static_cast<uint32_t>(length[i]);
      if constexpr (kToken) candidate &= token[i] != key_token;
      // Selected before the subtraction: a product fused with the difference is not rounded as the maximum was, and with scores
      // of 1e10 its exponential is infinite or 0.
      const O s = candidate ? widen(row[i]) * (scale[i] * key_scale) : O(kNever);
      if constexpr (kMax) {
        sum[i] = max(sum[i], s);
      } else {
        const O e = exp(s - shift[i]);
        sum[i] += e;
        moment[i] += e * (s - target[i]);
        row[i] = narrow<T>(e * key_scale);
      }
    }
  }
}

template <bool kMax, class T>
void visit_any(const ScoreBlock<T>& block) {
  if (block.start)
    block.token ? visit<kMax, true, true>(block) : visit<kMax, true, false>(block);
  else
    block.token ? visit<kMax, false, true>(block) : visit<kMax, false, false>(block);
}

}  // namespace

template <class T>
void token_max(const ScoreBlock<T>& block) {
  visit_any<true>(block);
}

template <class T>
void token_exp(const ScoreBlock<T>& block) {
  visit_any<false>(block);
}

template <class T>
void token_scores(const ScoreRow<T>& row) {
  using O = math_t<T>;
  T* __restrict scores = row.scores;
  const O* __restrict key_scale = row.key_scale;
  const T never = narrow<T>(-std::numeric_limits<O>::infinity());
  for (int64_t j = 0; j < row.first; ++j) scores[j] = never;
  for (int64_t j = row.last; j < row.m; ++j) scores[j] = never;
  for (int64_t j = row.first; j < row.last; ++j) scores[j] = narrow<T>(widen(scores[j]) * (row.scale * key_scale[j]));
  if (row.key_token == nullptr) return;
  for (int64_t j = row.first; j < row.last; ++j)
    scores[j] = (row.key_token[j] == -1) | (row.key_token[j] == row.token) ? never : scores[j];
}

template <class T>
void token_inverse_norms(const T* x, int64_t rows, int64_t d, bool normalize, math_t<T>* y) {
  using O = math_t<T>;
  for (int64_t r = 0; r < rows; ++r)
    y[r] = normalize ? O(1) / max(std::sqrt(dot(x + r * d, x + r * d, d)), O(1e-12)) : O(1);
}

template <class T>
math_t<T> token_dot(const T* a, const T* b, int64_t d) {
  return dot(a, b, d);
}

template <class T>
void token_scale(const T* __restrict x, int64_t d, math_t<T> inverse, math_t<T> factor, T* __restrict y) {
  for (int64_t c = 0; c < d; ++c) y[c] = narrow<T>(inverse * widen(x[c]) * factor);
}

template <class T>
void token_add(const T* __restrict x, int64_t n, bool fresh, math_t<T>* __restrict y) {
  if (fresh)
    for (int64_t c = 0; c < n; ++c) y[c] = widen(x[c]);
  else
    for (int64_t c = 0; c < n; ++c) y[c] += widen(x[c]);
}

template <class T>
void token_add_scaled(const T* __restrict x, int64_t d, math_t<T> factor, math_t<T>* __restrict y) {
  for (int64_t c = 0; c < d; ++c) y[c] += factor * widen(x[c]);
}

template <class T>
void token_finish_query(const QueryRow<T>& row, int64_t d, bool normalize, math_t<T>* __restrict g, T* __restrict y) {
  using O = math_t<T>;
  const T* __restrict sum = row.sum;
  const T* __restrict target = row.target;
  const T* __restrict query = row.query;
  for (int64_t c = 0; c < d; ++c) g[c] = row.sum_factor * widen(sum[c]) + row.target_factor * widen(target[c]);
  const O inverse = row.inverse_norm;
  const O along = normalize ? dot(g, query, d) * inverse * inverse : O(0);
  for (int64_t c = 0; c < d; ++c) y[c] = narrow<T>(inverse * (g[c] - along * widen(query[c])));
}

template <class T>
void token_finish_key(const math_t<T>* g, const T* __restrict key, int64_t d, bool normalize, math_t<T> inverse_norm, T* y) {
  using O = math_t<T>;
  const O along = normalize ? dot(g, key, d) * inverse_norm * inverse_norm : O(0);
#pragma GCC ivdep
  for (int64_t c = 0; c < d; ++c) y[c] = narrow<T>(g[c] - along * widen(key[c]));
}

#define CMLM_INSTANTIATE(T)                                                               \
  template void token_max<T>(const ScoreBlock<T>&);                                       \
  template void token_exp<T>(const ScoreBlock<T>&);                                       \
  template void token_scores<T>(const ScoreRow<T>&);                                      \
  template void token_inverse_norms<T>(const T*, int64_t, int64_t, bool, math_t<T>*);           \
  template math_t<T> token_dot<T>(const T*, const T*, int64_t);                            \
  template void token_scale<T>(const T*, int64_t, math_t<T>, math_t<T>, T*);                \
  template void token_add<T>(const T*, int64_t, bool, math_t<T>*);                             \
  template void token_add_scaled<T>(const T*, int64_t, math_t<T>, math_t<T>*);           \
  template void token_finish_query<T>(const QueryRow<T>&, int64_t, bool, math_t<T>*, T*);       \
  template void token_finish_key<T>(const math_t<T>*, const T*, int64_t, bool, math_t<T>, T*);

CMLM_INSTANTIATE(float)
CMLM_INSTANTIATE(double)
CMLM_INSTANTIATE(BFloat16)

}  // namespace cmlm::CMLM_ISA
