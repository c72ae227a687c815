// Attention of packed sequences, CPU. Definition: cmlm_fast/ops/varlen_attention.py.
//
// Work:   one sequence and head a call, a block of 32 query rows at a time against all keys of the sequence (or of their window).
//         Every product is `multiply`: 4 rows times two vectors in registers. Keys and values are copied once, transposed where
//         scores are made, so that each inner loop runs over neighbouring numbers.
// Memory: query, key, value (and grad_out) read once, outputs written once; the copies and a block of scores stay in cache.
// Accumulation: float32 (float64 for float64), whatever the inputs. Deterministic: one thread a sequence and head, one order.
#include "cpu/varlen_attention.h"

#include <cmath>

#include "cpu/keep.h"

namespace cmlm::CMLM_ISA {
namespace {

#if defined(CMLM_ISA_avx512)
constexpr int64_t kBytes = 64;
#elif defined(CMLM_ISA_avx2)
constexpr int64_t kBytes = 32;
#else
constexpr int64_t kBytes = 16;
#endif

template <class M>
struct Vector {
  typedef M type __attribute__((vector_size(kBytes)));
  typedef M unaligned __attribute__((vector_size(kBytes), aligned(alignof(M)), may_alias));
};

// A strided matrix: element (i, k) stands at data[i * row + k * column].
template <class M>
struct Strided {
  const M* data;
  int64_t row, column;
};

// kRows rows of out (+)= a · b; b [depth, n] and out have neighbouring columns.
template <int kRows, bool kAdd, class M>
CMLM_INLINE void multiply_rows(Strided<M> a, const M* b, int64_t b_row, M* out, int64_t out_row, int64_t depth, int64_t n) {
  using V = typename Vector<M>::type;
  using U = typename Vector<M>::unaligned;
  constexpr int64_t kWidth = kBytes / sizeof(M);
  for (int64_t j = 0; j < n; j += 2 * kWidth) {
    V low[kRows] = {}, high[kRows] = {};
    for (int64_t k = 0; k < depth; ++k) {
      const V first = *reinterpret_cast<const U*>(b + k * b_row + j);
      const V second = *reinterpret_cast<const U*>(b + k * b_row + j + kWidth);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const M x = a.data[r * a.row + k * a.column];
        low[r] += x * first;
        high[r] += x * second;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      U* to = reinterpret_cast<U*>(out + r * out_row + j);
      U* next = reinterpret_cast<U*>(out + r * out_row + j + kWidth);
      *to = kAdd ? *to + low[r] : low[r];
      *next = kAdd ? *next + high[r] : high[r];
    }
  }
}

// out [m, n] (+)= a [m, depth] · b [depth, n]; n a multiple of 32.
template <bool kAdd, class M>
CMLM_INLINE void multiply(Strided<M> a, const M* b, int64_t b_row, M* out, int64_t out_row, int64_t m, int64_t depth, int64_t n) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4)
    multiply_rows<4, kAdd>({a.data + i * a.row, a.row, a.column}, b, b_row, out + i * out_row, out_row, depth, n);
  for (; i < m; ++i)
    multiply_rows<1, kAdd>({a.data + i * a.row, a.row, a.column}, b, b_row, out + i * out_row, out_row, depth, n);
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

  // [count, columns]: rows first.. of x times factor, 0 past column D.
  void copy(const Packed<const T>& x, int64_t begin, int64_t count, M factor, M* to) const {
    for (int64_t j = 0; j < count; ++j, to += columns) {
      const T* from = row(x, begin + j);
      for (int64_t d = 0; d < a.width; ++d) to[d] = widen(from[d]) * factor;
      for (int64_t d = a.width; d < columns; ++d) to[d] = 0;
    }
  }

  M* copied(const Packed<const T>& x) {
    M* to = take(length * columns);
    copy(x, 0, length, 1, to);
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

// Query rows [begin, end), and the keys in whole vectors that any of them sees.
template <class T>
struct Block {
  Block(const Head<T>& h, int64_t begin)
      : begin(begin), count(min(kVarlenBlock, h.length - begin)), first(h.begin(begin) / 32 * 32),
        last(min(h.rows, varlen_pad(h.end(begin + count - 1)))), keys(min(last, h.length) - first) {}
  const int64_t begin, count, first, last, keys;

 private:
  static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
};

template <class T>
void varlen_forward(const VarlenArgs<T>& args, int64_t sequence, int64_t head, math_t<T>* scratch) {
  using M = math_t<T>;
  Head<T> h(args, sequence, head, scratch);
  const M* keys = h.transposed(args.key);
  const M* values = h.copied(args.value);
  M *scores = h.take(kVarlenBlock * h.rows), *keep = h.take(h.rows);
  M *queries = h.take(kVarlenBlock * h.columns), *out = h.take(kVarlenBlock * h.columns);
  M inverse[kVarlenBlock];
  for (int64_t at = 0; at < h.length; at += kVarlenBlock) {
    const Block<T> block(h, at);
    h.copy(args.query, at, block.count, args.scale, queries);
    multiply<false>({queries, h.columns, 1}, keys + block.first, h.rows, scores + block.first, h.rows, block.count, args.width,
                    block.last - block.first);
    for (int64_t r = 0; r < block.count; ++r) {
      M* p = scores + r * h.rows;
      const int64_t i = at + r, begin = h.begin(i), end = h.end(i);
      M highest = p[begin];
      for (int64_t j = begin; j < end; ++j) highest = max(highest, p[j]);
      M sums[kLanes] = {};
      for (int64_t j = block.first; j < block.last; j += kLanes)
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const bool seen = j + lane >= begin && j + lane < end;
          const M e = exp(seen ? p[j + lane] - highest : M(-1e4));
          p[j + lane] = e;
          sums[lane] += e;
        }
      M sum = 0;
      for (M lane : sums) sum += lane;
      h.lse(i) = highest + std::log(sum);
      inverse[r] = 1 / sum;
      if (args.drop_below > 0) {
        h.draw(i, block.first, block.last, keep);
        for (int64_t j = block.first; j < block.last; ++j) p[j] *= keep[j];
      }
    }
    multiply<false>({scores + block.first, h.rows, 1}, values + block.first * h.columns, h.columns, out, h.columns, block.count,
                    block.keys, h.columns);
    for (int64_t r = 0; r < block.count; ++r) h.write(out + r * h.columns, h.row(args.out, at + r), inverse[r]);
  }
}

template <class T>
void varlen_backward(const VarlenArgs<T>& args, int64_t sequence, int64_t head, math_t<T>* scratch) {
  using M = math_t<T>;
  Head<T> h(args, sequence, head, scratch);
  const M *key_columns = h.transposed(args.key), *value_columns = h.transposed(args.value), *keys = h.copied(args.key);
  M *grad_keys = h.zeros(), *grad_values = h.zeros();
  M *slopes = h.take(kVarlenBlock * h.rows), *weights = h.take(kVarlenBlock * h.rows), *keep = h.take(h.rows);
  M *queries = h.take(kVarlenBlock * h.columns), *grads = h.take(kVarlenBlock * h.columns);
  M* grad_queries = h.take(kVarlenBlock * h.columns);
  for (int64_t j = 0; j < h.rows; ++j) keep[j] = 1;
  for (int64_t at = 0; at < h.length; at += kVarlenBlock) {
    const Block<T> block(h, at);
    const int64_t first = block.first, width = block.last - first;
    h.copy(args.query, at, block.count, 1, queries);
    h.copy(args.grad_out, at, block.count, 1, grads);
    multiply<false>({queries, h.columns, 1}, key_columns + first, h.rows, weights + first, h.rows, block.count, args.width, width);
    multiply<false>({grads, h.columns, 1}, value_columns + first, h.rows, slopes + first, h.rows, block.count, args.width, width);
    for (int64_t r = 0; r < block.count; ++r) {
      M *p = weights + r * h.rows, *dp = slopes + r * h.rows;
      const int64_t i = at + r, begin = h.begin(i), end = h.end(i);
      const M lse = h.lse(i);
      if (args.drop_below > 0) h.draw(i, first, block.last, keep);
      M sums[kLanes] = {};
      for (int64_t j = first; j < block.last; j += kLanes)
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const int64_t k = j + lane;
          const bool seen = k >= begin && k < end;
          const M e = exp(seen ? p[k] * args.scale - lse : M(-1e4));
          p[k] = e;
          dp[k] *= keep[k];
          sums[lane] += e * dp[k];
        }
      M mean = 0;
      for (M lane : sums) mean += lane;
      for (int64_t j = first; j < block.last; ++j) {
        dp[j] = p[j] * (dp[j] - mean) * args.scale;  // the gradient by q·k
        p[j] *= keep[j];                             // the weight that met the value
      }
    }
    multiply<false>({slopes + first, h.rows, 1}, keys + first * h.columns, h.columns, grad_queries, h.columns, block.count,
                    block.keys, h.columns);
    multiply<true>({slopes + first, 1, h.rows}, queries, h.columns, grad_keys + first * h.columns, h.columns, block.keys,
                   block.count, h.columns);
    multiply<true>({weights + first, 1, h.rows}, grads, h.columns, grad_values + first * h.columns, h.columns, block.keys,
                   block.count, h.columns);
    for (int64_t r = 0; r < block.count; ++r) h.write(grad_queries + r * h.columns, h.row(args.grad_query, at + r));
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
