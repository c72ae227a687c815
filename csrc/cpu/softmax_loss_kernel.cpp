// Cross entropy of rows and its gradient with respect to the logits, CPU. Definition: cmlm_fast/ops/softmax_loss.py.
//
// Work:   one row at a time: highest logit; exponentials into scratch, and their sum; grad_logits from scratch.
// Memory: logits are read once from memory and once from cache, grad_logits written once; scratch of one row stays in cache.
// Accumulation: float32 (float64 for float64), 32 partial sums. Determinism: one thread per row, one order.
#include "cpu/softmax_loss.h"

#include <cmath>

namespace cmlm::CMLM_ISA {

template <class T>
void softmax_loss(const SoftmaxLossArgs<T>& args, int64_t begin, int64_t end, math_t<T>* __restrict scratch) {
  using M = math_t<T>;
  const int64_t width = args.width, whole = width / kLanes * kLanes;
  for (int64_t i = begin; i < end; ++i) {
    const T* __restrict x = args.logits + i * width;
    T* __restrict grad_logits = args.grad_logits + i * width;
    const int64_t target = args.target[i];
    if (target < 0) {
      args.losses[i] = 0;
      for (int64_t j = 0; j < width; ++j) grad_logits[j] = narrow<T>(M(0));
      continue;
    }
    M highest[kLanes], sums[kLanes] = {};
    for (M& lane : highest) lane = -std::numeric_limits<M>::infinity();
    for (int64_t j = 0; j < whole; j += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) highest[lane] = max(highest[lane], M(widen(x[j + lane])));
    for (int64_t j = whole; j < width; ++j) highest[0] = max(highest[0], M(widen(x[j])));
    for (M lane : highest) highest[0] = max(highest[0], lane);
    const M top = highest[0];
    for (int64_t j = 0; j < whole; j += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const M e = exp(widen(x[j + lane]) - top);
        scratch[j + lane] = e;
        sums[lane] += e;
      }
    for (int64_t j = whole; j < width; ++j) sums[0] += scratch[j] = exp(widen(x[j]) - top);
    M sum = 0;
    for (M lane : sums) sum += lane;
    args.losses[i] = std::log(sum) + (top - widen(x[target]));  // not top + log: that rounds at the magnitude of a logit
    const M inverse = 1 / sum;
    for (int64_t j = 0; j < width; ++j) grad_logits[j] = narrow<T>(scratch[j] * inverse);
    grad_logits[target] = narrow<T>(scratch[target] * inverse - 1);
  }
}

#define CMLM_INSTANTIATE(T) template void softmax_loss(const SoftmaxLossArgs<T>&, int64_t, int64_t, math_t<T>*);

CMLM_INSTANTIATE(float)
CMLM_INSTANTIATE(double)
CMLM_INSTANTIATE(BFloat16)
CMLM_INSTANTIATE(Half)

}  // namespace cmlm::CMLM_ISA
