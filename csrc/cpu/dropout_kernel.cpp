// Dropout, CPU. Definition: cmlm_fast/ops/dropout.py.
//
// Work:   rows [begin, end); 32 elements at a time, with their random words made in registers.
// Memory: each element is read and written once. Determinism: whether one is dropped depends only on its row and column.
#include "cpu/dropout.h"

#include "cpu/keep.h"

namespace cmlm::CMLM_ISA {

template <class T>
void dropout(const DropoutArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Draws draws(0, static_cast<uint64_t>(i), args.seed);
    const T* x = args.x + i * args.width;
    T* out = args.out + i * args.width;
    for (int64_t j = 0; j < args.width; j += 32) {
      math_t<T> keep[32];
      draw_keep(draws, args.below, args.factor, j, j + 32, keep);
      if (j + 32 <= args.width)
        for (int64_t lane = 0; lane < 32; ++lane) out[j + lane] = narrow<T>(widen(x[j + lane]) * keep[lane]);
      else
        for (int64_t lane = 0; j + lane < args.width; ++lane) out[j + lane] = narrow<T>(widen(x[j + lane]) * keep[lane]);
    }
  }
}

#define CMLM_INSTANTIATE(T) template void dropout(const DropoutArgs<T>&, int64_t, int64_t);

CMLM_INSTANTIATE(float)
CMLM_INSTANTIATE(double)
CMLM_INSTANTIATE(BFloat16)
CMLM_INSTANTIATE(Half)

}  // namespace cmlm::CMLM_ISA
