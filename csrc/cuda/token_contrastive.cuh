// token_contrastive as a problem of contrast.cuh: side 0 holds the queries, side 1 the keys. Definition:
// cmlm_fast/ops/token_contrastive.py. It runs on the kernels of contrast_tiles.cuh (ranges, or few scores) and contrast_rows.cuh.
#pragma once

#include "cuda/contrast.cuh"

namespace cmlm {

// The keys that a tile of 64 queries may want, as two intervals: one for ranges, one for targets.
struct Reach {
  int64_t first, last, first_target, last_target;
};

template <class T>
struct TokenContrast : Contrast<T> {
  using M = math_t<T>;
  const int64_t* target;
  const int32_t *start, *end;                // may be null
  const void *query_token, *key_token;       // may be null; int64, or int32 if not wide
  bool wide, keep_ignored;                   // keep_ignored: rows without a positive have candidates too
  Reach* reaches;  // of each tile of queries

  __device__ __forceinline__ int64_t token(const void* tokens, int64_t i) const {
    return wide ? static_cast<const int64_t*>(tokens)[i] : static_cast<const int32_t*>(tokens)[i];
  }
  __device__ __forceinline__ bool valid(int64_t query) const { return target != nullptr && target[query] != -100; }
  __device__ __forceinline__ bool single_positive() const { return true; }
  __device__ __forceinline__ int64_t partner(int s, int64_t r) const {  // the row of the other side that is r's positive, or -1
    return s == 0 && target[r] >= 0 && target[r] < this->side[1].rows ? target[r] : -1;
  }

  static constexpr bool kEqualMarksArePositive = false;  // equal tokens exclude a key from a query's candidates
  static constexpr bool kTwoSided = false;  // whether rows of both sides may be anchors, or a side may face itself
  __host__ __device__ __forceinline__ bool marked() const { return key_token != nullptr; }
  __device__ __forceinline__ int64_t mark(int s, int64_t r) const {
    const void* tokens = s == 0 ? query_token : key_token;
    return tokens != nullptr ? token(tokens, r) : -1;  // keys of token -1 are never candidates
  }

  __device__ __forceinline__ void check(int s, int64_t r) const {
    if (s == 1 || target == nullptr || target[r] == -100 || (target[r] >= 0 && target[r] < this->side[1].rows)) return;
    stop(keep_ignored ? "cmlm_fast::token_similarity: expected target to be in [0, M) or -100"
                      : "cmlm_fast::token_contrastive: expected target to be in [0, M) or -100");
  }
  __device__ __forceinline__ void check_temperature() const {
    cmlm::check_temperature(*this->temperature, keep_ignored
                                                    ? "cmlm_fast::token_similarity: expected temperature to be finite and > 0"
                                                    : "cmlm_fast::token_contrastive: expected temperature to be finite and > 0");
  }

  __device__ __forceinline__ Facts<M> facts(int s, int64_t r) const {
    Facts<M> facts{};
    if (s == 1) {
      facts.token = key_token != nullptr ? token(key_token, r) : 0;
    } else {
      facts.token = query_token != nullptr ? token(query_token, r) : 0;
      facts.target = target != nullptr ? target[r] : -100;
      if (keep_ignored || valid(r)) {
        facts.start = start != nullptr ? start[r] : 0;
        facts.end = end != nullptr ? end[r] : static_cast<int32_t>(this->side[1].rows);
      }
    }
    return facts;
  }

  __device__ __forceinline__ bool positive(const Facts<M>& query, const Facts<M>&, int64_t, int64_t key) const {
    return key == query.target;
  }
  __device__ __forceinline__ bool negative(const Facts<M>& query, const Facts<M>& other, int64_t, int64_t key) const {
    bool candidate = key >= query.start && key < query.end && key != query.target;
    if (key_token != nullptr) candidate = candidate && other.token != -1 && (query_token == nullptr || other.token != query.token);
    return candidate;
  }
  __device__ __forceinline__ M weight(int s, const Facts<M>& row, const Facts<M>& column, int64_t r, int64_t c, M score) const {
    return s == 0 ? part(*this, row, column, r, c, score) : part(*this, column, row, c, r, score);
  }

  __device__ __forceinline__ Reach reach(const Facts<M>* queries, int64_t count) const {
    const int64_t none = this->side[1].rows;
    Reach reach{none, 0, none, 0};
    for (int64_t i = 0; i < count; ++i) {
      if (queries[i].start < queries[i].end) {
        reach.first = least<int64_t>(reach.first, queries[i].start);
        reach.last = most<int64_t>(reach.last, queries[i].end);
      }
      if (queries[i].target < 0) continue;
      reach.first_target = least(reach.first_target, queries[i].target);
      reach.last_target = most(reach.last_target, queries[i].target + 1);
    }
    return reach;
  }
  __device__ __forceinline__ void keep_reach(int64_t tile, const Reach& reach) const { reaches[tile] = reach; }
  __device__ __forceinline__ bool touches(const Reach& reach, int64_t begin, int64_t end) const {
    return (reach.first < end && begin < reach.last) || (reach.first_target < end && begin < reach.last_target);
  }
  __device__ __forceinline__ bool wants(int s, int64_t own, int64_t tile) const {
    const int64_t keys = s == 0 ? tile : own;
    return touches(reaches[s == 0 ? own : tile], keys * kTile, (keys + 1) * kTile);
  }
};

}  // namespace cmlm
