// Attention of packed sequences, CPU: checks, outputs and threads. The loops are in varlen_attention_kernel.cpp.
// (sequence, head) pairs share nothing.
#include "cpu/varlen_attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/tensors.h"
#include "cpu/gemm.h"

namespace cmlm {
namespace {

constexpr const char* kOp = "varlen_attention";

// Makes D contiguous; the other strides may be anything.
Tensor rows_of(const char* name, const Tensor& x, const Tensor& like) {
  const bool fits = x.dim() == 3 && like.dim() == 3 && x.size(0) == like.size(0) && x.size(1) == like.size(1) &&
                    x.size(2) == like.size(2) && x.size(2) >= 1 && x.scalar_type() == like.scalar_type();
  CMLM_CHECK(kOp, fits, name, "of shape [T, H, D], D >= 1, like query, " + describe(like), describe(x));
  return x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

struct Call {
  Tensor query, key, value, cu;
  double scale, dropout;
  int64_t seed, window, sequences, longest;
};

Call check(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens, double scale, double dropout,
           const Tensor& seed, int64_t window) {
  check_tensor(kOp, "seed", seed, ScalarType::Long, {});
  Call call{rows_of("query", query, query), rows_of("key", key, query), rows_of("value", value, query),
            torch::stable::contiguous(cu_seqlens), scale, dropout, *seed.const_data_ptr<int64_t>(), window, 0, 0};
  check_tensor(kOp, "cu_seqlens", call.cu, ScalarType::Int, {-1});
  CMLM_CHECK(kOp, call.cu.numel() >= 1, "cu_seqlens", "int32 of shape [B + 1]", describe(call.cu));
  CMLM_CHECK(kOp, dropout >= 0 && dropout < 1, "dropout", "in [0, 1)", dropout);
  CMLM_CHECK(kOp, window >= 0, "window", ">= 0", window);
  call.sequences = call.cu.numel() - 1;
  call.longest = check_sequences(kOp, call.cu.const_data_ptr<int32_t>(), call.sequences, query.size(0));
  return call;
}

template <class T>
Packed<const T> read(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
}

template <class T>
Packed<T> write(Tensor& x) {
  return {static_cast<T*>(x.mutable_data_ptr()), x.stride(0), x.stride(1)};
}

template <class T>
VarlenArgs<T> arguments(const Call& call, const Tensor& lse) {
  VarlenArgs<T> args{};
  args.query = read<T>(call.query), args.key = read<T>(call.key), args.value = read<T>(call.value);
  args.lse = static_cast<math_t<T>*>(const_cast<void*>(lse.const_data_ptr()));
  args.cu_seqlens = call.cu.const_data_ptr<int32_t>();
  args.tokens = call.query.size(0), args.heads = call.query.size(1), args.width = call.query.size(2);
  args.window = call.window < call.longest ? call.window : 0;  // 0 if it hides nothing: i + window must not overflow
  args.scale = static_cast<math_t<T>>(call.scale);
  args.keep_factor = static_cast<math_t<T>>(1 / (1 - call.dropout));
  args.seed = static_cast<uint64_t>(call.seed);
  args.drop_below = static_cast<uint32_t>(std::floor(call.dropout * 4294967296.0));
  return args;
}

// Calls kernel(args, sequence, head, scratch) for every sequence and head. A thread takes the next sequence when it finishes
// one, because the work of a sequence grows with the square of its length. Its heads, neighbours in memory, stay together.
template <class T, class Kernel>
void run(const Call& call, const VarlenArgs<T>& args, Kernel kernel) {
  const int64_t threads = torch::stable::get_num_threads(), pairs = call.sequences * args.heads;
  const int64_t step = call.sequences >= 4 * threads ? args.heads : 1;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    using M = math_t<T>;
    std::vector<M> memory(varlen_scratch(call.longest, args.width) + 64 / sizeof(M));
    // Aligned to a cache line, as then is every part of it: their sizes are multiples of 32 elements.
    M* scratch = reinterpret_cast<M*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
    for (int64_t k = next.fetch_add(step); k < pairs; k = next.fetch_add(step))
      for (int64_t pair = k; pair < std::min(k + step, pairs); ++pair) kernel(args, pair / args.heads, pair % args.heads, scratch);
  });
}

Tensor rows_like(const Tensor& x) { return empty(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type()); }

std::tuple<Tensor, Tensor> varlen_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, double scale, double dropout,
                                            Tensor seed, int64_t window) {
  isa();  // a wrong CMLM_FAST_ISA is reported here, not from a worker thread
  const Call call = check(query, key, value, cu_seqlens, scale, dropout, seed, window);
  const auto dtype = query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor out = rows_like(query), lse = empty(query, {query.size(1), query.size(0)}, dtype);
  dispatch_floating(kOp, "query", query, [&](auto tag) {
    using T = typename decltype(tag)::type;
    VarlenArgs<T> args = arguments<T>(call, lse);
    args.out = write<T>(out);
    run(call, args, CMLM_KERNEL(varlen_forward<T>));
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value,
                                                             Tensor cu_seqlens, Tensor lse, double scale, double dropout,
                                                             Tensor seed, int64_t window) {
  const Call call = check(query, key, value, cu_seqlens, scale, dropout, seed, window);
  const Tensor grad = rows_of("grad_out", grad_out, query);
  const auto dtype = query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_tensor(kOp, "lse", lse, dtype, {query.size(1), query.size(0)});
  Tensor grad_query = rows_like(query), grad_key = rows_like(key), grad_value = rows_like(value);
  dispatch_floating(kOp, "query", query, [&](auto tag) {
    using T = typename decltype(tag)::type;
    VarlenArgs<T> args = arguments<T>(call, lse);
    args.grad_out = read<T>(grad);
    args.grad_query = write<T>(grad_query), args.grad_key = write<T>(grad_key), args.grad_value = write<T>(grad_value);
    run(call, args, CMLM_KERNEL(varlen_backward<T>));
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace cmlm

STABLE_TORCH_LIBRARY_IMPL(cmlm_fast, CPU, m) {
  m.impl("varlen_attention", TORCH_BOX(&cmlm::varlen_attention));
  m.impl("varlen_attention_backward", TORCH_BOX(&cmlm::varlen_attention_backward));
}
