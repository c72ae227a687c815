// Attention of packed sequences, CPU. Definition: cmlm_fast/ops/varlen_attention.py.
//
// Work:   one sequence and head a call; one query row at a time against all keys of the sequence. Keys and values are copied
//         once, transposed where a row of scores is made, so that every loop runs over neighbouring numbers: over keys, 32 at
//         a time, for s = q·Kᵀ and g·Vᵀ; over D for the sums over keys.
// Memory: query, key, value (and grad_out) read once, outputs written once; the copies and one row of scores stay in cache.
// Accumulation: float32 (float64 for float64), whatever the inputs. Deterministic: one thread a sequence and head, one order.
#include "cpu/varlen_attention.h"

#include <cmath>

#include "common/philox.h"

namespace cmlm::CMLM_ISA {
namespace {

// out[j] = Σ_d row[d] · columns[d, j] for all padded j; columns [width, padded].
template <class M>
CMLM_INLINE void products(const M* row, const M* columns, int64_t width, int64_t padded, M* out) {
  for (int64_t j = 0; j < padded; j += kLanes) {
    M sum[kLanes] = {};
    for (int64_t d = 0; d < width; ++d) {
      const M x = row[d];
      const M* column = columns + d * padded + j;
      for (int64_t lane = 0; lane < kLanes; ++lane) sum[lane] += x * column[lane];
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) out[j + lane] = sum[lane];
  }
}

// out[d] = Σ_j weight[j] · rows[j, d] for j in [begin, end); rows [length, padded].
template <class M>
CMLM_INLINE void weighted_sum(const M* weight, const M* rows, int64_t begin, int64_t end, int64_t padded, M* out) {
  for (int64_t d = 0; d < padded; d += kLanes) {
    M sum[kLanes] = {};
    for (int64_t j = begin; j < end; ++j) {
      const M x = weight[j];
      const M* row = rows + j * padded + d;
      for (int64_t lane = 0; lane < kLanes; ++lane) sum[lane] += x * row[lane];
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) out[d + lane] = sum[lane];
  }
}

// rows[j, :] += weight[j] · row for j in [begin, end).
template <class M>
CMLM_INLINE void add_outer(const M* weight, const M* row, int64_t begin, int64_t end, int64_t padded, M* rows) {
  for (int64_t j = begin; j < end; ++j) {
    const M x = weight[j];
    M* to = rows + j * padded;
    for (int64_t d = 0; d < padded; ++d) to[d] += x * row[d];
  }
}

struct MultiplyLanes {
  typedef uint64_t Words __attribute__((vector_size(64)));
  CMLM_HOST_DEVICE Words operator()(Words word, uint32_t factor) const { return (word & 0xffffffff) * factor; }
};

// keep[j] = 0 where the weight of row i and key j is dropped, else args.keep_factor.
template <class M>
void draw_dropout(uint64_t seed, uint64_t sample, int64_t i, uint32_t below, M factor, int64_t padded, M* keep) {
  using Words = MultiplyLanes::Words;
  const Philox<Words, MultiplyLanes> philox(static_cast<uint32_t>(i), sample, seed);
  Words quad = {0, 1, 2, 3, 4, 5, 6, 7};
  for (int64_t j = 0; j < padded; j += 32, quad += 8) {
    const auto words = philox(quad);
    for (int lane = 0; lane < 8; ++lane) {
      const uint64_t drawn[4] = {words.w0[lane], words.w1[lane], words.w2[lane], words.w3[lane]};
      for (int word = 0; word < 4; ++word) keep[j + 4 * lane + word] = static_cast<uint32_t>(drawn[word]) < below ? M(0) : factor;
    }
  }
}

// One sequence and head, with what its scores are made of.
template <class T>
class Head {
  using M = math_t<T>;

 public:
  Head(const VarlenArgs<T>& args, int64_t sequence, int64_t head, M* scratch)
      : a(args), first(args.cu_seqlens[sequence]), length(args.cu_seqlens[sequence + 1] - first), head(head),
        rows(varlen_pad(length)), columns(varlen_pad(args.width)), sample(static_cast<uint64_t>(sequence * args.heads + head)),
        next(scratch) {}

  M* take(int64_t count) {
    M* taken = next;
    next += count;
    return taken;
  }

  // [width, rows]: the transpose of x, 0 past the last token.
  M* transposed(const Packed<const T>& x) {
    M* to = take(a.width * rows);
    for (int64_t j = 0; j < length; ++j) {
      const T* from = row(x, j);
      for (int64_t d = 0; d < a.width; ++d) to[d * rows + j] = widen(from[d]);
    }
    for (int64_t d = 0; d < a.width; ++d)
      for (int64_t j = length; j < rows; ++j) to[d * rows + j] = 0;
    return to;
  }

  // [length, columns]: x, 0 past column D.
  M* copied(const Packed<const T>& x) {
    M* to = take(length * columns);
    for (int64_t j = 0; j < length; ++j) {
      const T* from = row(x, j);
      for (int64_t d = 0; d < a.width; ++d) to[j * columns + d] = widen(from[d]);
      for (int64_t d = a.width; d < columns; ++d) to[j * columns + d] = 0;
    }
    return to;
  }

  M* zeros() {
    M* to = take(length * columns);
    for (int64_t i = 0; i < length * columns; ++i) to[i] = 0;
    return to;
  }

  template <class X>
  X* row(const Packed<X>& x, int64_t i) const {
    return x.data + (first + i) * x.token + head * x.head;
  }

  int64_t begin(int64_t i) const { return a.window > 0 && i >= a.window ? i - a.window + 1 : 0; }
  int64_t end(int64_t i) const { return a.window > 0 && i + a.window < length ? i + a.window : length; }
  M& lse(int64_t i) const { return a.lse[head * a.tokens + first + i]; }

  void draw(int64_t i, M* keep) const { draw_dropout(a.seed, sample, i, a.drop_below, a.keep_factor, rows, keep); }

  void write(const M* values, T* to, M factor = 1) const {
    for (int64_t d = 0; d < a.width; ++d) to[d] = narrow<T>(values[d] * factor);
  }

  const VarlenArgs<T>& a;
  const int64_t first, length, head, rows, columns;
  const uint64_t sample;

 private:
  M* next;
};

}  // namespace

template <class T>
void varlen_forward(const VarlenArgs<T>& args, int64_t sequence, int64_t head, math_t<T>* scratch) {
  using M = math_t<T>;
  Head<T> h(args, sequence, head, scratch);
  const M* keys = h.transposed(args.key);
  const M* values = h.copied(args.value);
  M *p = h.take(h.rows), *keep = h.take(h.rows), *query = h.take(h.columns), *out = h.take(h.columns);
  for (int64_t i = 0; i < h.length; ++i) {
    const T* from = h.row(args.query, i);
    for (int64_t d = 0; d < args.width; ++d) query[d] = widen(from[d]) * args.scale;
    products(query, keys, args.width, h.rows, p);
    const int64_t begin = h.begin(i), end = h.end(i);
    M highest = p[begin];
    for (int64_t j = begin; j < end; ++j) highest = max(highest, p[j]);
    M sums[kLanes] = {};
    for (int64_t j = 0; j < h.rows; j += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const bool seen = j + lane >= begin && j + lane < end;
        const M e = exp(seen ? p[j + lane] - highest : M(-1e4));
        p[j + lane] = e;
        sums[lane] += e;
      }
    M sum = 0;
    for (M lane : sums) sum += lane;
    h.lse(i) = highest + std::log(sum);
    if (args.drop_below > 0) {
      h.draw(i, keep);
      for (int64_t j = 0; j < h.rows; ++j) p[j] *= keep[j];
    }
    weighted_sum(p, values, begin, end, h.columns, out);
    h.write(out, h.row(args.out, i), 1 / sum);
  }
}

template <class T>
void varlen_backward(const VarlenArgs<T>& args, int64_t sequence, int64_t head, math_t<T>* scratch) {
  using M = math_t<T>;
  Head<T> h(args, sequence, head, scratch);
  const M *key_columns = h.transposed(args.key), *value_columns = h.transposed(args.value);
  const M *keys = h.copied(args.key), *queries = h.copied(args.query), *grads = h.copied(args.grad_out);
  M *grad_keys = h.zeros(), *grad_values = h.zeros();
  M *p = h.take(h.rows), *dp = h.take(h.rows), *keep = h.take(h.rows), *grad_query = h.take(h.columns);
  for (int64_t i = 0; i < h.length; ++i) {
    const M *query = queries + i * h.columns, *grad = grads + i * h.columns;
    products(query, key_columns, args.width, h.rows, p);
    products(grad, value_columns, args.width, h.rows, dp);
    const int64_t begin = h.begin(i), end = h.end(i);
    const M lse = h.lse(i);
    if (args.drop_below > 0)
      h.draw(i, keep);
    else
      for (int64_t j = 0; j < h.rows; ++j) keep[j] = 1;
    M sums[kLanes] = {};
    for (int64_t j = 0; j < h.rows; j += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t k = j + lane;
        const bool seen = k >= begin && k < end;
        const M e = exp(seen ? p[k] * args.scale - lse : M(-1e4));
        dp[k] *= keep[k];
        sums[lane] += e * dp[k];
        keep[k] *= e;  // the weight that met the value
        p[k] = e;
      }
    M mean = 0;
    for (M lane : sums) mean += lane;
    for (int64_t j = 0; j < h.rows; ++j) p[j] *= (dp[j] - mean) * args.scale;  // the gradient by q·k
    weighted_sum(p, keys, begin, end, h.columns, grad_query);
    h.write(grad_query, h.row(args.grad_query, i));
    add_outer(p, query, begin, end, h.columns, grad_keys);
    add_outer(keep, grad, begin, end, h.columns, grad_values);
  }
  for (int64_t j = 0; j < h.length; ++j) {
    h.write(grad_keys + j * h.columns, h.row(args.grad_key, j));
    h.write(grad_values + j * h.columns, h.row(args.grad_value, j));
  }
}

#define CMLM_INSTANTIATE(T)                                                         \
  template void varlen_forward(const VarlenArgs<T>&, int64_t, int64_t, math_t<T>*); \
  template void varlen_backward(const VarlenArgs<T>&, int64_t, int64_t, math_t<T>*);

CMLM_INSTANTIATE(float)
CMLM_INSTANTIATE(double)
CMLM_INSTANTIATE(BFloat16)
CMLM_INSTANTIATE(Half)

}  // namespace cmlm::CMLM_ISA
