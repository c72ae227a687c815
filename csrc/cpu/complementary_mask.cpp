// Complementary mask, CPU: checks, outputs and threads. The loops are in complementary_mask_kernel.cpp.
#include "cpu/complementary_mask.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/mask_check.h"
#include "common/tensors.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace cmlm {
namespace {

constexpr const char* kOp = "complementary_mask";
constexpr int64_t kTokensPerThread = 2048;        // below this, a second thread costs more than it saves
constexpr int64_t kStreamTokens = int64_t{1} << 19;

// Tokenizers give special tokens consecutive ids, in one or two runs, and a run costs the kernel one comparison.
void find_runs(MaskArgs& args, const int64_t* special, int64_t count) {
  std::vector<int64_t> ids(special, special + count);
  std::sort(ids.begin(), ids.end());
  for (int64_t id : ids) {
    const int last = args.special_runs - 1;
    const int64_t next = last < 0 ? 0 : args.special_first[last] + static_cast<int64_t>(args.special_size[last]);
    if (last >= 0 && id < next) continue;  // a duplicate
    if (last >= 0 && id == next) {
      ++args.special_size[last];
    } else {
      args.special_first[args.special_runs] = id;
      args.special_size[args.special_runs++] = 1;
    }
  }
}

bool is_special(const MaskArgs& args, int64_t id) {
  for (int run = 0; run < args.special_runs; ++run)
    if (static_cast<uint64_t>(id) - static_cast<uint64_t>(args.special_first[run]) < args.special_size[run]) return true;
  return false;
}

// Raises for the first eligible token that breaks a rule, if there is one.
template <class Id>
void check_tokens(const MaskArgs& args, const Id* ids, int64_t tokens) {
  for (int64_t i = 0; i < tokens; ++i) {
    if (is_special(args, ids[i]) || (args.eligible && !args.eligible[i])) continue;
    CMLM_CHECK(kOp, ids[i] >= 0 && ids[i] < args.vocab, "input_ids", "in [0, vocab_size = " + std::to_string(args.vocab) + ")", ids[i]);
    CMLM_CHECK(kOp, !args.unit_ids || args.unit_ids[i] >= 0, "unit_ids", ">= 0", args.unit_ids[i]);
  }
}

// Masks tokens [begin, end): the parts of sequences inside or, as exact sampling needs whole ones, those that begin there.
bool mask_range(const MaskArgs& args, int64_t sequences, int64_t begin, int64_t end, int64_t scratch_words) {
  const std::unique_ptr<int64_t[]> scratch(args.exact ? new int64_t[scratch_words] : nullptr);
  const int32_t *cu = args.cu_seqlens, *last = cu + sequences;
  const auto kernel = CMLM_KERNEL(mask_tokens);
  bool good = true;
  if (args.exact) {
    for (const int32_t* at = std::lower_bound(cu, last, begin); at < last && *at < end; ++at)
      if (at[0] < at[1]) good &= kernel(args, at - cu, at[0], at[1], scratch.get());
  } else {
    for (const int32_t* at = std::upper_bound(cu, last, begin) - 1; at < last && *at < end; ++at) {
      const int64_t from = std::max<int64_t>(at[0], begin), to = std::min<int64_t>(at[1], end);
      if (from < to) good &= kernel(args, at - cu, from, to, nullptr);
    }
  }
#if defined(__x86_64__)
  _mm_sfence();  // other threads see non-temporal stores only after it
#endif
  return good;
}

std::tuple<Tensor, Tensor, Tensor> complementary_mask(Tensor ids, Tensor cu, Tensor special, std::optional<Tensor> eligible,
                                                      std::optional<Tensor> units, std::optional<Tensor> samples, int64_t mask_id,
                                                      int64_t vocab, double rate, double complement_rate, bool exact,
                                                      double mask_share, double random_share, int64_t seed, int64_t step) {
  const bool wide = dispatch_ids(kOp, "input_ids", ids, [](auto tag) { return sizeof(typename decltype(tag)::type) == 8; });
  check_tensor(kOp, "input_ids", ids, ids.scalar_type(), {-1});
  check_tensor(kOp, "cu_seqlens", cu, ScalarType::Int, {-1});
  check_tensor(kOp, "special_ids", special, ScalarType::Long, {-1});
  const int64_t tokens = ids.numel(), sequences = cu.numel() - 1;
  CMLM_CHECK(kOp, sequences >= 0, "cu_seqlens", "int32 of shape [B + 1]", describe(cu));
  CMLM_CHECK(kOp, special.numel() <= 16, "special_ids", "int64 of shape [S], S <= 16", describe(special));
  if (eligible) check_tensor(kOp, "eligible", *eligible, ScalarType::Bool, {tokens});
  if (units) check_tensor(kOp, "unit_ids", *units, ScalarType::Int, {tokens});
  if (samples) check_tensor(kOp, "sample_ids", *samples, ScalarType::Long, {sequences});
  const MaskOptions options = mask_options(mask_id, vocab, rate, complement_rate, mask_share, random_share, seed, step);
  const int64_t longest = check_sequences(kOp, cu.const_data_ptr<int32_t>(), sequences, tokens);

  Tensor view1 = torch::stable::empty_like(ids), view2 = torch::stable::empty_like(ids);
  Tensor role = empty(ids, {tokens}, ScalarType::Byte);
  if (tokens == 0) return {view1, view2, role};

  MaskArgs args{};
  static_cast<MaskOptions&>(args) = options;
  args.ids = ids.const_data_ptr();
  args.cu_seqlens = cu.const_data_ptr<int32_t>();
  find_runs(args, special.const_data_ptr<int64_t>(), special.numel());
  args.eligible = eligible ? static_cast<const uint8_t*>(eligible->const_data_ptr()) : nullptr;
  args.unit_ids = units ? units->const_data_ptr<int32_t>() : nullptr;
  args.sample_ids = samples ? samples->const_data_ptr<int64_t>() : nullptr;
  args.view1 = view1.mutable_data_ptr();
  args.view2 = view2.mutable_data_ptr();
  args.role = role.mutable_data_ptr<uint8_t>();
  args.wide = wide;
  args.exact = exact;
  args.stream = tokens >= kStreamTokens;

  const int64_t scratch = 2 * (longest + kMaskPad) + (units ? longest + kMaskPad + mask_table(longest) : 0);
  isa();  // a wrong CMLM_FAST_ISA is reported here, not from a worker thread
  std::atomic<bool> good{true};
  torch::stable::parallel_for(0, tokens, kTokensPerThread, [&](int64_t begin, int64_t end) {
    if (!mask_range(args, sequences, begin, end, scratch)) good.store(false, std::memory_order_relaxed);
  });
  if (!good)
    wide ? check_tokens(args, static_cast<const int64_t*>(args.ids), tokens)
         : check_tokens(args, static_cast<const int32_t*>(args.ids), tokens);
  return {view1, view2, role};
}

}  // namespace
}  // namespace cmlm

STABLE_TORCH_LIBRARY_IMPL(cmlm_fast, CPU, m) {
  m.impl("complementary_mask", TORCH_BOX(&cmlm::complementary_mask));
}
