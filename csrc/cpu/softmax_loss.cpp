// Cross entropy of rows and its gradient, CPU: checks, outputs and threads. The loops are in softmax_loss_kernel.cpp.
#include "cpu/softmax_loss.h"

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/tensors.h"

namespace cmlm {
namespace {

constexpr const char* kOp = "softmax_loss";
constexpr int64_t kIgnore = -100;

std::tuple<Tensor, Tensor> softmax_loss(Tensor logits, Tensor target) {
  isa();  // a wrong CMLM_FAST_ISA is reported here, not from a worker thread
  CMLM_CHECK(kOp, logits.dim() == 2 && logits.size(1) >= 1, "logits", "of shape [N, V], V >= 1", describe(logits));
  logits = torch::stable::contiguous(logits), target = torch::stable::contiguous(target);
  const int64_t rows = logits.size(0), width = logits.size(1);
  check_tensor(kOp, "target", target, ScalarType::Long, {rows});
  const int64_t* columns = target.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows; ++i) {
    const bool good = columns[i] == kIgnore || (columns[i] >= 0 && columns[i] < width);
    CMLM_CHECK(kOp, good, "target", "in [0, V = " + std::to_string(width) + ") or -100", columns[i]);
  }
  const auto dtype = logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor losses = empty(logits, {rows}, dtype);
  Tensor grad_logits = torch::stable::empty_like(logits);
  dispatch_floating(kOp, "logits", logits, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const SoftmaxLossArgs<T> args{static_cast<const T*>(logits.const_data_ptr()), columns,
                                  static_cast<math_t<T>*>(losses.mutable_data_ptr()),
                                  static_cast<T*>(grad_logits.mutable_data_ptr()), width};
    const auto kernel = CMLM_KERNEL(softmax_loss<T>);
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      std::vector<math_t<T>> scratch(width);
      kernel(args, begin, end, scratch.data());
    });
  });
  return {losses, grad_logits};
}

}  // namespace
}  // namespace cmlm

STABLE_TORCH_LIBRARY_IMPL(cmlm_fast, CPU, m) {
  m.impl("softmax_loss", TORCH_BOX(&cmlm::softmax_loss));
}
