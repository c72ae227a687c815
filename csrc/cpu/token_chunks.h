// How token_contrastive splits its rows into chunks. Host code only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/token_pairs.h"

namespace cmlm {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int64_t kPad = 32;  // columns of a chunk are padded to whole vectors with queries of scale 0

// A chunk of scores, [M, rows], is no larger than the key's gradient, [M, D], which is held anyway.
inline int64_t rows_per_chunk(const TokenPairs& pairs) {
  return std::clamp<int64_t>(pairs.d / kPad * kPad, 64, 256);
}

// Keys per block: independent of the number of threads, so that sums are too; small enough for 16 threads at M = 8192.
inline int64_t keys_per_block(int64_t most_keys) {
  return std::clamp<int64_t>(round_up(ceil_div(most_keys, 16), 64), 128, 512);
}

// Rows order[row, row + rows) against keys [key, key + keys).
struct Chunk {
  int64_t row, rows, key, keys;
  bool ranged;  // some row has a smaller range than that
};

struct Plan {
  std::vector<int64_t> order;   // rows with a target and a range of other candidates
  std::vector<Chunk> chunks;
  std::vector<int64_t> groups;  // first chunk of each group, and the end; groups share no keys
  int64_t most_rows = 0, most_keys = 0;
};

inline Plan make_plan(const TokenPairs& pairs, int64_t most) {
  Plan plan;
  std::vector<int32_t> first(pairs.n), last(pairs.n);
  for (int64_t i = 0; i < pairs.n; ++i) {
    first[i] = static_cast<int32_t>(pairs.first(i)), last[i] = static_cast<int32_t>(pairs.last(i));
    if (pairs.targets()[i] >= 0 && first[i] < last[i]) plan.order.push_back(i);
  }
  std::stable_sort(plan.order.begin(), plan.order.end(), [&](int64_t a, int64_t b) {
    return first[a] != first[b] ? first[a] < first[b] : last[a] < last[b];
  });
  const int64_t count = static_cast<int64_t>(plan.order.size());
  int64_t reach = 0, begin = 0;
  while (begin < count) {
    // Equal chunks of what is left; a chunk ends early if further keys would mostly meet rows that do not want them.
    const int64_t size = std::min(count - begin, round_up(ceil_div(count - begin, ceil_div(count - begin, most)), kPad));
    Chunk chunk{begin, 0, first[plan.order[begin]], 0, false};
    int64_t wanted = 0;
    for (; chunk.rows < size; ++chunk.rows) {
      const int64_t i = plan.order[begin + chunk.rows];
      const int64_t keys = std::max<int64_t>(chunk.keys, last[i] - chunk.key);
      const int64_t want = wanted + last[i] - first[i];
      if (chunk.rows >= 32 && keys > chunk.keys && (chunk.rows + 1) * keys > want + want / 4 + 8192) break;
      chunk.keys = keys, wanted = want;
    }
    chunk.ranged = wanted < chunk.rows * chunk.keys;
    if (chunk.key >= reach) plan.groups.push_back(static_cast<int64_t>(plan.chunks.size()));
    reach = std::max(reach, chunk.key + chunk.keys);
    plan.most_rows = std::max(plan.most_rows, round_up(chunk.rows, kPad));
    plan.most_keys = std::max(plan.most_keys, chunk.keys);
    plan.chunks.push_back(chunk);
    begin += chunk.rows;
  }
  plan.groups.push_back(static_cast<int64_t>(plan.chunks.size()));
  return plan;
}

}  // namespace cmlm
