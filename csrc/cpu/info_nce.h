// Shared by csrc/cpu/info_nce.cpp and its kernel.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "common/isa.h"
#include "cpu/vec.h"

namespace cmlm {

// Rows and scores are float, double or bfloat16; float16 rows are converted to float once, as their dot products may overflow.
template <class T>
using info_nce_rows_t = std::conditional_t<std::is_same_v<T, torch::headeronly::Half>, float, T>;

// Rows in a column's partial sum: a fixed number, so that results do not depend on the number of threads.
constexpr int64_t kInfoNceBlock = 32;

// N×N scores s_ij = scale · ‖l_i‖⁻¹‖r_j‖⁻¹ · l_i·r_j.
//
//   cross    l = z1, r = z2, N = B; the positive of row i is column i
//   self     l = r = [z1; z2], N = 2B, without the diagonal; the positive is the other view (nt_xent), or the positives are the
//            columns of the row's class (classes not null)
//
// A single positive is kept out of the sums, so that neither a loss near 0 nor its gradient is a difference of close numbers.
template <class C>
struct InfoNce {
  using M = math_t<C>;
  int64_t size;          // N
  bool self, two_sided;  // two_sided: a score counts in its row's loss and in its column's
  bool fixed;            // |s| <= scale and e^(-2·scale) is a normal number: scale replaces every maximum
  M scale;
  const int32_t* classes;                           // [N] or null
  M *left_scale, *right_scale;                      // [N] ‖row‖⁻¹
  M *row_sum, *row_reference;                       // [N] Σ_j exp(s_ij − reference); the reference is used only if not fixed
  M *column_sum, *column_reference;                 // [N] the same over columns; self: the row's
  M *row_share, *column_share;                      // [N] weight of the loss / the sum including the positive; self: the same
  M* positive;           // [N] score of the positive; classes: mean of the positives', minus the reference if it is fixed, as
                         // in the sums: a loss is their difference
  M* positive_gradient;  // [N] a row's (cross: and its column's) part of the gradient with respect to each positive's score;
                         // classes: in addition to the softmax's
  M* tau_term;               // [N] Σ_j g_ij·s_ij, from which the temperature's gradient is computed

  int64_t positive_of(int64_t i) const { return self ? (i < size / 2 ? i + size / 2 : i - size / 2) : i; }
};

// ‖row‖⁻¹ (1 if not normalize) of rows [begin, end) of z [·, width], and a copy of these rows in `rows`, if not null.
CMLM_DECLARE_KERNEL(template <class T> void, info_nce_rows,
                    (const T* z, int64_t width, bool normalize, int64_t begin, int64_t end,
                     math_t<T>* inverse_norm, info_nce_rows_t<T>* rows))

// Sums and positives of score rows [begin, end); products holds l·r from row `first` on. If columns have sums of their own
// (cross, two_sided), the k-th block of kInfoNceBlock rows from begin on writes its column sums to block_sum [k, N] and, if not
// fixed, their references to block_reference [k, N].
CMLM_DECLARE_KERNEL(template <class C> void, info_nce_sums,
                    (const InfoNce<C>& nce, C* products, int64_t first, int64_t begin, int64_t end, math_t<C>* block_sum,
                     math_t<C>* block_reference))

// Adds the blocks' column sums to the running sums, in order.
CMLM_DECLARE_KERNEL(template <class C> void, info_nce_merge,
                    (const InfoNce<C>& nce, const math_t<C>* block_sum, const math_t<C>* block_reference,
                     int64_t blocks, int64_t begin, int64_t end))

// Turns products l·r in place into the loss's gradient with respect to them; writes tau_term. again: not yet through info_nce_sums.
CMLM_DECLARE_KERNEL(template <class C> void, info_nce_gradient,
                    (const InfoNce<C>& nce, C* products, int64_t first, bool again, int64_t begin, int64_t end))

// sum (+)= part, for products of 16-bit chunks.
CMLM_DECLARE_KERNEL(template <class C> void, info_nce_accumulate,
                    (const C* part, math_t<C>* sum, bool first, int64_t begin, int64_t end))

// Turns the gradient with respect to the rows in a dot product into that with respect to z: out = g − row·‖row‖⁻²·(g·row).
template <class A, class T>
struct InfoNceProjection {
  using M = math_t<T>;
  const A* gradient;
  const info_nce_rows_t<T>* rows;
  const M* inverse_norm;
  int64_t width;
  bool normalize;
  T* out;  // may alias gradient
};
CMLM_DECLARE_KERNEL(template <class P> void, info_nce_project, (const P& projection, int64_t begin, int64_t end))

}  // namespace cmlm
