// info_nce, CUDA: checks, outputs and the choice of kernels. contrast_host.h has the order of launches.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/contrast_host.h"
#include "cuda/info_nce.cuh"

namespace cmlm {
namespace {

constexpr const char* kOp = "info_nce";
constexpr int64_t kTiledRows = 128;  // up to this many sequences, one launch computes the softmax and another the gradient

ContrastResult contrast(const Tensor& z1, const Tensor& z2, const Tensor& temperature, const std::optional<Tensor>& labels,
                        const std::string& scheme, bool symmetric, bool normalize, Reduce reduce,
                        const std::optional<Tensor>& grad_loss, bool z1_grad, bool z2_grad) {
  const ScalarType dtype = z1.scalar_type();
  const Tensor x = take(kOp, "z1", z1, dtype, {-1, -1}, z1);
  const int64_t batch = z1.size(0);
  CMLM_CHECK(kOp, z1.size(1) >= 1, "z1", "of D >= 1", describe(z1));
  CMLM_CHECK(kOp, batch < int64_t{1} << 30, "z1", "of fewer than 2^30 rows", batch);
  const Tensor y = take(kOp, "z2", z2, dtype, {batch, z1.size(1)}, z1);
  const Tensor tau = take(kOp, "temperature", temperature, loss_type(z1), {}, z1);
  CMLM_CHECK(kOp, scheme == "cross" || scheme == "nt_xent", "scheme", "'cross' or 'nt_xent'", "'" + scheme + "'");
  const bool self = labels.has_value() || scheme == "nt_xent", gradient = reduce != Reduce::none;
  CMLM_CHECK(kOp, symmetric || !self, "symmetric", "True unless scheme is 'cross' and labels are not given", "False");
  const auto classes = take(kOp, "labels", labels, ScalarType::Long, {batch}, z1);
  const int64_t rows = self ? 2 * batch : batch;
  const auto weight = take(kOp, "grad_loss", grad_loss, tau.scalar_type(), {rows}, z1);

  return dispatch_numbers(kOp, "z1", x, [&](auto number) {
    using T = decltype(number);
    using M = math_t<T>;
    const Launcher launcher(x);
    InfoNce<T> p{};
    set_sides(p, x, y, self);
    ContrastResult result{};
    set_gradients(p, result, x, y, z1_grad && gradient, z2_grad && gradient);
    result.loss = gradient ? torch::stable::empty_like(tau) : empty(tau, {rows}, tau.scalar_type());
    result.grad_temperature = torch::stable::empty_like(tau);
    if (batch == 0) {
      set_zero(result);
      return result;
    }
    p.symmetric = symmetric;
    p.normalize = normalize;
    p.reduce = reduce;
    p.temperature = pointer<const M>(tau);
    p.row_weight = pointer<M>(weight);
    p.loss = pointer<M>(result.loss);
    p.grad_temperature = pointer<M>(result.grad_temperature);
    p.labels = pointer<int64_t>(classes);
    p.batch = batch;
    ContrastRun<InfoNce<T>> run(launcher, x, p);
    if (goes_by_tiles(batch <= kTiledRows))
      run.by_tiles(gradient, true);
    else
      run.by_rows(gradient);
    return result;
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce(Tensor z1, Tensor z2, Tensor temperature, std::optional<Tensor> labels,
                                                    std::string scheme, bool symmetric, bool normalize, std::string reduction,
                                                    bool z1_grad, bool z2_grad) {
  const Reduce reduce = reduce_of(kOp, reduction);
  const ContrastResult result =
      contrast(z1, z2, temperature, labels, scheme, symmetric, normalize, reduce, std::nullopt, z1_grad, z2_grad);
  return {result.loss, result.grad1, result.grad2, result.grad_temperature};
}

std::tuple<Tensor, Tensor, Tensor> info_nce_backward(Tensor grad_loss, Tensor z1, Tensor z2, Tensor temperature,
                                                     std::optional<Tensor> labels, std::string scheme, bool symmetric,
                                                     bool normalize, bool z1_grad, bool z2_grad) {
  const ContrastResult result =
      contrast(z1, z2, temperature, labels, scheme, symmetric, normalize, Reduce::weighted, grad_loss, z1_grad, z2_grad);
  return {result.grad1, result.grad2, result.grad_temperature};
}

}  // namespace
}  // namespace cmlm

STABLE_TORCH_LIBRARY_IMPL(cmlm_fast, CUDA, m) {
  m.impl("info_nce", TORCH_BOX(&cmlm::info_nce));
  m.impl("info_nce_backward", TORCH_BOX(&cmlm::info_nce_backward));
}
