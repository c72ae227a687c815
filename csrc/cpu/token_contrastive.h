// Shared by csrc/cpu/token_contrastive.cpp, token_similarity.cpp and their kernels. T is the dtype of the products: float,
// BFloat16 or double.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "cpu/vec.h"

namespace cmlm {

// A block of the transposed score matrix: keys × columns, one column per query of the chunk. Columns are padded to a multiple
// of kLanes with queries of scale 0, so that loops over them need no tail.
template <class T>
struct ScoreBlock {
  using O = math_t<T>;
  T* scores;                // [keys, columns]; raw products, then weights
  int64_t keys, columns;
  int64_t first;            // index of the first key
  const O* key_scale;       // [keys] 1 / ‖k_j‖
  const int32_t* key_token; // [keys] or null
  const O* scale;           // [columns] s_ij = raw · scale_i · key_scale_j
  const O* shift;           // [columns] exponents are s_ij − shift_i
  const O* target;          // [columns] s_i,target
  const int32_t* hidden;    // [columns] index of the target, which is no candidate here
  const int32_t* start;     // [columns] or null: candidates are start_i <= j < start_i + length_i
  const int32_t* length;
  const int32_t* token;     // [columns] or null
  O* sum;                   // [columns] of this block: Σ_j e_ij (token_max: the largest s_ij)
  O* moment;                // [columns] Σ_j e_ij (s_ij − s_i,target)
};

// One row of the score matrix itself.
template <class T>
struct ScoreRow {
  using O = math_t<T>;
  T* scores;                // [M]; raw products, then s_j = raw · scale · key_scale_j, -inf where j is no candidate
  O scale;
  const O* key_scale;       // [M] 1 / ‖k_j‖
  int64_t m, first, last;   // candidates by range: first <= j < last
  const int32_t* key_token; // [M] or null
  int32_t token;            // the key_token, besides -1, that is no candidate
};

// One row of the query's gradient.
template <class T>
struct QueryRow {
  using O = math_t<T>;
  const T* sum;        // [D] Σ_{j≠t} e_ij k_j / ‖k_j‖
  const T* query;      // [D]
  const T* target;     // [D] key of the target
  O sum_factor, target_factor, inverse_norm;
};

// y[r] = 1 / max(‖x_r‖, 1e-12) for `rows` rows of length d; all 1 unless normalize.
CMLM_DECLARE_KERNEL(template <class T> void, token_inverse_norms, (const T* x, int64_t rows, int64_t d, bool normalize, math_t<T>* y))
CMLM_DECLARE_KERNEL(template <class T> math_t<T>, token_dot, (const T* a, const T* b, int64_t d))
// y = inverse · x · factor, in this order: for a short row and a small sum, inverse · factor may overflow
CMLM_DECLARE_KERNEL(template <class T> void, token_scale, (const T* x, int64_t d, math_t<T> inverse, math_t<T> factor, T* y))
// sum[i] = the largest score among the candidates of column i except the target; at most -1e38 if there is none.
CMLM_DECLARE_KERNEL(template <class T> void, token_max, (const ScoreBlock<T>& block))
// e_ij = exp(s_ij − shift_i), 0 where j is no candidate; scores = e_ij · key_scale_j, and the sums.
CMLM_DECLARE_KERNEL(template <class T> void, token_exp, (const ScoreBlock<T>& block))
// Turns raw products into scores, in place.
CMLM_DECLARE_KERNEL(template <class T> void, token_scores, (const ScoreRow<T>& row))
// y += x, or y = x if fresh
CMLM_DECLARE_KERNEL(template <class T> void, token_add, (const T* x, int64_t n, bool fresh, math_t<T>* y))
// y += factor · x
CMLM_DECLARE_KERNEL(template <class T> void, token_add_scaled, (const T* x, int64_t d, math_t<T> factor, math_t<T>* y))
// g = sum_factor · sum + target_factor · target, then through the normalisation: (g − q̂ (q̂·g)) / ‖q‖; scratch [d].
CMLM_DECLARE_KERNEL(template <class T> void, token_finish_query, (const QueryRow<T>& row, int64_t d, bool normalize, math_t<T>* scratch, T* y))
// g [d] = gradient of the unit key / ‖k‖; y = g − k̂ (k̂·g). y may be g.
CMLM_DECLARE_KERNEL(template <class T> void, token_finish_key, (const math_t<T>* g, const T* key, int64_t d, bool normalize, math_t<T> inverse_norm, T* y))

}  // namespace cmlm
