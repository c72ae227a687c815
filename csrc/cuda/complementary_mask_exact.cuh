// Complementary mask, CUDA, exact sampling.
//
// Grid:   one block per sequence.
// Tile:   16 bytes of ids per thread, coalesced across threads; Philox in registers.
// Loop:   pass 1 draws the units' keys (w0, unit id) into shared memory; a radix selection (8 bits, 256 bins at a time, both
//         thresholds at once; 2 passes suffice for most sequences, 8 at most) finds the keys that separate the roles; pass 2
//         writes. A table of unit ids removes duplicates. Sequences with more tokens than shared memory was sized for draw
//         their keys again when needed, and find a unit's first token by comparison: any length is correct.
// Memory: reads the id twice, the second time from cache, writes both views and the role once: 25 bytes per token (int32: 13),
//         plus 1 for eligible and 4 for unit_ids.
// Types:  integers throughout; the two quotas of a sequence in double.
// Determinism: atomics only count integers, and it does not matter which thread enters a unit first.
#pragma once

#include "cuda/complementary_mask.cuh"

namespace cmlm {

constexpr int kBins = 256;
constexpr uint64_t kNoKey = ~uint64_t{0};

__device__ __forceinline__ uint64_t key_of(uint64_t w0, int64_t unit) {
  return static_cast<uint64_t>(word(w0)) << 32 | static_cast<uint32_t>(unit);
}

__device__ __forceinline__ int quota(double rate, int of) {
  int k = static_cast<int>(rate * of + 0.5);
  if (k == 0 && rate > 0) k = 1;
  return least(k, of);
}

// One of two searches for a number with a given count of keys below it; `rank` of the keys with this prefix must be below it.
struct Search {
  uint64_t prefix;
  int rank;
  bool done;
};

constexpr size_t mask_exact_shared(int64_t capacity) {
  return room<int64_t>(kMostSpecial) + room<Search>(2) + room<int>(2 * kBins) + room<int>(32) + room<uint64_t>(capacity);
}

// Narrows both searches by 8 bits at a time, over key(0..slots); kNoKey is not counted, all others are distinct.
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
    const int* mine = bins + q * kBins + lane * 8;  // one warp per search, 8 bins per lane
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
  if (threadIdx.x == 0) check_sequence(p, sequence);
  const int64_t begin = most<int64_t>(p.cu_seqlens[sequence], 0), end = least<int64_t>(p.cu_seqlens[sequence + 1], p.tokens);
  if (begin >= end) return;
  Shared shared;
  int64_t* special = shared.take<int64_t>(kMostSpecial);
  Search* searches = shared.take<Search>(2);
  int* bins = shared.take<int>(2 * kBins);
  int* scratch = shared.take<int>(32);
  uint64_t* keys = shared.take<uint64_t>(p.capacity);
  int32_t* table = reinterpret_cast<int32_t*>(keys);  // of unit ids, twice as many slots, -1 if empty
  const int64_t length = end - begin, stride = static_cast<int64_t>(blockDim.x) * kGroup<Id>;
  const int64_t start = begin / kGroup<Id> * kGroup<Id> + threadIdx.x * kGroup<Id>;
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
  for (int64_t from = start; from < end; from += stride) {
    Group<Id> group;
    group.load(p, from, begin, end);
    group.judge(p, special, from, begin, end);
#pragma unroll
    for (int k = 0; k < kGroup<Id>; ++k) {
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
      } else if (!kept) {  // until it is written, role marks the first token of each unit
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

  for (int64_t from = start; from < end; from += stride) {
    Group<Id> group;
    group.load(p, from, begin, end);
    group.judge(p, special, from, begin, end);
    Id view1[kGroup<Id>], view2[kGroup<Id>];
    uint8_t role[kGroup<Id>];
#pragma unroll
    for (int k = 0; k < kGroup<Id>; ++k) {
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
