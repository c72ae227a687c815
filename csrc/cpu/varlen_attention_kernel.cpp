// Attention of packed sequences, CPU. Definition: cmlm_fast/ops/varlen_attention.py.
//
// Work:   one sequence and head per call, a block of 32 query rows at a time against all keys of the sequence (or of their
//         window). Every product is `multiply`, of small matrices in registers. Keys and values are copied once, transposed for
//         the score products, so that every inner loop runs over contiguous elements.
// Memory: query, key, value (and grad_out) are read once, outputs written once; the copies and a block of scores stay in cache.
// Accumulation: float32 (float64 for float64), whatever the inputs. Determinism: one thread per sequence and head, one order.
#include "cpu/varlen_attention.h"

#include <cmath>
#include <limits>

#include "cpu/keep.h"
#include "cpu/registers.h"

namespace cmlm::CMLM_ISA {
namespace {

// One sequence and head, with the operands of its products.
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

  // [count, columns]: `count` rows of x from `begin` on, times factor; 0 past column D.
  void copy(const Packed<const T>& x, int64_t begin, int64_t count, M factor, M* to) const {
    for (int64_t j = 0; j < count; ++j, to += columns) {
      const T* from = row(x, begin + j);
      __builtin_prefetch(from + x.head);  // the next head's
      for (int64_t d = 0; d < a.width; ++d) to[d] = widen(from[d]) * factor;
      for (int64_t d = a.width; d < columns; ++d) to[d] = 0;
    }
  }

  // [rows, columns]: x, 0 past the last token.
  M* copy(const Packed<const T>& x, M* to) const {
    copy(x, 0, length, 1, to);
    for (int64_t i = length * columns; i < rows * columns; ++i) to[i] = 0;
    return to;
  }

  // [columns, rows]: the transpose of a copy.
  M* transposed(const M* copied) {
    using V = typename Vector<M>::type;
    using U = typename Vector<M>::unaligned;
    constexpr int64_t kWidth = Vector<M>::kWidth;
    M* to = take(columns * rows);
    for (int64_t j = 0; j < rows; j += kWidth)
      for (int64_t d = 0; d < a.width; d += kWidth) {
        V x[kWidth];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kWidth; ++i) x[i] = *reinterpret_cast<const U*>(copied + (j + i) * columns + d);
        transpose<M>(x);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kWidth; ++i) *reinterpret_cast<U*>(to + (d + i) * rows + j) = x[i];
      }
    return to;
  }

  template <class X>
  X* row(const Packed<X>& x, int64_t i) const {
    return x.data + (first + i) * x.token + head * x.head;
  }

  int64_t begin(int64_t i) const { return a.window > 0 && i >= a.window ? i - a.window + 1 : 0; }
  int64_t end(int64_t i) const { return a.window > 0 && i + a.window < length ? i + a.window : length; }
  M& lse(int64_t i) const { return a.lse[head * a.tokens + first + i]; }

  void draw(int64_t i, int64_t begin, int64_t end, M* keep) const {
    draw_keep(Draws(static_cast<uint32_t>(i), sample, a.seed), a.drop_below, a.keep_factor, begin, end, keep + begin);
  }

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

// A block of query rows and the keys, in whole vectors, that any of them sees.
template <class T>
struct Block {
  Block(const Head<T>& h, int64_t begin)
      : begin(begin), count(min(kVarlenBlock, h.length - begin)), first(h.begin(begin) / 32 * 32),
        last(min(h.rows, varlen_pad(h.end(begin + count - 1)))), keys(min(last, h.length) - first) {}
  const int64_t begin, count, first, last, keys;

 private:
  static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
};

// In a row of scores, sets those that query i does not see to −∞.
template <class T>
CMLM_INLINE void hide(const Head<T>& h, const Block<T>& block, int64_t i, math_t<T>* p) {
  constexpr auto kNever = -std::numeric_limits<math_t<T>>::infinity();
  for (int64_t j = block.first; j < h.begin(i); ++j) p[j] = kNever;
  for (int64_t j = h.end(i); j < block.last; ++j) p[j] = kNever;
}

template <class M>
CMLM_INLINE M highest_of(const M* p, int64_t first, int64_t last) {
  M lanes[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = p[first + lane];
  for (int64_t j = first + kLanes; j < last; j += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = max(lanes[lane], p[j + lane]);
  return fold(lanes, [](auto a, auto b) { return max(a, b); });
}

template <class T>
void varlen_forward(const VarlenArgs<T>& args, int64_t sequence, int64_t head, math_t<T>* scratch) {
  using M = math_t<T>;
  Head<T> h(args, sequence, head, scratch);
  M* values = h.take(h.rows * h.columns);
  const M* keys = h.transposed(h.copy(args.key, values));
  h.copy(args.value, values);
  M *scores = h.take(kVarlenBlock * h.rows), *keep = h.take(h.rows);
  M *queries = h.take(kVarlenBlock * h.columns), *out = h.take(kVarlenBlock * h.columns);
  M highest[kVarlenBlock], total[kVarlenBlock];
  for (int64_t at = 0; at < h.length; at += kVarlenBlock) {
    const Block<T> block(h, at);
    const int64_t first = block.first, last = block.last;
    h.copy(args.query, at, block.count, args.scale, queries);
    multiply<false>({queries, h.columns, 1}, keys + first, h.rows, scores + first, h.rows, block.count, args.width, last - first);
    for (int64_t r = 0; r < block.count; ++r) {
      M* p = scores + r * h.rows;
      const int64_t i = at + r;
      hide(h, block, i, p);
      highest[r] = highest_of(p, first, last);
      M sums[kLanes] = {};
      for (int64_t j = first; j < last; j += kLanes) {
        M e[kLanes];  // a separate array: GCC does not vectorise an exp stored through p
        for (int64_t lane = 0; lane < kLanes; ++lane) e[lane] = exp(p[j + lane] - highest[r]);
        for (int64_t lane = 0; lane < kLanes; ++lane) p[j + lane] = e[lane], sums[lane] += e[lane];
      }
      total[r] = sum_of(sums);
      if (args.drop_below > 0) {
        h.draw(i, first, last, keep);
        for (int64_t j = first; j < last; ++j) p[j] *= keep[j];
      }
    }
    multiply<false>({scores + first, h.rows, 1}, values + first * h.columns, h.columns, out, h.columns, block.count, block.keys,
                    h.columns);
    for (int64_t r = 0; r < block.count; ++r) {
      h.lse(at + r) = highest[r] + std::log(total[r]);
      h.write(out + r * h.columns, h.row(args.out, at + r), 1 / total[r]);
    }
  }
}

template <class T>
void varlen_backward(const VarlenArgs<T>& args, int64_t sequence, int64_t head, math_t<T>* scratch) {
  using M = math_t<T>;
  Head<T> h(args, sequence, head, scratch);
  const int64_t size = h.rows * h.columns;
  M *keys = h.take(size), *grad_keys = h.take(size), *grad_values = h.take(size);
  const M* value_columns = h.transposed(h.copy(args.value, keys));
  const M* key_columns = h.transposed(h.copy(args.key, keys));
  for (int64_t i = 0; i < size; ++i) grad_keys[i] = grad_values[i] = 0;
  M *grad_scores = h.take(kVarlenBlock * h.rows), *weights = h.take(kVarlenBlock * h.rows), *keep = h.take(h.rows);
  M *queries = h.take(kVarlenBlock * h.columns), *grads = h.take(kVarlenBlock * h.columns);
  M* grad_queries = h.take(kVarlenBlock * h.columns);
  for (int64_t j = 0; j < h.rows; ++j) keep[j] = 1;
  for (int64_t at = 0; at < h.length; at += kVarlenBlock) {
    const Block<T> block(h, at);
    const int64_t first = block.first, last = block.last, width = last - first;
    h.copy(args.query, at, block.count, args.scale, queries);
    h.copy(args.grad_out, at, block.count, 1, grads);
    multiply<false>({queries, h.columns, 1}, key_columns + first, h.rows, weights + first, h.rows, block.count, args.width,
                    width);
    multiply<false>({grads, h.columns, 1}, value_columns + first, h.rows, grad_scores + first, h.rows, block.count, args.width,
                    width);
    for (int64_t r = 0; r < block.count; ++r) {
      M *p = weights + r * h.rows, *dp = grad_scores + r * h.rows;
      const int64_t i = at + r;
      const M lse = h.lse(i);
      hide(h, block, i, p);
      if (args.drop_below > 0) h.draw(i, first, last, keep);
      M sums[kLanes] = {}, totals[kLanes] = {};
      for (int64_t j = first; j < last; j += kLanes) {
        M e[kLanes];
        for (int64_t lane = 0; lane < kLanes; ++lane) e[lane] = exp(p[j + lane] - lse);
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          p[j + lane] = e[lane];
          dp[j + lane] *= keep[j + lane];
          sums[lane] += e[lane] * dp[j + lane];
          totals[lane] += e[lane];
        }
      }
      // The total is not quite 1: a large lse is rounded by more than dp and its mean differ.
      const M inverse = 1 / sum_of(totals), mean = sum_of(sums) * inverse;
      for (int64_t j = first; j < last; ++j) {
        dp[j] = p[j] * inverse * (dp[j] - mean);  // gradient with respect to the score
        p[j] *= keep[j] * inverse;                // the weight that multiplied the value
      }
    }
    multiply<false>({grad_scores + first, h.rows, 1}, keys + first * h.columns, h.columns, grad_queries, h.columns, block.count,
                    block.keys, h.columns);
    multiply<true>({grad_scores + first, 1, h.rows}, queries, h.columns, grad_keys + first * h.columns, h.columns, block.keys,
                   block.count, h.columns);
    multiply<true>({weights + first, 1, h.rows}, grads, h.columns, grad_values + first * h.columns, h.columns, block.keys,
                   block.count, h.columns);
    for (int64_t r = 0; r < block.count; ++r)
      h.write(grad_queries + r * h.columns, h.row(args.grad_query, at + r), args.scale);
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
