// Token-level contrast, CPU: the algorithm, its memory and its threads. The loops are in token_contrastive_kernel.cpp.
//
// The rows that count are sorted by the start of their range and split into chunks of at most 256 queries. A chunk meets only
// the keys between the first start and the last end of its rows:
//
//   Sᵀ = K·Qᵀ            [keys, queries] in blocks of keys, one thread per block; each block is turned in place into
//                        e_ij = exp(s_ij − shift_i), 0 if j is no candidate or is the target, times 1/‖k_j‖
//   Z_i = Σ_j e_ij + e_i,target → loss; the target's score is a separate dot product, wherever the target lies
//   dQ  = Sᵀᵀ·K          rows scaled by w_i/(Z_i·τ), the target's part and the normalisation added: finished at once
//   dK += Sᵀ·(Q·w/(Zτ))  in float32 over all chunks; the targets' part and the normalisation follow at the end or, if the last
//                        chunk meets all keys, inside it, 64 at a time while they are in L2
//
// so loss and gradients take 6·N·M·D operations, and only one chunk of the N×M matrix exists at a time. Every score is read and
// written once with unit vectors and τ >= 1/32, when the shift is the bound 1/τ; otherwise the maximum is found first.
// Threads: over key blocks inside a chunk or, if ranges split the chunks into many groups with disjoint keys, over the groups.
// Accumulation: float32 (float64 for float64).
// Determinism: no atomics; partial sums are added in the order of blocks and chunks, whose sizes do not depend on the number of
// threads (torch's own products may).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <numeric>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/token_chunks.h"
#include "cpu/token_contrastive.h"
#include "cpu/token_pairs.h"

namespace cmlm {

using torch::stable::parallel_for;

constexpr int64_t kStrip = 64;  // keys finished at a time

// Memory of one chunk at a time, which `threads` threads work on.
template <class T>
struct TokenWorkspace {
  using O = math_t<T>;
  int64_t threads, block_keys;
  Tensor scores, rows, sums, products, key_sums;
  std::vector<O> scale, shift, inverse, target_score, factor, target_factor, partial;
  std::vector<int32_t> hidden, start, length, token;

  TokenWorkspace(int64_t threads, const Plan& plan, int64_t d, bool key_grad)
      : threads(threads),
        block_keys(keys_per_block(plan.most_keys)),
        scores(empty<T>({plan.most_keys, plan.most_rows})),
        rows(empty<T>({plan.most_rows, d})),
        sums(empty<T>({plan.most_rows, d})),
        products(empty<T>({key_grad && !std::is_same_v<T, O> ? threads * block_keys : 0, d})),
        key_sums(empty<O>({key_grad && !std::is_same_v<T, O> ? threads * kStrip : 0, d})) {
    for (auto* v : {&scale, &shift, &inverse, &target_score, &factor, &target_factor}) v->resize(plan.most_rows);
    for (auto* v : {&hidden, &start, &length, &token}) v->resize(plan.most_rows);
    partial.resize(2 * plan.most_rows * blocks(plan.most_keys));
  }

  int64_t blocks(int64_t keys) const { return ceil_div(keys, block_keys); }

  // Calls f(block, first key, keys, thread) for the blocks of `keys` keys: neighbours share a thread, the same in every sweep.
  template <class F>
  void for_blocks(int64_t keys, F f) const {
    const int64_t blocks = ceil_div(keys, block_keys), each = ceil_div(blocks, threads);
    parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t b = t * each; b < std::min(blocks, (t + 1) * each); ++b)
          f(b, b * block_keys, std::min(block_keys, keys - b * block_keys), t);
    });
  }
};

template <class T>
class TokenEngine {
  using O = math_t<T>;

 public:
  // Losses go to loss [N]. If weight [N] is not null, the gradients of Σ weight_i·loss_i are computed too.
  TokenEngine(const TokenPairs& pairs, bool normalize, const O* weight, bool query_grad, bool key_grad, O* loss)
      : pairs_(pairs), query_(data<T>(pairs.query)), key_(data<T>(pairs.key)), target_(pairs.targets()), d_(pairs.d),
        tau_(static_cast<O>(pairs.temperature)), normalize_(normalize), query_grad_(query_grad), key_grad_(key_grad),
        bounded_(normalize && pairs.temperature >= 1.0 / 32), weight_(weight), loss_(loss), key_inverse_(pairs.m),
        key_factor_(pairs.n), tau_part_(pairs.n) {}

  struct Gradients {
    Tensor query, key;
    double temperature;
  };
  Gradients run();

 private:
  void run_chunk(const Chunk& chunk, TokenWorkspace<T>& w, bool fresh, bool last);
  void load_query(const Chunk& chunk, TokenWorkspace<T>& w, int64_t i) const;
  void score_keys(const Chunk& chunk, TokenWorkspace<T>& w) const;
  void finish_query(const Chunk& chunk, TokenWorkspace<T>& w, int64_t i);
  void query_gradient(const Chunk& chunk, TokenWorkspace<T>& w) const;
  void key_gradient(const Chunk& chunk, TokenWorkspace<T>& w, bool fresh, bool last) const;
  void finish_keys(int64_t begin, int64_t end, O* sums) const;

  const TokenPairs& pairs_;
  const T *query_, *key_;
  const int64_t *target_, d_;
  const O tau_;
  const bool normalize_, query_grad_, key_grad_, bounded_;
  const O* weight_;
  O* loss_;
  Plan plan_;
  T *query_out_ = nullptr, *key_out_ = nullptr;
  O* key_sums_ = nullptr;  // [M, D] the key's gradient in O; empty if T is not O and one chunk meets all keys
  std::vector<O> key_inverse_, key_factor_, tau_part_;  // 1/‖k‖; a query's part in its target's gradient; in temperature's
};

// Column i of the chunk: a copy of the query, and the factors that turn its products into scores. A copy to be
// normalised is scaled by a power of two to a length in (1/2, 1]: no rounding, and no product leaves the range of T.
template <class T>
void TokenEngine<T>::load_query(const Chunk& chunk, TokenWorkspace<T>& w, int64_t i) const {
  T* copy = data<T>(w.rows) + i * d_;
  w.scale[i] = w.shift[i] = w.target_score[i] = 0;
  w.hidden[i] = -1;
  w.start[i] = w.length[i] = w.token[i] = 0;
  if (i >= chunk.rows) {
    std::fill_n(copy, d_, baseline::narrow<T>(0));
    return;
  }
  const int64_t row = plan_.order[chunk.row + i], t = target_[row];
  CMLM_KERNEL(token_inverse_norms<T>)(query_ + row * d_, 1, d_, normalize_, &w.inverse[i]);
  const O power = normalize_ && w.inverse[i] > 0 ? std::exp2(std::floor(std::log2(w.inverse[i]))) : O(1);
  CMLM_KERNEL(token_scale<T>)(query_ + row * d_, d_, power, O(1), copy);
  w.scale[i] = w.inverse[i] / power / tau_;
  w.target_score[i] = CMLM_KERNEL(token_dot<T>)(copy, key_ + t * d_, d_) * (w.scale[i] * key_inverse_[t]);
  w.shift[i] = O(1) / tau_;
  w.hidden[i] = static_cast<int32_t>(t);
  w.start[i] = static_cast<int32_t>(pairs_.first(row));
  w.length[i] = static_cast<int32_t>(pairs_.last(row)) - w.start[i];
  w.token[i] = pairs_.query_token.empty() ? 0 : pairs_.query_token[row];
}

// Scores of the chunk, as weights e_ij / ‖k_j‖, and their sums per block.
template <class T>
void TokenEngine<T>::score_keys(const Chunk& chunk, TokenWorkspace<T>& w) const {
  const int64_t columns = round_up(chunk.rows, kPad);
  const auto block_of = [&](int64_t b, int64_t first, int64_t keys) {
    ScoreBlock<T> block{};
    block.scores = data<T>(w.scores) + first * columns;
    block.keys = keys, block.columns = columns, block.first = chunk.key + first;
    block.key_scale = key_inverse_.data() + block.first;
    block.key_token = pairs_.key_token.empty() ? nullptr : pairs_.key_token.data() + block.first;
    block.scale = w.scale.data(), block.shift = w.shift.data(), block.target = w.target_score.data();
    block.hidden = w.hidden.data();  // the target has its own score, not rounded to T, and its weight is added separately
    block.start = chunk.ranged ? w.start.data() : nullptr, block.length = w.length.data();
    block.token = pairs_.query_token.empty() ? nullptr : w.token.data();
    block.sum = w.partial.data() + 2 * columns * b, block.moment = block.sum + columns;
    return block;
  };
  const Tensor rows = transposed(data<T>(w.rows), columns, d_);
  w.for_blocks(chunk.keys, [&](int64_t b, int64_t first, int64_t keys, int64_t) {
    const ScoreBlock<T> block = block_of(b, first, keys);
    multiply(matrix(block.scores, keys, columns), matrix(key_ + block.first * d_, keys, d_), rows);
    bounded_ ? CMLM_KERNEL(token_exp<T>)(block) : CMLM_KERNEL(token_max<T>)(block);
  });
  if (bounded_) return;
  for (int64_t i = 0; i < chunk.rows; ++i) {
    w.shift[i] = w.target_score[i];
    for (int64_t b = 0; b < w.blocks(chunk.keys); ++b) w.shift[i] = std::max(w.shift[i], w.partial[2 * columns * b + i]);
  }
  w.for_blocks(chunk.keys, [&](int64_t b, int64_t first, int64_t keys, int64_t) {
    CMLM_KERNEL(token_exp<T>)(block_of(b, first, keys));
  });
}

// Computes, from the sums of column i, the loss, the temperature's gradient and the factors of both gradients.
template <class T>
void TokenEngine<T>::finish_query(const Chunk& chunk, TokenWorkspace<T>& w, int64_t i) {
  const int64_t columns = round_up(chunk.rows, kPad), row = plan_.order[chunk.row + i];
  O others = 0, moment = 0;
  for (int64_t b = 0; b < w.blocks(chunk.keys); ++b) {
    others += w.partial[2 * columns * b + i];
    moment += w.partial[2 * columns * b + columns + i];
  }
  const O x = w.target_score[i] - w.shift[i], own = std::exp(x), total = others + own;
  loss_[row] = others < own ? std::log1p(others / own) : std::log(total) - x;
  if (!weight_) return;
  w.factor[i] = weight_[row] / (total * tau_);
  w.target_factor[i] = -w.factor[i] * others;
  key_factor_[row] = w.target_factor[i] * w.inverse[i];
  tau_part_[row] = -w.factor[i] * moment;
}

template <class T>
void TokenEngine<T>::query_gradient(const Chunk& chunk, TokenWorkspace<T>& w) const {
  const int64_t columns = round_up(chunk.rows, kPad);
  multiply(matrix(data<T>(w.sums), columns, d_), transposed(data<T>(w.scores), chunk.keys, columns),
           matrix(key_ + chunk.key * d_, chunk.keys, d_));
  parallel_for(0, chunk.rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<O> scratch(d_);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = plan_.order[chunk.row + i], t = target_[row];
      const QueryRow<T> parts{data<T>(w.sums) + i * d_, query_ + row * d_, key_ + t * d_,
                              w.factor[i], w.target_factor[i] * key_inverse_[t], w.inverse[i]};
      CMLM_KERNEL(token_finish_query<T>)(parts, d_, normalize_, scratch.data(), query_out_ + row * d_);
    }
  });
}

template <class T>
void TokenEngine<T>::key_gradient(const Chunk& chunk, TokenWorkspace<T>& w, bool fresh, bool last) const {
  const int64_t columns = round_up(chunk.rows, kPad);
  parallel_for(0, chunk.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      CMLM_KERNEL(token_scale<T>)(query_ + plan_.order[chunk.row + i] * d_, d_, w.inverse[i], w.factor[i], data<T>(w.rows) + i * d_);
  });
  const Tensor rows = matrix(data<T>(w.rows), columns, d_);
  w.for_blocks(chunk.keys, [&](int64_t, int64_t first, int64_t keys, int64_t thread) {
    const Tensor weights = matrix(data<T>(w.scores) + first * columns, keys, columns);
    first += chunk.key;
    if constexpr (std::is_same_v<T, O>) {
      O* sums = key_sums_ + first * d_;
      fresh ? multiply(matrix(sums, keys, d_), weights, rows) : multiply_add(matrix(sums, keys, d_), weights, rows);
      if (last) finish_keys(first, first + keys, sums);
    } else {
      T* product = data<T>(w.products) + thread * w.block_keys * d_;
      multiply(matrix(product, keys, d_), weights, rows);
      for (int64_t j = 0; j < keys; j += kStrip) {
        const int64_t count = std::min(kStrip, keys - j);
        O* sums = fresh && last ? data<O>(w.key_sums) + thread * kStrip * d_ : key_sums_ + (first + j) * d_;
        CMLM_KERNEL(token_add<T>)(product + j * d_, count * d_, fresh, sums);
        if (last) finish_keys(first + j, first + j + count, sums);
      }
    }
  });
}

// Adds the targets' parts to the sums [end - begin, D] of these keys, then backpropagates through the normalisation.
template <class T>
void TokenEngine<T>::finish_keys(int64_t begin, int64_t end, O* sums) const {
  for (const int64_t row : plan_.order) {
    const int64_t t = target_[row];
    if (begin <= t && t < end)
      CMLM_KERNEL(token_add_scaled<T>)(query_ + row * d_, d_, key_factor_[row] * key_inverse_[t], sums + (t - begin) * d_);
  }
  for (int64_t j = begin; j < end; ++j)
    CMLM_KERNEL(token_finish_key<T>)(sums + (j - begin) * d_, key_ + j * d_, d_, normalize_, key_inverse_[j], key_out_ + j * d_);
}

template <class T>
typename TokenEngine<T>::Gradients TokenEngine<T>::run() {
  parallel_for(0, pairs_.m, 64, [&](int64_t begin, int64_t end) {
    CMLM_KERNEL(token_inverse_norms<T>)(key_ + begin * d_, end - begin, d_, normalize_, key_inverse_.data() + begin);
  });
  plan_ = make_plan(pairs_, rows_per_chunk(pairs_));
  const int64_t groups = static_cast<int64_t>(plan_.groups.size()) - 1, threads = torch::stable::get_num_threads();
  Gradients result{empty<T>({0}), empty<T>({0}), 0.0};
  Tensor key_sums;
  if (query_grad_) {
    result.query = empty<T>({pairs_.n, d_});
    query_out_ = data<T>(result.query);
    if (static_cast<int64_t>(plan_.order.size()) < pairs_.n) std::fill_n(query_out_, pairs_.n * d_, baseline::narrow<T>(0));
  }
  const bool fresh = !plan_.chunks.empty() && plan_.chunks[0].keys == pairs_.m;  // its product overwrites: no zeros are needed
  const bool grouped = groups >= 2 * threads, last = !grouped && groups > 0 && plan_.chunks.back().keys == pairs_.m;
  if (key_grad_) {
    result.key = empty<T>({pairs_.m, d_});
    key_out_ = data<T>(result.key);
    const bool alone = last && plan_.chunks.size() == 1;
    key_sums = std::is_same_v<T, O> ? result.key : empty<O>({alone ? 0 : pairs_.m, d_});
    key_sums_ = data<O>(key_sums);
    if (!fresh) std::fill_n(key_sums_, pairs_.m * d_, O(0));
  }
  if (grouped) {
    parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      TokenWorkspace<T> w(1, plan_, d_, key_grad_);
      for (int64_t c = plan_.groups[begin]; c < plan_.groups[end]; ++c) run_chunk(plan_.chunks[c], w, false, false);
    });
  } else if (groups > 0) {
    TokenWorkspace<T> w(threads, plan_, d_, key_grad_);
    const size_t count = plan_.chunks.size();
    for (size_t c = 0; c < count; ++c) run_chunk(plan_.chunks[c], w, c == 0 && fresh, c == count - 1 && last);
  }
  if (key_grad_ && !last)
    parallel_for(0, pairs_.m, kStrip, [&](int64_t begin, int64_t end) { finish_keys(begin, end, key_sums_ + begin * d_); });
  result.temperature = std::accumulate(tau_part_.begin(), tau_part_.end(), 0.0);
  return result;
}

template <class T>
void TokenEngine<T>::run_chunk(const Chunk& chunk, TokenWorkspace<T>& w, bool fresh, bool last) {
  parallel_for(0, round_up(chunk.rows, kPad), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) load_query(chunk, w, i);
  });
  score_keys(chunk, w);
  for (int64_t i = 0; i < chunk.rows; ++i) finish_query(chunk, w, i);
  if (weight_ && query_grad_) query_gradient(chunk, w);
  if (weight_ && key_grad_) key_gradient(chunk, w, fresh, last);
}

}  // namespace cmlm
