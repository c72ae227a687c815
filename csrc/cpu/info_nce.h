// What csrc/cpu/info_nce.cpp and its kernel share.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "common/isa.h"
#include "cpu/vec.h"

namespace cmlm {

// Rows and scores are float, double or bfloat16; float16 rows become float once, since their dot products may overflow.
template <class T>
using info_nce_rows_t = std::conditional_t<std::is_same_v<T, torch::headeronly::Half>, float, T>;

// Rows of a column's partial sums: a fixed number, so that results do not depend on how many threads there are.
constexpr int64_t kInfoNceBlock = 32;

// N×N scores s_ij = scale · ‖l_i‖⁻¹‖r_j‖⁻¹ · l_i·r_j.
//
//   cross    l = z1, r = z2, N = B; the positive of row i is column i
//   self     l = r = [z1; z2], N = 2B, the diagonal left out; the positive is the other view (nt_xent), or the positives are the
//            columns of the row's class (classes not null)
//
// A lone positive stays out of the sums: with it apart, neither a loss near 0 nor its gradient is a difference of numbers near
// each other.
template <class C>
struct InfoNce {
  using M = math_t<C>;
  int64_t size;          // N
  bool self, two_sided;  // two_sided: a score counts in its row's loss and in its column's
  bool fixed;            // |s| <= scale and e^(-2·scale) is a normal number: scale stands in for every maximum
  M scale;
  const int32_t* classes;                           // [N] or null
  M *left_scale, *right_scale;                      // [N] ‖row‖⁻¹
  M *row_sum, *row_reference;                       // [N] Σ_j exp(s_ij − reference); the reference only if not fixed
  M *column_sum, *column_reference;                 // [N] the same down the columns; self: the row's
  M *row_share, *column_share;                      // [N] weight of the loss / the sum with the positive; self: the same
  M* positive;           // [N] score of the positive; classes: mean of the positives', less the reference where it is fixed, as
                         // sums have them: a loss is their difference
  M* positive_gradient;  // [N] what a row (cross: and its column) adds to the gradient by the score of each positive; classes:
                         // besides the softmax
  M* pull;               // [N] Σ_j g_ij·s_ij, of which the temperature's gradient is made

  int64_t positive_of(int64_t i) const { return self ? (i < size / 2 ? i + size / 2 : i - size / 2) : i; }
};

// ‖row‖⁻¹ (1 if not normalize) of rows [begin, end) of z [·, width]; and a copy of them at rows, if not null.
CMLM_DECLARE_KERNEL(template <class T> void, info_nce_rows,
                    (const T* z, int64_t width, bool normalize, int64_t begin, int64_t end,
                     math_t<T>* inverse_norm, info_nce_rows_t<T>* rows))

// Sums and positives of score rows [begin, end); products holds l·r from row `first` on. With columns of their own (cross,
// two_sided), the k-th kInfoNceBlock rows from begin on write their columns' sums to block_sum [k, N], and if not fixed the
// references to block_reference [k, N].
CMLM_DECLARE_KERNEL(template <class C> void, info_nce_sums,
                    (const InfoNce<C>& nce, C* products, int64_t first, int64_t begin, int64_t end, math_t<C>* block_sum,
                     math_t<C>* block_reference))

// Adds blocks' column sums to the running ones, in order.
CMLM_DECLARE_KERNEL(template <class C> void, info_nce_merge,
                    (const InfoNce<C>& nce, const math_t<C>* block_sum, const math_t<C>* block_reference,
                     int64_t blocks, int64_t begin, int64_t end))

// Turns products l·r into the loss's gradient by them, in place; writes pull. again: they did not pass through info_nce_sums.
CMLM_DECLARE_KERNEL(template <class C> void, info_nce_gradient,
                    (const InfoNce<C>& nce, C* products, int64_t first, bool again, int64_t begin, int64_t end))

// sum (+)= part, for products of 16-bit chunks.
CMLM_DECLARE_KERNEL(template <class C> void, info_nce_accumulate,
                    (const C* part, math_t<C>* sum, bool first, int64_t begin, int64_t end))

// From the gradient by rows that stand in a dot product to the gradient by z: out = g − row·‖row‖⁻²·(g·row).
template <class A, class T>
struct InfoNceProjection {
  using M = math_t<T>;
  const A* gradient;
  const info_nce_rows_t<T>* rows;
  const M* inverse_norm;
  int64_t width;
  bool normalize;
  T* out;  // may be gradient
};
CMLM_DECLARE_KERNEL(template <class P> void, info_nce_project, (const P& projection, int64_t begin, int64_t end))

}  // namespace cmlm
