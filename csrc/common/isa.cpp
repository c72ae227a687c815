#include "common/isa.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace cmlm {
namespace {

bool machine_has(Isa isa) {
  if (isa == Isa::baseline) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  if (isa == Isa::avx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

Isa choose() {
  const char* wish = std::getenv("CMLM_FAST_ISA");
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::baseline}) {
    const bool wished = wish == nullptr || *wish == '\0' || std::string(wish) == isa_name(isa);
    if (wished && machine_has(isa)) return isa;
  }
  throw std::runtime_error("cmlm_fast: expected CMLM_FAST_ISA to be baseline, avx2 or avx512, and one that this machine has, got " +
                           std::string(wish));
}

std::string isa_op() {
  return isa_name(isa());
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

}  // namespace cmlm

// torch.ops.cmlm_fast._isa() tells Python which instruction set the CPU kernels use.
STABLE_TORCH_LIBRARY_FRAGMENT(cmlm_fast, m) {
  m.def("_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(cmlm_fast, CompositeExplicitAutograd, m) {
  m.impl("_isa", TORCH_BOX(&cmlm::isa_op));
}
