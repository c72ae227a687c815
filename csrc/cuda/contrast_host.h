// The launches of a contrast (contrast.cuh), shared by token_contrastive and info_nce. Host code only.
//
// By tiles: one launch for the softmax, one for the gradient. By rows: chunks of kChunkBytes of scores, but of at least
// kChunkRows rows if the other side's gradient accumulates over them (with 262,144 keys 1 GiB in bfloat16, 3 in float16):
//
//   S = X·Yᵀ   contrast_rows: softmax, and weights in place of S   dX = W·Y   dY += Wᵀ·X          6·N·M·D operations
//
// in one sweep if a row's gradient needs only that row's softmax. If it needs that of all rows (symmetric and self), a first
// sweep computes every softmax, for columns from the same chunks, and a second recomputes the scores: 8·B²·D for the symmetric
// cross, 24·B²·D (6·N²·D, N = 2B) for self.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "cuda/contrast_columns.cuh"
#include "cuda/contrast_gradient.cuh"
#include "cuda/contrast_rows.cuh"
#include "cuda/gemm.h"
#include "cuda/inputs.h"

namespace cmlm {

template <class T>
constexpr ScalarType scalar_type_of() {
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, Bf16>) return ScalarType::BFloat16;
  if constexpr (std::is_same_v<T, Fp16>) return ScalarType::Half;
}

// The dtype of temperature and losses.
inline ScalarType loss_type(const Tensor& rows) {
  return rows.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f(T{}) for the tensor's dtype.
template <class F>
auto dispatch_numbers(const char* op, const char* argument, const Tensor& tensor, F&& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(Bf16{});
    case ScalarType::Half:
      return f(Fp16{});
    case ScalarType::Double:
      return f(double{});
    default:
      fail(op, argument, "float32, bfloat16, float16 or float64", describe(tensor));
  }
}

inline Reduce reduce_of(const char* op, const std::string& reduction) {
  check_reduction(op, reduction);
  return reduction == "none" ? Reduce::none : reduction == "mean" ? Reduce::mean : Reduce::sum;
}

struct ContrastResult {
  Tensor loss, grad1, grad2, grad_temperature;
};

// Runs problem P, whose sides, options and outputs are set, in memory that it allocates.
template <class P>
class ContrastRun {
  using T = typename P::Number;
  using M = typename P::M;

 public:
  ContrastRun(const Launcher& launcher, const Tensor& like, P& problem) : launch_(launcher), like_(like), p_(problem) {
    for (int s = 0; s < (p_.self ? 1 : 2); ++s) {
      const int64_t rows = p_.side[s].rows;
      p_.stats[s].scale = memory<M>(rows + kColumnPad);
      if (s >= anchors()) continue;
      p_.stats[s].reference = memory<M>(rows + kColumnPad);
      p_.stats[s].negative_weight = memory<M>(rows + kColumnPad);
      p_.stats[s].positive_weight = memory<M>(rows + kColumnPad);
    }
    p_.losses = memory<M>(anchors() * p_.side[0].rows);
    p_.tau_terms = memory<M>(anchors() * p_.side[0].rows);
    p_.unit = memory<M>(1);
  }

  // `split`: let several blocks share the columns of a row, so that a small batch also fills the device.
  void by_tiles(bool gradient, bool split) {
    const int64_t tiles[2] = {ceil_div(p_.side[0].rows, kTile), p_.self ? 0 : ceil_div(p_.side[1].rows, kTile)};
    const int64_t forward = tiles[0] + (anchors() == 2 ? tiles[1] : 0), backward = tiles[0] + (wanted(1) ? tiles[1] : 0);
    const int64_t across = p_.self ? tiles[0] : std::min(tiles[0], tiles[1]);
    const auto shares = [&](int64_t blocks) {
      return split ? std::clamp<int64_t>(2 * launch_.multiprocessors() / blocks, 1, across) : 1;
    };
    p_.splits = static_cast<int>(shares(forward));
    p_.partial = memory<M>(p_.splits > 1 ? anchors() * p_.side[0].rows * p_.splits * 5 : 0);
    p_.tickets = memory<unsigned>(forward + 1 + backward);
    p_.gradient_tickets = p_.tickets + forward + 1;
    launch_.clear(p_.tickets, (forward + 1 + backward) * sizeof(unsigned));
    launch_(contrast_forward<P>, dim3(static_cast<unsigned>(forward), p_.splits), kTileThreads, kForwardShared<T>, p_);
    if (!gradient || !(wanted(0) || wanted(1))) return;
    const int64_t row_bytes = p_.side[0].width * sizeof(M), rows = p_.side[0].rows + (wanted(1) ? p_.side[1].rows : 0);
    const int64_t sharing = std::min(shares(backward), std::max<int64_t>(kChunkBytes / (rows * row_bytes), 1));
    for (int s = 0; s < (p_.self ? 1 : 2); ++s) {
      if (!wanted(s)) continue;
      if constexpr (std::is_same_v<T, M>)
        if (!p_.self && sharing == 1) p_.sums[s] = p_.gradient[s][0];
      if (p_.sums[s] == nullptr) p_.sums[s] = memory<M>(sharing * p_.side[s].rows * p_.side[s].width);
    }
    const dim3 grid(static_cast<unsigned>(backward), static_cast<unsigned>(sharing));
    launch_(contrast_gradient<P>, grid, kTileThreads, kGradientShared<T>, p_);
  }

  void by_rows(bool gradient) {
    task_.p = p_;
    prepare();
    launch_(contrast_unit<P>, dim3(1), kTotalThreads, kTotalsShared, task_);
    gradient = gradient && (wanted(0) || wanted(1));
    const bool once = anchors() == 1 && !p_.self;
    sweep(true, once && gradient);
    launch_(contrast_totals<P>, dim3(1), kTotalThreads, kTotalsShared, task_);
    if (gradient && !once) sweep(false, true);
  }

 private:
  int anchors() const { return !p_.self && p_.symmetric ? 2 : 1; }
  bool wanted(int s) const { return p_.gradient[s][0] != nullptr || p_.gradient[s][1] != nullptr; }

  // Small arrays share allocations: an allocation costs the host more than a launch.
  template <class X>
  X* memory(int64_t count) {
    const int64_t bytes = round_up(count * static_cast<int64_t>(sizeof(X)), 256);
    if (bytes > kSharedBytes / 4) {
      tensors_.push_back(empty(like_, {bytes}, ScalarType::Byte));
      return static_cast<X*>(tensors_.back().mutable_data_ptr());
    }
    if (shared_left_ < bytes) {
      tensors_.push_back(empty(like_, {kSharedBytes}, ScalarType::Byte));
      shared_ = static_cast<unsigned char*>(tensors_.back().mutable_data_ptr()), shared_left_ = kSharedBytes;
    }
    X* array = reinterpret_cast<X*>(shared_);
    shared_ += bytes, shared_left_ -= bytes;
    return array;
  }

  // Number of rows in products over a side's rows. cuBLAS is two to three times as slow if the number of 16-bit columns is not
  // a multiple of 8; the side is then copied and padded with rows of zeros, whose scores get weights of 0.
  int64_t padded_rows(int s) const {
    const bool even = sizeof(T) == 2 && sizeof(typename RowTask<P>::Score) == 2 && s == (p_.self ? 0 : 1);
    return even ? round_up(p_.side[s].rows, 8) : p_.side[s].rows;
  }

  void prepare() {
    const bool rescale = std::is_same_v<T, Fp16> && p_.normalize;
    task_.rescale = rescale;
    task_.positives = memory<M>(anchors() * p_.side[0].rows);
    for (int s = 0; s < (p_.self ? 1 : 2); ++s) {
      task_.full_scale[s] = memory<M>(p_.side[s].rows);
      if (p_.marked()) task_.marks[s] = memory<int64_t>(p_.side[s].rows + kColumnPad);
      const int64_t padded = padded_rows(s) * p_.side[s].width, count = p_.side[s].rows * p_.side[s].width;
      if (rescale || p_.self || padded > count) task_.copy[s] = memory<T>(padded);
      if (padded > count) launch_.clear(task_.copy[s] + count, (padded - count) * sizeof(T));
    }
    const int64_t rows = p_.side[0].rows + (p_.self ? 0 : p_.side[1].rows);
    launch_(contrast_prepare<P>, dim3(static_cast<unsigned>(ceil_div(rows, kRowThreads / 32))), kRowThreads, 0, task_);
    for (int s = 0; s < (p_.self ? 1 : 2); ++s) {
      Matrix<T>& side = task_.p.side[s];
      if (task_.copy[s] != nullptr) side.first = task_.copy[s], side.second = task_.copy[s] + side.split * side.width;
    }
  }

  // Over all chunks of side 0: its softmax and that of the other side's anchors, the gradients of both sides, or all of that.
  void sweep(bool softmax, bool weigh) {
    using Score = typename RowTask<P>::Score;
    const int s = 0, o = p_.self ? 0 : 1;
    const Matrix<T> x = task_.p.side[s], y = task_.p.side[o];
    constexpr bool in_place = sizeof(Score) == sizeof(T);
    const int64_t pitch = round_up(y.rows, 8), bytes = pitch * (sizeof(Score) + (in_place ? 0 : sizeof(T)));
    const bool other_gradient = weigh && !p_.self && wanted(o), own_gradient = weigh && wanted(s);
    const int64_t fewest = other_gradient ? kChunkRows : 8;
    const int64_t chunk = std::min(std::max(kChunkBytes / bytes / 8 * 8, fewest), x.rows), chunks = ceil_div(x.rows, chunk);
    if (task_.scores == nullptr || score_capacity_ < chunk * pitch) {
      score_capacity_ = chunk * pitch;
      task_.scores = memory<Score>(chunk * pitch);
      if constexpr (!in_place) task_.weights = memory<T>(chunk * pitch);
    }
    if constexpr (in_place) task_.weights = reinterpret_cast<T*>(task_.scores);
    const Rows<const T> columns{y.first, padded_rows(o), y.width, y.width};
    M* part = own_gradient ? memory<M>(chunk * x.width) : nullptr;
    // The other side's gradient accumulates over chunks: in float, unless one chunk completes it. float16 always needs float,
    // as the sum of a popular row's weights would overflow before `project` scales it.
    M* sums = nullptr;
    if constexpr (std::is_same_v<T, M>)
      sums = other_gradient ? p_.gradient[o][0] : nullptr;
    else if (other_gradient && (chunks > 1 || std::is_same_v<T, Fp16>))
      sums = memory<M>(columns.rows * y.width);
    task_.side = s, task_.pitch = pitch, task_.softmax = softmax, task_.weigh = weigh;
    const bool columns_too = softmax && anchors() == 2;
    const int64_t column_blocks = ceil_div(y.rows, kRowThreads * (16 / static_cast<int64_t>(sizeof(Score))));
    if (columns_too) {
      const int64_t shares = std::clamp<int64_t>(4 * launch_.multiprocessors() / column_blocks, 1, ceil_div(chunk, kRowsPerBlock));
      task_.share_rows = round_up(ceil_div(chunk, shares), kRowsPerBlock);
      task_.parts = memory<M>((ceil_div(chunk, task_.share_rows) + 1) * 3 * y.rows);
    }
    for (int64_t first = 0; first < x.rows; first += chunk) {
      const int64_t count = std::min(chunk, x.rows - first);
      task_.first = first, task_.rows = count;
      const Rows<const T> rows{x.first + first * x.width, count, x.width, x.width};
      multiply_transposed(launch_, rows, columns, Rows<Score>{task_.scores, count, columns.rows, pitch});
      if (columns_too) {  // before the rows' launch may overwrite scores with weights
        task_.shares = static_cast<int>(ceil_div(count, task_.share_rows)), task_.last = first + count == x.rows;
        const dim3 grid(static_cast<unsigned>(column_blocks), static_cast<unsigned>(task_.shares));
        launch_(contrast_columns<P>, grid, kRowThreads, 0, task_);
        launch_(contrast_merge<P>, dim3(static_cast<unsigned>(ceil_div(y.rows, kRowThreads))), kRowThreads, 0, task_);
      }
      launch_(contrast_rows<P>, dim3(static_cast<unsigned>(ceil_div(count, kRowsPerBlock))), kRowThreads, kRowsShared<M>, task_);
      const Rows<const T> weights{task_.weights, count, columns.rows, pitch};
      if (own_gradient) {
        multiply(launch_, weights, columns, Rows<M>{part, count, x.width, x.width});
        project(part, s, first, count);
      }
      if (!other_gradient) continue;
      if (sums != nullptr)
        add_transposed(launch_, weights, rows, first == 0, Rows<M>{sums, columns.rows, y.width, y.width});
      else
        add_transposed(launch_, weights, rows, true, Rows<T>{p_.gradient[o][0], y.rows, y.width, y.width});
    }
    if (!other_gradient) return;
    if (sums != nullptr)
      project(sums, o, 0, y.rows);
    else
      project(p_.gradient[o][0], o, 0, y.rows);
  }

  template <class A>
  void project(const A* sums, int s, int64_t first, int64_t rows) {
    const ProjectTask<P, A> task{task_.p, sums, task_.full_scale[s], first, rows, s};
    launch_(contrast_project<P, A>, dim3(static_cast<unsigned>(ceil_div(rows, kRowThreads / 32))), kRowThreads, 0, task);
  }

  const Launcher& launch_;
  const Tensor& like_;
  P& p_;
  RowTask<P> task_{};
  int64_t score_capacity_ = 0;
  std::vector<Tensor> tensors_;
  unsigned char* shared_ = nullptr;
  int64_t shared_left_ = 0;
};

// Sets the sides of a problem: rows of x and of y, or (self) both as one.
template <class P>
void set_sides(P& p, const Tensor& x, const Tensor& y, bool self) {
  using T = typename P::Number;
  const int64_t width = x.size(1);
  const T *first = pointer<T>(x), *second = pointer<T>(y);
  const bool vector = on_16_bytes(first) && on_16_bytes(second) && width * sizeof(T) % 16 == 0;
  p.self = self;
  p.side[0] = {first, second, x.size(0), x.size(0) + (self ? y.size(0) : 0), width, vector};
  p.side[1] = {second, second, y.size(0), self ? 0 : y.size(0), width, vector};
}

// Allocates the gradients, empty if not wanted, and sets a problem's pointers to them.
template <class P>
void set_gradients(P& p, ContrastResult& result, const Tensor& x, const Tensor& y, bool x_grad, bool y_grad) {
  using T = typename P::Number;
  result.grad1 = x_grad ? torch::stable::empty_like(x) : empty(x, {0}, x.scalar_type());
  result.grad2 = y_grad ? torch::stable::empty_like(y) : empty(y, {0}, y.scalar_type());
  T *first = x_grad ? pointer<T>(result.grad1) : nullptr, *second = y_grad ? pointer<T>(result.grad2) : nullptr;
  p.gradient[0][0] = first;
  p.gradient[p.self ? 0 : 1][p.self ? 1 : 0] = second;
}

inline void set_zero(ContrastResult& result) {
  for (Tensor* tensor : {&result.loss, &result.grad1, &result.grad2, &result.grad_temperature}) torch::stable::zero_(*tensor);
}

}  // namespace cmlm
