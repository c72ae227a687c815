// Complementary mask, CUDA. Definition: cmlm_fast/ops/complementary_mask.py.
//
// This file has bernoulli and what both samplings share; complementary_mask_exact.cuh has exact.
//
// Grid:   one block per 1024 tokens, regardless of where sequences begin.
// Tile:   16 bytes of ids per thread, coalesced across threads; Philox in registers.
// Loop:   none: ids are in flight while two threads search for the block's sequences.
// Memory: reads the id once, writes both views and the role once: 25 bytes per token (int32: 13), plus 1 for eligible and 4 for
//         unit_ids.
// Types:  integers throughout.
// Determinism: a token's outputs depend only on its sequence and position.
#pragma once

#include "common/cuda.cuh"
#include "common/mask_options.h"
#include "common/philox.h"

namespace cmlm {

struct MaskParams : MaskOptions {
  const void* ids;
  const int32_t* cu_seqlens;
  const int64_t* special;
  const uint8_t* eligible;  // may be null, as may unit_ids and sample_ids
  const int32_t* unit_ids;
  const int64_t* sample_ids;
  void *view1, *view2;
  uint8_t* role;
  int64_t tokens, sequences;
  int special_count, capacity;  // capacity: number of tokens whose keys fit in shared memory, a power of 2
  bool vector;  // every array is aligned to 16 bytes
};

constexpr int kBernoulliThreads = 256, kBernoulliTokens = 1024, kMostSpecial = 16;
template <class Id>
constexpr int kGroup = 16 / sizeof(Id);  // neighbouring tokens that a thread handles together

using Draw = Philox<uint64_t>;

__device__ __forceinline__ uint32_t word(uint64_t low_half) { return static_cast<uint32_t>(low_half); }

// Loads elements [from, from + N), of which only those in [begin, end) are needed.
template <class X, int N>
__device__ __forceinline__ void load_group(const X* x, int64_t from, int64_t begin, int64_t end, bool vector, X (&to)[N]) {
  if (vector && from >= begin && from + N <= end) {
    const auto pack = load_pack<N>(x + from);
#pragma unroll
    for (int k = 0; k < N; ++k) to[k] = pack.at[k];
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) to[k] = from + k >= begin && from + k < end ? x[from + k] : X(0);
  }
}

template <class X, int N>
__device__ __forceinline__ void store_group(X* x, int64_t to, int64_t begin, int64_t end, bool vector, const X (&from)[N]) {
  if (vector && to >= begin && to + N <= end) {
    Pack<X, N> pack;
#pragma unroll
    for (int k = 0; k < N; ++k) pack.at[k] = from[k];
    *reinterpret_cast<Pack<X, N>*>(x + to) = pack;
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (to + k >= begin && to + k < end) x[to + k] = from[k];
  }
}

// Tokens [from, from + kGroup) and what decides their roles.
template <class Id>
struct Group {
  Id ids[kGroup<Id>];
  int32_t units[kGroup<Id>];
  bool can[kGroup<Id>];  // eligible; false outside [begin, end)

  __device__ __forceinline__ void load(const MaskParams& p, int64_t from, int64_t begin, int64_t end) {
    load_group(static_cast<const Id*>(p.ids), from, begin, end, p.vector, ids);
  }
  // Loaded ids are first used here, so that loads stay in flight until then.
  __device__ __forceinline__ void judge(const MaskParams& p, const int64_t* special, int64_t from, int64_t begin, int64_t end) {
    uint8_t eligible[kGroup<Id>];
    if (p.eligible != nullptr) load_group(p.eligible, from, begin, end, p.vector, eligible);
    if (p.unit_ids != nullptr) load_group(p.unit_ids, from, begin, end, p.vector, units);
#pragma unroll
    for (int k = 0; k < kGroup<Id>; ++k) can[k] = (p.eligible == nullptr || eligible[k] != 0) && from + k >= begin && from + k < end;
    for (int s = 0; s < p.special_count; ++s) {
#pragma unroll
      for (int k = 0; k < kGroup<Id>; ++k) can[k] = can[k] && ids[k] != special[s];
    }
    bool known = true, units_good = true;
#pragma unroll
    for (int k = 0; k < kGroup<Id>; ++k) {
      known = known && (!can[k] || static_cast<uint64_t>(ids[k]) < static_cast<uint64_t>(p.vocab));
      units_good = units_good && (!can[k] || p.unit_ids == nullptr || units[k] >= 0);
    }
    if (!known) stop("cmlm_fast::complementary_mask: expected input_ids to be in [0, vocab_size)");
    if (!units_good) stop("cmlm_fast::complementary_mask: expected unit_ids to be >= 0");
  }
};

// Checks cu_seqlens, as far as sequence b can.
__device__ __forceinline__ void check_sequence(const MaskParams& p, int64_t b) {
  const int32_t begin = p.cu_seqlens[b], end = p.cu_seqlens[b + 1];
  if (begin > end || (b == 0 && begin != 0) || (b == p.sequences - 1 && end != p.tokens))
    stop("cmlm_fast::complementary_mask: expected cu_seqlens to be non-decreasing from 0 to the number of tokens");
}

template <class Id>
__device__ __forceinline__ Id corrupted(const MaskParams& p, const PhiloxWords<uint64_t>& words, Id id) {
  const int64_t w1 = word(words.w1);
  if (w1 < p.below_mask) return static_cast<Id>(p.mask_id);
  return w1 < p.below_random ? static_cast<Id>(word(words.w2) * static_cast<uint64_t>(p.vocab) >> 32) : id;
}

__device__ __forceinline__ Draw draw_of(const MaskParams& p, int64_t sequence) {
  return Draw(p.step, static_cast<uint64_t>(p.sample_ids != nullptr ? p.sample_ids[sequence] : sequence), p.seed);
}

__device__ __forceinline__ void load_special(const MaskParams& p, int64_t* special) {
  if (threadIdx.x < static_cast<unsigned>(p.special_count)) special[threadIdx.x] = p.special[threadIdx.x];
}

// The sequence that contains token i, one of [low, high).
__device__ __forceinline__ int64_t sequence_of(const int32_t* cu, int64_t i, int64_t low, int64_t high) {
  while (low + 1 < high) {
    const int64_t middle = (low + high) / 2;
    (cu[middle] <= i ? low : high) = middle;
  }
  return low;
}

// The same over all sequences: first where it would be if all were equally long, else by bisection, whose loads are serial.
__device__ __forceinline__ int64_t sequence_of(const MaskParams& p, int64_t i) {
  const int64_t guess = i * p.sequences / p.tokens;
  if (p.cu_seqlens[guess] <= i && i < p.cu_seqlens[guess + 1]) return guess;
  return sequence_of(p.cu_seqlens, i, 0, p.sequences);
}

constexpr size_t kBernoulliShared = room<int64_t>(kMostSpecial) + room<int64_t>(2);

template <class Id>
__global__ void __launch_bounds__(kBernoulliThreads, 4) mask_bernoulli(MaskParams p) {
  constexpr int kRounds = kBernoulliTokens / (kBernoulliThreads * kGroup<Id>);
  Shared shared;
  int64_t* special = shared.take<int64_t>(kMostSpecial);
  int64_t* within = shared.take<int64_t>(2);  // the sequences of this block's first and last token
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBernoulliTokens;
  const int64_t last = least(first + kBernoulliTokens, p.tokens) - 1;
  const int64_t start = first + (threadIdx.x / 32 * kRounds * 32 + threadIdx.x % 32) * kGroup<Id>;
  Group<Id> groups[kRounds];  // in flight during the search for the block's sequences
#pragma unroll
  for (int round = 0; round < kRounds; ++round) groups[round].load(p, start + round * 32 * kGroup<Id>, 0, p.tokens);
  load_special(p, special);
  if (threadIdx.x < 2) within[threadIdx.x] = sequence_of(p, threadIdx.x == 0 ? first : last);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kBernoulliThreads + threadIdx.x;
  for (int64_t b = thread; b < p.sequences; b += static_cast<int64_t>(gridDim.x) * kBernoulliThreads) check_sequence(p, b);
  __syncthreads();
  if (start >= p.tokens) return;
  int64_t sequence = sequence_of(p.cu_seqlens, start, within[0], within[1] + 1);
  Draw draw = draw_of(p, sequence);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    Group<Id>& group = groups[round];
    const int64_t from = start + round * 32 * kGroup<Id>;
    group.judge(p, special, from, 0, p.tokens);
    Id view1[kGroup<Id>], view2[kGroup<Id>];
    uint8_t role[kGroup<Id>];
#pragma unroll
    for (int k = 0; k < kGroup<Id>; ++k) {
      bool moved = false;
      while (sequence < within[1] && from + k >= p.cu_seqlens[sequence + 1]) ++sequence, moved = true;
      if (moved) draw = draw_of(p, sequence);
      const auto words = draw(static_cast<uint64_t>(from + k - p.cu_seqlens[sequence]));
      const int64_t w0 = word(p.unit_ids != nullptr ? draw(static_cast<uint32_t>(group.units[k])).w0 : words.w0);
      role[k] = !group.can[k] ? 0 : w0 < p.below_role1 ? 1 : w0 < p.below_role2 ? 2 : 0;
      const Id other = corrupted(p, words, group.ids[k]);
      view1[k] = role[k] == 1 ? other : group.ids[k];
      view2[k] = role[k] == 2 ? other : group.ids[k];
    }
    store_group(static_cast<Id*>(p.view1), from, 0, p.tokens, p.vector, view1);
    store_group(static_cast<Id*>(p.view2), from, 0, p.tokens, p.vector, view2);
    store_group(p.role, from, 0, p.tokens, p.vector, role);
  }
}

}  // namespace cmlm
