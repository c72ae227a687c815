// info_nce, CPU. Definition: cmlm_fast/ops/info_nce.py. These kernels process the scores between torch's matrix products.
//
// Work:   a chunk of score rows -> one row at a time -> a vector of columns.
//         sums: one exponential per score serves the row's and the column's sum (if |s| <= scale bounds all scores; otherwise
//         each uses its own maximum and exponential). gradient: one more, in place.
// Memory: a chunk stays in cache: each pass reads it once (gradient: and writes it once), plus 4 to 16 bytes a column and row.
// Norms:  rows are multiplied unnormalised. With k_ij = ‖l_i‖⁻¹‖r_j‖⁻¹·scale, s = k·(l·r), and replacing l·r by g·k makes the
//         next product the gradient with respect to the row, except for the component along it, which info_nce_project removes.
// Types:  scores in the rows' dtype (bfloat16, float, double); all arithmetic and sums in float, double for double.
// Determinism: sums run over kLanes accumulators folded in a fixed order, columns over blocks of kInfoNceBlock rows merged in
//         order; nothing depends on the number of threads.
#include "cpu/info_nce.h"

namespace cmlm::CMLM_ISA {
namespace {

// Calls body(lane, j) for all j < n, a vector at a time. body must not depend on what it wrote at another j.
template <class Body>
CMLM_INLINE void sweep(int64_t n, Body body) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
#pragma GCC ivdep
    for (int64_t lane = 0; lane < kLanes; ++lane) body(lane, j + lane);
  }
  for (int64_t lane = 0; j + lane < n; ++lane) body(lane, j + lane);
}

template <class M>
CMLM_INLINE M fold(const M* lanes) {
  M sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

template <class M>
constexpr M kLowest = std::numeric_limits<M>::lowest();

// k_ij, bit-identical to k_ji: if rows and columns are the same vectors, row j's sums serve column j.
template <class M>
CMLM_INLINE M factor(M left, M right, M scale) {
  return (left * right) * scale;
}

// The score of a product, at least kLowest so that hidden scores do not make 0 · inf. The comparison also keeps the compiler
// from fusing the multiplication with the next operation in one pass but not in another: the weights must add up to the sums.
template <class C, class M>
CMLM_INLINE M score(C product, M k) {
  const M s = widen(product) * k;
  return kLowest<M> > s ? kLowest<M> : s;
}

// One row's sum, and its contribution to the columns' sums if they share its exponentials.
template <bool Columns, class C, class M>
CMLM_INLINE M row_sum(const InfoNce<C>& nce, const C* products, M left, M reference, M* columns) {
  const M *right = nce.right_scale, scale = nce.scale;
  M lanes[kLanes] = {};
  sweep(nce.size, [&](int64_t lane, int64_t j) {
    const M e = exp(score(products[j], factor(left, right[j], scale)) - reference);
    lanes[lane] += e;
    if constexpr (Columns) columns[j] += e;
  });
  return fold(lanes);
}

// Column sums of a block of rows, with maxima of their own.
template <class C, class M>
void column_sums(const InfoNce<C>& nce, const C* products, int64_t rows, const M* left_scale, M* sum, M* reference) {
  const M *right = nce.right_scale, scale = nce.scale;
  for (int64_t i = 0; i < rows; ++i) {
    const C* row = products + i * nce.size;
    const M left = left_scale[i];
    sweep(nce.size, [&](int64_t, int64_t j) { reference[j] = max(reference[j], score(row[j], factor(left, right[j], scale))); });
  }
  for (int64_t i = 0; i < rows; ++i) {
    const C* row = products + i * nce.size;
    const M left = left_scale[i];
    sweep(nce.size, [&](int64_t, int64_t j) { sum[j] += exp(score(row[j], factor(left, right[j], scale)) - reference[j]); });
  }
}

// Hides the diagonal of self and a single positive: -inf does not affect maxima and sums. Returns the value of nce.positive.
template <class C>
typename InfoNce<C>::M hide(const InfoNce<C>& nce, C* row, int64_t i) {
  using M = typename InfoNce<C>::M;
  const M left = nce.left_scale[i];
  const C nothing = narrow<C>(-std::numeric_limits<M>::infinity());
  if (nce.classes == nullptr) {
    const int64_t positive = nce.positive_of(i);
    const M s = score(row[positive], factor(left, nce.right_scale[positive], nce.scale));
    if (nce.self) row[i] = nothing;
    row[positive] = nothing;
    return s;
  }
  const int32_t own = nce.classes[i];
  const M reference = nce.fixed ? nce.scale : M(0);
  M sum[kLanes] = {}, count[kLanes] = {};
  sweep(nce.size, [&](int64_t lane, int64_t j) {
    const bool counts = nce.classes[j] == own && j != i;
    sum[lane] += counts ? score(row[j], factor(left, nce.right_scale[j], nce.scale)) - reference : M(0);
    count[lane] += counts ? M(1) : M(0);
  });
  row[i] = nothing;
  return fold(sum) / fold(count);
}

template <bool Both, bool Fixed, bool Classes, class C>
void gradient_row(const InfoNce<C>& nce, C* row, int64_t i) {
  using M = typename InfoNce<C>::M;
  const M left = nce.left_scale[i], scale = nce.scale, share = nce.row_share[i];
  const M reference = Fixed ? nce.scale : nce.row_reference[i], positive = nce.positive[i], at_positive = nce.positive_gradient[i];
  const M *right = nce.right_scale, *column_share = nce.column_share, *column_reference = nce.column_reference;
  const M *column_positive = nce.positive, *column_at_positive = nce.positive_gradient;
  const int32_t own = Classes ? nce.classes[i] : 0, *classes = nce.classes;
  M tau_term[kLanes] = {};
  sweep(nce.size, [&](int64_t lane, int64_t j) {
    const M k = factor(left, right[j], scale);
    const M s = score(row[j], k);
    const M below = s - reference, e = exp(below), level = Fixed && Classes ? below : s;
    M g = e * share, other = 0;
    if constexpr (Both) other = (Fixed ? e : exp(s - column_reference[j])) * column_share[j];
    if constexpr (Classes) {  // several positives: their mean is rounded, so their part is not 0
      const bool counts = classes[j] == own && j != i;
      g += counts ? at_positive : M(0);
      other += counts ? column_at_positive[j] : M(0);
    }
    M weighted = g * (level - positive);  // Σ_j g_ij = 0, so a single positive's own part is 0
    if constexpr (Both) weighted += other * (level - column_positive[j]), g += other;
    tau_term[lane] += weighted;
    row[j] = narrow<C>(g * k);
  });
  nce.tau_term[i] = fold(tau_term);
  if (nce.self) row[i] = narrow<C>(M(0));
  if constexpr (Classes) return;
  const int64_t j = nce.positive_of(i);
  row[j] = narrow<C>((at_positive + (nce.self ? column_at_positive[j] : M(0))) * factor(left, right[j], scale));
}

template <bool Fixed, class C>
void gradient_row(const InfoNce<C>& nce, C* row, int64_t i) {
  if (nce.classes != nullptr)
    gradient_row<true, Fixed, true>(nce, row, i);
  else if (nce.two_sided)
    gradient_row<true, Fixed, false>(nce, row, i);
  else
    gradient_row<false, Fixed, false>(nce, row, i);
}

}  // namespace

template <class T>
void info_nce_rows(const T* z, int64_t width, bool normalize, int64_t begin, int64_t end, math_t<T>* inverse_norm,
                   info_nce_rows_t<T>* rows) {
  using M = math_t<T>;
  for (int64_t i = begin; i < end; ++i) {
    const T* from = z + i * width;
    M squares[kLanes] = {};
    sweep(width, [&](int64_t lane, int64_t d) { squares[lane] += widen(from[d]) * widen(from[d]); });
    inverse_norm[i] = normalize ? 1 / max(std::sqrt(fold(squares)), M(1e-12)) : M(1);
    if (rows == nullptr) continue;
    info_nce_rows_t<T>* to = rows + i * width;
    for (int64_t d = 0; d < width; ++d) {
      if constexpr (std::is_same_v<T, info_nce_rows_t<T>>)
        to[d] = from[d];
      else
        to[d] = widen(from[d]);
    }
  }
}

template <class C>
void info_nce_sums(const InfoNce<C>& nce, C* products, int64_t first, int64_t begin, int64_t end,
                   math_t<C>* block_sum, math_t<C>* block_reference) {
  using M = typename InfoNce<C>::M;
  const int64_t n = nce.size;
  const bool columns = nce.two_sided && !nce.self;
  for (int64_t i = begin; i < end; ++i) {
    C* row = products + (i - first) * n;
    const M left = nce.left_scale[i];
    nce.positive[i] = hide(nce, row, i);
    M* sums = nullptr;
    if (columns) {
      sums = block_sum + (i - begin) / kInfoNceBlock * n;
      if ((i - begin) % kInfoNceBlock == 0)
        for (int64_t j = 0; j < n; ++j) sums[j] = 0;
    }
    if (nce.fixed) {
      nce.row_sum[i] = columns ? row_sum<true>(nce, row, left, nce.scale, sums) : row_sum<false>(nce, row, left, nce.scale, sums);
    } else {
      M highest[kLanes];
      for (M& lane : highest) lane = kLowest<M>;
      sweep(n, [&](int64_t lane, int64_t j) {
        highest[lane] = max(score(row[j], factor(left, nce.right_scale[j], nce.scale)), highest[lane]);
      });
      M reference = kLowest<M>;
      for (M lane : highest) reference = max(lane, reference);
      nce.row_reference[i] = reference;
      nce.row_sum[i] = row_sum<false>(nce, row, left, reference, sums);
    }
  }
  if (!columns || nce.fixed) return;
  for (int64_t i = begin; i < end; i += kInfoNceBlock) {
    const int64_t block = (i - begin) / kInfoNceBlock, rows = end - i < kInfoNceBlock ? end - i : kInfoNceBlock;
    M* reference = block_reference + block * n;
    for (int64_t j = 0; j < n; ++j) reference[j] = kLowest<M>;
    column_sums(nce, products + (i - first) * n, rows, nce.left_scale + i, block_sum + block * n, reference);
  }
}

template <class C>
void info_nce_merge(const InfoNce<C>& nce, const math_t<C>* block_sum, const math_t<C>* block_reference,
                    int64_t blocks, int64_t begin, int64_t end) {
  using M = typename InfoNce<C>::M;
  for (int64_t block = 0; block < blocks; ++block) {
    const M* sum = block_sum + block * nce.size;
    if (nce.fixed) {
      for (int64_t j = begin; j < end; ++j) nce.column_sum[j] += sum[j];
      continue;
    }
    const M* reference = block_reference + block * nce.size;
    for (int64_t j = begin; j < end; ++j) {
      const M before = nce.column_reference[j], both = max(before, reference[j]);
      nce.column_sum[j] = nce.column_sum[j] * exp(before - both) + sum[j] * exp(reference[j] - both);
      nce.column_reference[j] = both;
    }
  }
}

template <class C>
void info_nce_gradient(const InfoNce<C>& nce, C* products, int64_t first, bool again, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    C* row = products + (i - first) * nce.size;
    if (again) hide(nce, row, i);
    nce.fixed ? gradient_row<true>(nce, row, i) : gradient_row<false>(nce, row, i);
  }
}

template <class C>
void info_nce_accumulate(const C* part, math_t<C>* sum, bool first, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) sum[j] = (first ? 0 : sum[j]) + widen(part[j]);
}

template <class A, class T>
void project_rows(const InfoNceProjection<A, T>& p, int64_t begin, int64_t end) {
  using M = math_t<T>;
  for (int64_t i = begin; i < end; ++i) {
    const A* g = p.gradient + i * p.width;
    const info_nce_rows_t<T>* row = p.rows + i * p.width;
    T* out = p.out + i * p.width;
    M along = 0;
    if (p.normalize) {
      M lanes[kLanes] = {};
      sweep(p.width, [&](int64_t lane, int64_t d) { lanes[lane] += widen(g[d]) * widen(row[d]); });
      along = fold(lanes) * p.inverse_norm[i] * p.inverse_norm[i];
    }
    sweep(p.width, [&](int64_t, int64_t d) { out[d] = narrow<T>(widen(g[d]) - widen(row[d]) * along); });
  }
}

template <class P>
void info_nce_project(const P& projection, int64_t begin, int64_t end) {
  project_rows(projection, begin, end);
}

#define CMLM_INSTANTIATE_ROWS(T) \
  template void info_nce_rows(const T*, int64_t, bool, int64_t, int64_t, math_t<T>*, info_nce_rows_t<T>*);
#define CMLM_INSTANTIATE_SCORES(C)                                                                       \
  template void info_nce_sums(const InfoNce<C>&, C*, int64_t, int64_t, int64_t, math_t<C>*, math_t<C>*); \
  template void info_nce_merge(const InfoNce<C>&, const math_t<C>*, const math_t<C>*, int64_t, int64_t,  \
                               int64_t);                                                                 \
  template void info_nce_gradient(const InfoNce<C>&, C*, int64_t, bool, int64_t, int64_t);               \
  template void info_nce_accumulate(const C*, math_t<C>*, bool, int64_t, int64_t);
#define CMLM_INSTANTIATE_PROJECT(A, T) \
  template void info_nce_project(const InfoNceProjection<A, T>&, int64_t, int64_t);

CMLM_INSTANTIATE_ROWS(float)
CMLM_INSTANTIATE_ROWS(double)
CMLM_INSTANTIATE_ROWS(BFloat16)
CMLM_INSTANTIATE_ROWS(Half)
CMLM_INSTANTIATE_SCORES(float)
CMLM_INSTANTIATE_SCORES(double)
CMLM_INSTANTIATE_SCORES(BFloat16)
CMLM_INSTANTIATE_PROJECT(float, float)
CMLM_INSTANTIATE_PROJECT(double, double)
CMLM_INSTANTIATE_PROJECT(BFloat16, BFloat16)
CMLM_INSTANTIATE_PROJECT(float, BFloat16)
CMLM_INSTANTIATE_PROJECT(float, Half)

}  // namespace cmlm::CMLM_ISA
