// One library for every x86-64 machine: a kernel is compiled once per instruction set, and the best version that the machine
// supports is called. A kernel `f` lives in three places:
//
//   csrc/cpu/<op>.h           CMLM_DECLARE_KERNEL(void, f, (const Args& args, int64_t begin, int64_t end))
//   csrc/cpu/<op>_kernel.cpp  namespace cmlm::CMLM_ISA { void f(const Args& args, int64_t begin, int64_t end) { ... } }
//   csrc/cpu/<op>.cpp         CMLM_KERNEL(f)(args, begin, end)
//
// CMLM_ISA is baseline, avx2 (+FMA, F16C, BMI) or avx512 (F, BW, DQ, VL); CMLM_ISA_avx512 and so on are defined for #ifdef.
// The environment variable CMLM_FAST_ISA forces one, for tests. Other processors have baseline only.
#pragma once

namespace cmlm {

enum class Isa { baseline, avx2, avx512 };

// The instruction set in use, chosen at the first call. Throws if CMLM_FAST_ISA names one that this machine lacks.
Isa isa();
const char* isa_name(Isa isa);

#if defined(__x86_64__)
#define CMLM_DECLARE_KERNEL(result, name, parameters) \
  namespace baseline {                                \
  result name parameters;                             \
  }                                                   \
  namespace avx2 {                                    \
  result name parameters;                             \
  }                                                   \
  namespace avx512 {                                  \
  result name parameters;                             \
  }
#define CMLM_KERNEL(name) \
  (::cmlm::isa() == ::cmlm::Isa::avx512 ? &avx512::name : ::cmlm::isa() == ::cmlm::Isa::avx2 ? &avx2::name : &baseline::name)
#else
#define CMLM_DECLARE_KERNEL(result, name, parameters) \
  namespace baseline {                                \
  result name parameters;                             \
  }
#define CMLM_KERNEL(name) (&baseline::name)
#endif

}  // namespace cmlm
