// The vector width, in bytes, of the instruction set that a file is compiled for.
#pragma once

#include <cstdint>

#ifndef CMLM_ISA
#define CMLM_ISA baseline
#endif

namespace cmlm::CMLM_ISA {

#if defined(CMLM_ISA_avx512)
constexpr int64_t kBytes = 64;
#elif defined(CMLM_ISA_avx2)
constexpr int64_t kBytes = 32;
#else
constexpr int64_t kBytes = 16;
#endif

}  // namespace cmlm::CMLM_ISA
