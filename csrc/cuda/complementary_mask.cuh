// Complementary mask, CUDA. Definition: cmlm_fast/ops/complementary_mask.py.
//
// Grid:   bernoulli: a block for 4 · 256 tokens, wherever sequences begin; exact: a block for each sequence.
// Tile:   4 neighbouring tokens a thread, at addresses that 16-byte loads and stores allow; Philox in registers.
// Loop:   exact: pass 1 draws the units' keys (w0, unit id) into shared memory, a radix selection (256 bins of 8 bits, both
//         thresholds at once; 2 passes do for most sequences, 8 are the most) finds the keys that part the roles, pass 2 writes.
//         Units are made distinct in a table of their ids. Sequences with more tokens than shared memory was asked for draw
//         their keys again where they are needed, and look for a unit's first token by comparing: any length is right.
// Memory: reads the id once (exact: twice, the second time from cache), writes both views and the role once: 25 bytes a token
//         (int32: 13), plus 1 for eligible and 4 for unit_ids.
// Types:  integers throughout; the two quotas of a sequence in double.
// Same bits every time: a token's outputs depend on its sequence and position alone; atomics count integers, and which thread
//         first enters a unit does not matter.
#pragma once

#include "common/cuda.cuh"
#include "common/mask_options.h"
#include "common/philox.h"

namespace cmlm {

struct MaskParams : MaskOptions {
  const void* ids;
  const int32_t* cu_seqlens;
  const int64_t* special;
  const uint8_t* eligible;  // may be null, as unit_ids and sample_ids
  const int32_t* unit_ids;
  const int64_t* sample_ids;
  void *view1, *view2;
  uint8_t* role;
  int64_t tokens, sequences;
  int special_count, capacity;  // capacity: tokens whose keys shared memory holds, a power of 2
  bool vector;  // every array starts on 16 bytes
};

constexpr int kGroup = 4, kBernoulliThreads = 256, kBins = 256, kMostSpecial = 16;
constexpr uint64_t kNoKey = ~uint64_t{0};

using Draw = Philox<uint64_t>;

__device__ __forceinline__ uint32_t word(uint64_t low_half) { return static_cast<uint32_t>(low_half); }
__device__ __forceinline__ uint64_t key_of(uint64_t w0, int64_t unit) {
  return static_cast<uint64_t>(word(w0)) << 32 | static_cast<uint32_t>(unit);
}

// X numbers at [from, from + 4), of which those in [begin, end) are needed.
template <class X>
__device__ __forceinline__ void load_group(const X* x, int64_t from, int64_t begin, int64_t end, bool vector, X (&to)[kGroup]) {
  constexpr int kPack = least<int>(kGroup, 16 / sizeof(X));
  if (vector && from >= begin && from + kGroup <= end) {
#pragma unroll
    for (int k = 0; k < kGroup; k += kPack) {
      const auto pack = *reinterpret_cast<const Pack<X, kPack>*>(x + from + k);
#pragma unroll
      for (int l = 0; l < kPack; ++l) to[k + l] = pack.at[l];
    }
  } else {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) to[k] = from + k >= begin && from + k < end ? x[from + k] : X(0);
  }
}

template <class X>
__device__ __forceinline__ void store_group(X* x, int64_t to, int64_t begin, int64_t end, bool vector, const X (&from)[kGroup]) {
  constexpr int kPack = least<int>(kGroup, 16 / sizeof(X));
  if (vector && to >= begin && to + kGroup <= end) {
#pragma unroll
    for (int k = 0; k < kGroup; k += kPack) {
      Pack<X, kPack> pack;
#pragma unroll
      for (int l = 0; l < kPack; ++l) pack.at[l] = from[k + l];
      *reinterpret_cast<Pack<X, kPack>*>(x + to + k) = pack;
    }
  } else {
#pragma unroll
    for (int k = 0; k < kGroup; ++k)
      if (to + k >= begin && to + k < end) x[to + k] = from[k];
  }
}

// Tokens [from, from + 4) and what decides about them; outside [begin, end) none is eligible.
template <class Id>
struct Group {
  Id ids[kGroup];
  int32_t units[kGroup];
  bool can[kGroup];

  __device__ __forceinline__ Group(const MaskParams& p, const int64_t* special, int64_t from, int64_t begin, int64_t end) {
    load_group(static_cast<const Id*>(p.ids), from, begin, end, p.vector, ids);
    uint8_t eligible[kGroup] = {1, 1, 1, 1};
    if (p.eligible != nullptr) load_group(p.eligible, from, begin, end, p.vector, eligible);
    if (p.unit_ids != nullptr) load_group(p.unit_ids, from, begin, end, p.vector, units);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) can[k] = eligible[k] != 0 && from + k >= begin && from + k < end;
    for (int s = 0; s < p.special_count; ++s) {
#pragma unroll
      for (int k = 0; k < kGroup; ++k) can[k] = can[k] && ids[k] != special[s];
    }
  }
};

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

// The sequence that token i is in, one of [low, high).
__device__ __forceinline__ int64_t sequence_of(const int32_t* cu, int64_t i, int64_t low, int64_t high) {
  while (low + 1 < high) {
    const int64_t middle = (low + high) / 2;
    (cu[middle] <= i ? low : high) = middle;
  }
  return low;
}

constexpr size_t kBernoulliShared = room<int64_t>(kMostSpecial) + room<int64_t>(2);

template <class Id>
__global__ void __launch_bounds__(kBernoulliThreads, 4) mask_bernoulli(MaskParams p) {
  Shared shared;
  int64_t* special = shared.take<int64_t>(kMostSpecial);
  int64_t* within = shared.take<int64_t>(2);  // the sequences of this block's first and last token
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBernoulliThreads * kGroup;
  const int64_t last = least(first + kBernoulliThreads * kGroup, p.tokens) - 1;
  load_special(p, special);
  if (threadIdx.x < 2) within[threadIdx.x] = sequence_of(p.cu_seqlens, threadIdx.x == 0 ? first : last, 0, p.sequences);
  __syncthreads();
  const int64_t from = first + threadIdx.x * kGroup;
  if (from >= p.tokens) return;
  const Group<Id> group(p, special, from, 0, p.tokens);
  int64_t sequence = sequence_of(p.cu_seqlens, from, within[0], within[1] + 1);
  Draw draw = draw_of(p, sequence);
  Id view1[kGroup], view2[kGroup];
  uint8_t role[kGroup];
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    if (from + k < p.tokens && sequence < within[1] && from + k >= p.cu_seqlens[sequence + 1]) {
      sequence = sequence_of(p.cu_seqlens, from + k, sequence + 1, within[1] + 1);
      draw = draw_of(p, sequence);
    }
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

__device__ __forceinline__ int quota(double rate, int of) {
  int k = static_cast<int>(rate * of + 0.5);
  if (k == 0 && rate > 0) k = 1;
  return least(k, of);
}

// One of two searches for a number with exactly `rank` keys below it: `rank` keys with this prefix are still to be left below.
struct Search {
  uint64_t prefix;
  int rank;
  bool done;
};

constexpr size_t mask_exact_shared(int64_t capacity) {
  return room<int64_t>(kMostSpecial) + room<Search>(2) + room<int>(2 * kBins) + room<int>(32) + room<uint64_t>(capacity);
}

// Narrows both searches by 8 bits at a time, over key(0..slots); kNoKey counts for nothing, all others differ.
template <class Key>
__device__ __forceinline__ void search_keys(Search* searches, int* bins, int64_t slots, const Key& key) {
  for (int shift = 56; shift >= 0; shift -= 8) {
    __syncthreads();
    const Search search[2] = {searches[0], searches[1]};
    if (search[0].done && search[1].done) return;
    for (int bin = threadIdx.x; bin < 2 * kBins; bin += blockDim.x) bins[bin] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < slots; i += blockDim.x) {
      const uint64_t k = key(i);
      if (k == kNoKey) continue;
#pragma unroll
      for (int q = 0; q < 2; ++q)
        if (!search[q].done && (shift == 56 || (k ^ search[q].prefix) >> (shift + 8) == 0))
          atomicAdd(&bins[q * kBins + static_cast<int>(k >> shift & 255)], 1);
    }
    __syncthreads();
    const int q = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (q > 1) continue;
    const Search own = q == 0 ? search[0] : search[1];
    const int* mine = bins + q * kBins + lane * 8;  // a warp a search, 8 bins a lane
    int count = 0;
    for (int bin = 0; bin < 8; ++bin) count += mine[bin];
    int below = count;
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(kWarp, below, step);
      if (lane >= step) below += before;
    }
    below -= count;
    if (own.done || own.rank < below || own.rank >= below + count) continue;
    int bin = 0;
    for (; own.rank >= below + mine[bin]; ++bin) below += mine[bin];
    searches[q] = {own.prefix | static_cast<uint64_t>(lane * 8 + bin) << shift, own.rank - below, own.rank == below};
  }
}

template <class Id>
__global__ void mask_exact(MaskParams p) {
  const int64_t sequence = blockIdx.x;
  const int64_t begin = most<int64_t>(p.cu_seqlens[sequence], 0), end = least<int64_t>(p.cu_seqlens[sequence + 1], p.tokens);
  if (begin >= end) return;
  Shared shared;
  int64_t* special = shared.take<int64_t>(kMostSpecial);
  Search* searches = shared.take<Search>(2);
  int* bins = shared.take<int>(2 * kBins);
  int* scratch = shared.take<int>(32);
  uint64_t* keys = shared.take<uint64_t>(p.capacity);
  int32_t* table = reinterpret_cast<int32_t*>(keys);  // of unit ids, twice as many, -1 where empty
  const int64_t aligned = begin / kGroup * kGroup, length = end - begin, stride = static_cast<int64_t>(blockDim.x) * kGroup;
  const bool kept = length <= p.capacity, units = p.unit_ids != nullptr;
  const Draw draw = draw_of(p, sequence);
  const auto unit_key = [&](int64_t unit) { return key_of(draw(static_cast<uint64_t>(unit)).w0, unit); };
  const int size = 2 * p.capacity;
  load_special(p, special);
  if (units && kept)
    for (int slot = threadIdx.x; slot < size; slot += blockDim.x) table[slot] = -1;
  __syncthreads();
  const auto can = [&](int64_t i) {
    if (p.eligible != nullptr && p.eligible[i] == 0) return false;
    for (int s = 0; s < p.special_count; ++s)
      if (static_cast<const Id*>(p.ids)[i] == special[s]) return false;
    return true;
  };

  int count = 0;
  for (int64_t from = aligned + threadIdx.x * kGroup; from < end; from += stride) {
    const Group<Id> group(p, special, from, begin, end);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int64_t i = from + k;
      if (i < begin || i >= end) continue;
      if (!units) {
        count += group.can[k];
        if (kept) keys[i - begin] = group.can[k] ? unit_key(i - begin) : kNoKey;
      } else if (kept && group.can[k]) {
        unsigned slot = static_cast<uint32_t>(group.units[k]) * 0x9E3779B1u % size;
        int32_t found;
        while ((found = atomicCAS(table + slot, -1, group.units[k])) != -1 && found != group.units[k]) slot = (slot + 1) % size;
        count += found == -1;
      } else if (!kept) {  // role marks the first token of each unit until it is written
        bool first = group.can[k];
        for (int64_t j = begin; first && j < i; ++j) first = p.unit_ids[j] != group.units[k] || !can(j);
        p.role[i] = first;
        count += first;
      }
    }
  }
  count = block_sum(count, scratch);
  if (threadIdx.x == 0) {
    const int k1 = quota(p.rate, count), k2 = quota(p.complement_rate, count - k1);
    for (int q = 0; q < 2; ++q) {
      const int rank = q == 0 ? k1 : k1 + k2;
      searches[q] = {rank == count ? kNoKey : 0, rank, rank == 0 || rank == count};
    }
  }
  search_keys(searches, bins, units && kept ? size : length, [&](int64_t i) {
    if (!units) return kept ? keys[i] : can(begin + i) ? unit_key(i) : kNoKey;
    if (kept) return table[i] == -1 ? kNoKey : unit_key(table[i]);
    return p.role[begin + i] != 0 ? unit_key(p.unit_ids[begin + i]) : kNoKey;
  });
  __syncthreads();
  const uint64_t below1 = searches[0].prefix, below2 = searches[1].prefix;

  for (int64_t from = aligned + threadIdx.x * kGroup; from < end; from += stride) {
    const Group<Id> group(p, special, from, begin, end);
    Id view1[kGroup], view2[kGroup];
    uint8_t role[kGroup];
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const auto words = draw(static_cast<uint64_t>(from + k - begin));
      const uint64_t key = units ? unit_key(group.units[k]) : key_of(words.w0, from + k - begin);
      role[k] = !group.can[k] ? 0 : key < below1 ? 1 : key < below2 ? 2 : 0;
      const Id other = corrupted(p, words, group.ids[k]);
      view1[k] = role[k] == 1 ? other : group.ids[k];
      view2[k] = role[k] == 2 ? other : group.ids[k];
    }
    store_group(static_cast<Id*>(p.view1), from, begin, end, p.vector, view1);
    store_group(static_cast<Id*>(p.view2), from, begin, end, p.vector, view2);
    store_group(p.role, from, begin, end, p.vector, role);
  }
}

}  // namespace cmlm
