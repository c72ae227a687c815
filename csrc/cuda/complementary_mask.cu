// Complementary mask, CUDA: checks, outputs and launch. The kernels are in the two headers.
#include "cuda/complementary_mask.cuh"

#include <tuple>

#include "common/mask_check.h"
#include "cuda/complementary_mask_exact.cuh"
#include "cuda/inputs.h"
#include "cuda/launch.h"

namespace cmlm {
namespace {

constexpr const char* kOp = "complementary_mask";

template <class Id>
void launch(const Launcher& launcher, MaskParams& params, bool exact) {
  if (!exact) {
    const auto blocks = static_cast<unsigned>(ceil_div(params.tokens, kBernoulliTokens));
    launcher(mask_bernoulli<Id>, blocks, kBernoulliThreads, kBernoulliShared, params);
    return;
  }
  // Only the device knows the longest sequence. Room for twice the mean length suits padded and most packed batches and lets
  // many blocks run at a time on each multiprocessor; longer sequences draw their keys again.
  const int64_t mean = ceil_div(params.tokens, params.sequences);
  params.capacity = 512;
  while (params.capacity < 2 * mean && params.capacity < 8192) params.capacity *= 2;
  const unsigned threads = mean <= 256 ? 64 : mean <= 1024 ? 128 : mean <= 4096 ? 256 : 512;
  launcher(mask_exact<Id>, static_cast<unsigned>(params.sequences), threads, mask_exact_shared(params.capacity), params);
}

std::tuple<Tensor, Tensor, Tensor> complementary_mask(Tensor input_ids, Tensor cu_seqlens, Tensor special_ids,
                                                      std::optional<Tensor> eligible, std::optional<Tensor> unit_ids,
                                                      std::optional<Tensor> sample_ids, int64_t mask_id, int64_t vocab, double rate,
                                                      double complement_rate, bool exact, double mask_share, double random_share,
                                                      int64_t seed, int64_t step) {
  const ScalarType dtype = input_ids.scalar_type();
  CMLM_CHECK(kOp, dtype == ScalarType::Long || dtype == ScalarType::Int, "input_ids", "int64 or int32", describe(input_ids));
  const Tensor ids = take(kOp, "input_ids", input_ids, dtype, {-1}, input_ids);
  const Tensor cu = take(kOp, "cu_seqlens", cu_seqlens, ScalarType::Int, {-1}, ids);
  const Tensor special = take(kOp, "special_ids", special_ids, ScalarType::Long, {-1}, ids);
  const int64_t tokens = ids.numel(), sequences = cu.numel() - 1;
  CMLM_CHECK(kOp, sequences >= (tokens > 0 ? 1 : 0), "cu_seqlens", "int32 of shape [B + 1], B >= 1 where there are tokens",
             describe(cu));
  CMLM_CHECK(kOp, special.numel() <= kMostSpecial, "special_ids", "int64 of shape [S], S <= 16", describe(special));
  const auto where = take(kOp, "eligible", eligible, ScalarType::Bool, {tokens}, ids);
  const auto units = take(kOp, "unit_ids", unit_ids, ScalarType::Int, {tokens}, ids);
  const auto samples = take(kOp, "sample_ids", sample_ids, ScalarType::Long, {sequences}, ids);
  const MaskOptions options = mask_options(mask_id, vocab, rate, complement_rate, mask_share, random_share, seed, step);

  const Launcher launcher(ids);
  const Tensor view1 = empty(ids, {tokens}, dtype), view2 = empty(ids, {tokens}, dtype);
  const Tensor role = empty(ids, {tokens}, ScalarType::Byte);
  if (tokens == 0) return {view1, view2, role};

  MaskParams params{};
  static_cast<MaskOptions&>(params) = options;
  params.ids = ids.const_data_ptr();
  params.cu_seqlens = pointer<const int32_t>(cu);
  params.special = pointer<const int64_t>(special);
  params.eligible = pointer<uint8_t>(where);
  params.unit_ids = pointer<int32_t>(units);
  params.sample_ids = pointer<int64_t>(samples);
  params.view1 = view1.mutable_data_ptr();
  params.view2 = view2.mutable_data_ptr();
  params.role = pointer<uint8_t>(role);
  params.tokens = tokens;
  params.sequences = sequences;
  params.special_count = static_cast<int>(special.numel());
  params.vector = on_16_bytes(params.ids) && on_16_bytes(params.eligible) && on_16_bytes(params.unit_ids) &&
                  on_16_bytes(params.view1) && on_16_bytes(params.view2) && on_16_bytes(params.role);
  dtype == ScalarType::Long ? launch<int64_t>(launcher, params, exact) : launch<int32_t>(launcher, params, exact);
  return {view1, view2, role};
}

}  // namespace
}  // namespace cmlm

STABLE_TORCH_LIBRARY_IMPL(cmlm_fast, CUDA, m) {
  m.impl("complementary_mask", TORCH_BOX(&cmlm::complementary_mask));
}
