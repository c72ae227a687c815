// Complementary mask, CPU. Definition: cmlm_fast/ops/complementary_mask.py.
//
// Work:   threads split the tokens (bernoulli anywhere, exact between sequences) -> one vector of tokens at a time, one Philox
//         word in each 64-bit lane. Exact sampling: pass 1 draws, keeping keys and corrupted ids in scratch; a search finds the
//         two keys that separate the roles; pass 2 writes.
// Memory: reads the id once (8 bytes, int32: 4; plus 1 for eligible, 4 for unit_ids), writes both views and the role once
//         (17 or 9 bytes): 25 bytes per token. Exact: another 16 bytes per token of one sequence, held in cache.
// Same bits everywhere: a token's outputs depend only on its position and sequence, never on how the work was split.
#include "cpu/complementary_mask.h"

#include "common/philox.h"
#include "cpu/lanes.h"

namespace cmlm::CMLM_ISA {
namespace {

static_assert(kWidth <= kMaskPad);
constexpr int64_t kNoKey = INT64_MAX;

// Tokens of one sequence from position t on, kWidth of them readable and writable.
template <class Id>
struct Row {
  const Id* ids;
  const uint8_t* eligible;
  const int32_t* units;
  Id *view1, *view2;
  uint8_t* role;
  int64_t t;

  Row at(int64_t i) const {
    return {ids + i, eligible ? eligible + i : nullptr, units ? units + i : nullptr, view1 + i, view2 + i, role + i, t + i};
  }
};

// Calls f(row, i) for each vector of a row of n tokens; the last one, if short, is a copy padded with ineligible tokens.
template <class Id, class F>
inline void for_each_vector(const Row<Id>& row, int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) f(row.at(i), i);
  const int rest = static_cast<int>(n - i);
  if (rest == 0) return;
  Id ids[kWidth] = {}, view1[kWidth], view2[kWidth];
  uint8_t eligible[kWidth] = {}, role[kWidth];
  int32_t units[kWidth] = {};
  const Row<Id> last = row.at(i);
  for (int j = 0; j < kWidth && j < rest; ++j) {
    ids[j] = last.ids[j];
    eligible[j] = last.eligible ? last.eligible[j] : 1;
    units[j] = last.units ? last.units[j] : 0;
  }
  f(Row<Id>{ids, eligible, last.units ? units : nullptr, view1, view2, role, last.t}, i);
  for (int j = 0; j < kWidth && j < rest; ++j) {
    last.view1[j] = view1[j];
    last.view2[j] = view2[j];
    last.role[j] = role[j];
  }
}

constexpr int64_t kNotEligible = int64_t{1} << 33;  // stands in for a 32-bit word: above every threshold

struct Drawn {
  Lanes ids, corrupted;
  Lanes unit, assignment;  // the unit's id and its word w0, or kNotEligible
};

template <class Id>
class Sequence {
 public:
  Sequence(const MaskArgs& args, int64_t sequence)
      : args_(args), philox_(args.step, static_cast<uint64_t>(args.sample_ids ? args.sample_ids[sequence] : sequence), args.seed) {
    for (int lane = 0; lane < kWidth; ++lane) iota_[lane] = lane;
  }

  // Both return what mask_tokens returns.
  bool bernoulli(const Row<Id>& row, int64_t n) {
    for_each_vector(row, n, [&](const Row<Id>& r, int64_t) {
      const Drawn d = draw(r);
      write(r, d.ids, d.corrupted, d.assignment, args_.below_role1, args_.below_role2);
    });
    return ids_within() && !any(bad_unit_);
  }

  bool exact(const Row<Id>& row, int64_t n, int64_t* scratch) {
    const int64_t padded = (n + kWidth - 1) / kWidth * kWidth;
    int64_t *keys = scratch, *corrupted = keys + padded, *distinct_keys = corrupted + padded;
    Lanes eligible = {};
    for_each_vector(row, n, [&](const Row<Id>& r, int64_t i) {
      const Drawn d = draw(r);
      // (w0, unit id) in one signed word, which sorts the same; below kNoKey since unit ids are below 2^31.
      const Lanes key = (d.assignment << 32 | d.unit) ^ INT64_MIN;
      store(keys + i, d.assignment == kNotEligible ? Lanes() + kNoKey : key);
      store(corrupted + i, d.corrupted);
      eligible -= d.assignment != kNotEligible;
    });
    if (any(bad_unit_)) return false;  // keys of bad units have no order
    const int64_t* units = keys;
    int64_t slots = padded, count = 0;
    if (args_.unit_ids) {
      units = distinct_keys;
      count = distinct(keys, n, distinct_keys);
      slots = (count + kWidth - 1) / kWidth * kWidth;
    } else {
      for (int lane = 0; lane < kWidth; ++lane) count += eligible[lane];
    }
    const int64_t k1 = quota(args_.rate, count), k2 = quota(args_.complement_rate, count - k1);
    const int64_t below1 = threshold(units, slots, count, k1), below2 = threshold(units, slots, count, k1 + k2);
    for_each_vector(row, n, [&](const Row<Id>& r, int64_t i) {
      write(r, load(r.ids), load(corrupted + i), load(keys + i), below1, below2);
    });
    return ids_within();
  }

 private:
  inline Drawn draw(const Row<Id>& r) {
    Drawn d;
    d.ids = load(r.ids);
    const Lanes position = iota_ + r.t;
    const auto words = philox_((Words)position);
    d.unit = position;
    d.assignment = (Lanes)(words.w0 & 0xffffffff);
    if (r.units) {
      d.unit = load(r.units);
      d.assignment = (Lanes)(philox_((Words)d.unit).w0 & 0xffffffff);
    }
    // Successive selections, not combined masks: with AVX-512 each is a compare and a masked move.
    for (int run = 0; run < args_.special_runs; ++run) {
      const Words above = (Words)d.ids - static_cast<uint64_t>(args_.special_first[run]);
      d.assignment = above < args_.special_size[run] ? Lanes() + kNotEligible : d.assignment;
    }
    if (r.eligible) d.assignment = load(r.eligible) == 0 ? Lanes() + kNotEligible : d.assignment;
    if (r.units) bad_unit_ |= (d.unit < 0) & (d.assignment != kNotEligible);
    largest_ = (Words)d.ids > largest_ ? (Words)d.ids : largest_;
    const Lanes w1 = (Lanes)(words.w1 & 0xffffffff);
    const Lanes random = (Lanes)(MultiplyLanes{}(words.w2, static_cast<uint32_t>(args_.vocab)) >> 32);
    d.corrupted = w1 < args_.below_random ? random : d.ids;
    d.corrupted = w1 < args_.below_mask ? Lanes() + args_.mask_id : d.corrupted;
    return d;
  }

  bool ids_within() const { return !any((Lanes)(largest_ >= static_cast<uint64_t>(args_.vocab))); }

  // Role 1 where key < below1, role 2 where below1 <= key < below2.
  inline void write(const Row<Id>& r, Lanes ids, Lanes corrupted, Lanes key, int64_t below1, int64_t below2) const {
#if defined(CMLM_ISA_avx512)
    const __mmask8 first = _mm512_cmplt_epi64_mask((__m512i)key, _mm512_set1_epi64(below1));
    const __mmask8 either = _mm512_cmplt_epi64_mask((__m512i)key, _mm512_set1_epi64(below2));
    const Lanes view1 = (Lanes)_mm512_mask_mov_epi64((__m512i)ids, first, (__m512i)corrupted);
    const Lanes view2 = (Lanes)_mm512_mask_mov_epi64((__m512i)ids, either & ~first, (__m512i)corrupted);
    const __m128i role = _mm_mask_set1_epi8(_mm_maskz_set1_epi8(either, 2), first, 1);
#else
    const Lanes view1 = key < below1 ? corrupted : ids;
    const Lanes either = key < below2 ? corrupted : ids, view2 = key < below1 ? ids : either;
    const Lanes masked = key < below2 ? Lanes() + 2 : Lanes(), role = key < below1 ? Lanes() + 1 : masked;
#endif
    if (args_.stream) {
      store_around(r.view1, view1);
      store_around(r.view2, view2);
    } else {
      store(r.view1, view1);
      store(r.view2, view2);
    }
    store(r.role, role);
  }

  static int64_t quota(double rate, int64_t of) {
    int64_t k = static_cast<int64_t>(rate * static_cast<double>(of) + 0.5);
    if (k == 0 && rate > 0) k = 1;
    return k < of ? k : of;
  }

  // The distinct keys among keys[0, n), padded to whole vectors with kNoKey. Their top bits are Philox bits, hence a hash.
  static int64_t distinct(const int64_t* keys, int64_t n, int64_t* out) {
    const int64_t size = mask_table(n);
    int64_t* table = out + n + kMaskPad;
    for (int64_t i = 0; i < size; ++i) table[i] = kNoKey;
    const int shift = 64 - __builtin_ctzll(static_cast<uint64_t>(size));
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t key = keys[i];
      if (key == kNoKey) continue;
      int64_t slot = static_cast<int64_t>(static_cast<uint64_t>(key) >> shift);
      while (table[slot] != kNoKey && table[slot] != key) slot = (slot + 1) & (size - 1);
      if (table[slot] == key) continue;
      table[slot] = key;
      out[count++] = key;
    }
    for (int pad = 0; pad < kWidth; ++pad) out[count + pad] = kNoKey;
    return count;
  }

  // A value with exactly k of `count` distinct keys below it. The keys are uniform, so interpolation converges in a few
  // counting passes; bisection, after a while, guarantees an end.
  static int64_t threshold(const int64_t* keys, int64_t slots, int64_t count, int64_t k) {
    if (k == 0) return INT64_MIN;
    if (k == count) return kNoKey;
    int64_t low = INT64_MIN, high = kNoKey, at_low = 0, at_high = count;
    for (int pass = 0;; ++pass) {
      const uint64_t width = static_cast<uint64_t>(high) - static_cast<uint64_t>(low);
      const double share = pass < 24 ? (k + 0.5 - at_low) / (at_high + 1.0 - at_low) : 0.5;
      uint64_t offset = static_cast<uint64_t>(share * static_cast<double>(width));
      offset = offset < 1 ? 1 : offset > width - 1 ? width - 1 : offset;
      const int64_t middle = static_cast<int64_t>(static_cast<uint64_t>(low) + offset);
      Lanes below = {};
      for (int64_t i = 0; i < slots; i += kWidth) below -= load(keys + i) < middle;
      int64_t at_middle = 0;
      for (int lane = 0; lane < kWidth; ++lane) at_middle += below[lane];
      if (at_middle == k) return middle;
      (at_middle < k ? low : high) = middle;
      (at_middle < k ? at_low : at_high) = at_middle;
    }
  }

  const MaskArgs& args_;
  const Philox<Words, MultiplyLanes> philox_;
  Lanes iota_;
  Lanes bad_unit_ = {};  // -1 where an eligible token's unit id is negative
  Words largest_ = {};   // largest id as unsigned, eligible or not: each id is examined only if this is outside the vocabulary
};

template <class Id>
bool run(const MaskArgs& a, int64_t sequence, int64_t begin, int64_t end, int64_t* scratch) {
  const Row<Id> row{static_cast<const Id*>(a.ids) + begin,
                    a.eligible ? a.eligible + begin : nullptr,
                    a.unit_ids ? a.unit_ids + begin : nullptr,
                    static_cast<Id*>(a.view1) + begin,
                    static_cast<Id*>(a.view2) + begin,
                    a.role + begin,
                    begin - a.cu_seqlens[sequence]};
  Sequence<Id> work(a, sequence);
  return a.exact ? work.exact(row, end - begin, scratch) : work.bernoulli(row, end - begin);
}

}  // namespace

bool mask_tokens(const MaskArgs& args, int64_t sequence, int64_t begin, int64_t end, int64_t* scratch) {
  return args.wide ? run<int64_t>(args, sequence, begin, end, scratch) : run<int32_t>(args, sequence, begin, end, scratch);
}

}  // namespace cmlm::CMLM_ISA
