// info_nce as a problem of contrast.cuh. Definition: cmlm_fast/ops/info_nce.py. cross: z1 against z2, and z2 against z1 if
// symmetric; nt_xent and labels: [z1; z2] against itself. It runs on the kernels of contrast_tiles.cuh (up to kTiledRows
// sequences: one launch forward, one backward) and contrast_rows.cuh (above that).
#pragma once

#include "cuda/contrast.cuh"

namespace cmlm {

template <class T>
struct InfoNce : Contrast<T> {
  using M = math_t<T>;
  const int64_t* labels;  // [batch] or null
  int64_t batch;

  struct All {};

  __device__ __forceinline__ bool valid(int64_t) const { return true; }
  __device__ __forceinline__ bool single_positive() const { return labels == nullptr; }
  __device__ __forceinline__ int64_t partner(int, int64_t r) const {  // the row of the other side that is r's positive, or -1
    return labels != nullptr ? -1 : !this->self ? r : r < batch ? r + batch : r - batch;
  }
  static constexpr bool kEqualMarksArePositive = true;  // equal labels make a positive
  static constexpr bool kTwoSided = true;  // whether rows of both sides may be anchors, or a side may face itself
  __host__ __device__ __forceinline__ bool marked() const { return labels != nullptr; }
  __device__ __forceinline__ int64_t mark(int, int64_t r) const { return labels[r < batch ? r : r - batch]; }

  __device__ __forceinline__ void check(int, int64_t) const {}
  __device__ __forceinline__ void check_temperature() const {
    cmlm::check_temperature(*this->temperature, "cmlm_fast::info_nce: expected temperature to be finite and > 0");
  }
  __device__ __forceinline__ Facts<M> facts(int, int64_t r) const {
    Facts<M> facts{};
    if (labels != nullptr) facts.token = labels[r < batch ? r : r - batch];
    return facts;
  }
  __device__ __forceinline__ bool positive(const Facts<M>& a, const Facts<M>& b, int64_t i, int64_t j) const {
    return labels == nullptr ? j == partner(0, i) : a.token == b.token && i != j;
  }
  __device__ __forceinline__ bool negative(const Facts<M>&, const Facts<M>&, int64_t i, int64_t j) const {
    return (!this->self || i != j) && (labels != nullptr || j != partner(0, i));
  }
  // A score counts in its row's loss and in its column's.
  __device__ __forceinline__ M weight(int, const Facts<M>& row, const Facts<M>& column, int64_t r, int64_t c, M score) const {
    return part(*this, row, column, r, c, score) + part(*this, column, row, c, r, score);
  }

  __device__ __forceinline__ All reach(const Facts<M>*, int64_t) const { return {}; }
  __device__ __forceinline__ void keep_reach(int64_t, All) const {}
  __device__ __forceinline__ bool touches(All, int64_t, int64_t) const { return true; }
  __device__ __forceinline__ bool wants(int, int64_t, int64_t) const { return true; }
};

}  // namespace cmlm
