// Dropout, CPU: checks, output and threads. The loop is in dropout_kernel.cpp.
#include "cpu/dropout.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "common/check.h"
#include "common/dispatch.h"

namespace cmlm {
namespace {

constexpr const char* kOp = "dropout";

Tensor dropout(Tensor x, double p, int64_t seed) {
  isa();  // a wrong CMLM_FAST_ISA is reported here, not from a worker thread
  CMLM_CHECK(kOp, x.dim() >= 1, "x", "of at least one dimension", describe(x));
  CMLM_CHECK(kOp, p >= 0 && p < 1, "p", "in [0, 1)", p);
  x = torch::stable::contiguous(x);
  Tensor out = torch::stable::empty_like(x);
  const int64_t width = x.size(x.dim() - 1), rows = width ? x.numel() / width : 0;
  dispatch_floating(kOp, "x", x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const DropoutArgs<T> args{static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr()), width,
                              static_cast<math_t<T>>(1 / (1 - p)), static_cast<uint64_t>(seed),
                              static_cast<uint32_t>(std::floor(p * 4294967296.0))};
    const auto kernel = CMLM_KERNEL(dropout<T>);
    torch::stable::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
  return out;
}

}  // namespace
}  // namespace cmlm

STABLE_TORCH_LIBRARY_IMPL(cmlm_fast, CPU, m) {
  m.impl("dropout", TORCH_BOX(&cmlm::dropout));
}
