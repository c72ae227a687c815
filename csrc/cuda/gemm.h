// Row-major matrix products by torch's cuBLAS, on raw pointers and the current stream. Host code only.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace cmlm {

// A row-major matrix whose rows are `pitch` elements apart.
template <class T>
struct Rows {
  T* data;
  int64_t rows, columns, pitch;
};

// c = a · bᵀ
template <class T, class O>
void multiply_transposed(const Launcher& launcher, Rows<const T> a, Rows<const T> b, Rows<O> c) {
  // cuBLAS is column-major: it sees the row-major c as cᵀ = b · aᵀ, and a and b as already transposed.
  launcher.gemm(true, false, c.columns, c.rows, a.columns, 0, b.data, b.pitch, a.data, a.pitch, c.data, c.pitch);
}

// c = a · b
template <class T, class O>
void multiply(const Launcher& launcher, Rows<const T> a, Rows<const T> b, Rows<O> c) {
  launcher.gemm(false, false, c.columns, c.rows, a.columns, 0, b.data, b.pitch, a.data, a.pitch, c.data, c.pitch);
}

// c (+)= aᵀ · b
template <class T, class O>
void add_transposed(const Launcher& launcher, Rows<const T> a, Rows<const T> b, bool fresh, Rows<O> c) {
  launcher.gemm(false, true, c.columns, c.rows, a.rows, fresh ? 0 : 1, b.data, b.pitch, a.data, a.pitch, c.data, c.pitch);
}

}  // namespace cmlm
