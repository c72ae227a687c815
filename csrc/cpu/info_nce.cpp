// info_nce, CPU: checks and the ops. The order of steps is in info_nce_run.h.
#include "cpu/info_nce.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "common/dispatch.h"
#include "cpu/info_nce_run.h"

namespace cmlm {
namespace {

constexpr const char* kOp = "info_nce";

// The rules of cmlm_fast/ops/info_nce.py, for callers of torch.ops.
template <class M>
InfoNceRequest check(const Tensor& z1, const Tensor& z2, const Tensor& temperature, const std::optional<Tensor>& labels,
              const std::string& scheme, bool symmetric) {
  CMLM_CHECK(kOp, z1.dim() == 2 && z1.size(1) >= 1, "z1", "of shape [rows, D], D >= 1", describe(z1));
  CMLM_CHECK(kOp, z2.dim() == 2 && z2.size(0) == z1.size(0) && z2.size(1) == z1.size(1) && z2.scalar_type() == z1.scalar_type(),
             "z2", "like z1, " + describe(z1), describe(z2));
  check_tensor(kOp, "temperature", temperature, std::is_same_v<M, double> ? ScalarType::Double : ScalarType::Float, {});
  CMLM_CHECK(kOp, scheme == "cross" || scheme == "nt_xent", "scheme", "'cross' or 'nt_xent'", "'" + scheme + "'");
  const bool self = labels.has_value() || scheme == "nt_xent";
  CMLM_CHECK(kOp, symmetric || !self, "symmetric", "True unless scheme is 'cross' and labels are not given", "False");
  if (labels) check_tensor(kOp, "labels", *labels, ScalarType::Long, {z1.size(0)});
  const double tau = *temperature.const_data_ptr<M>();
  CMLM_CHECK(kOp, std::isfinite(tau) && tau > 0, "temperature", "finite and > 0", tau);
  InfoNceRequest request{torch::stable::contiguous(z1), torch::stable::contiguous(z2)};
  request.labels = labels ? labels->const_data_ptr<int64_t>() : nullptr;
  request.temperature = tau;
  request.self = self;
  request.symmetric = symmetric;
  return request;
}

// A tensor of the temperature's dtype.
template <class M>
Tensor numbers(const Tensor& temperature, std::initializer_list<int64_t> sizes, const double* values, int64_t count) {
  Tensor tensor = empty(temperature, sizes, temperature.scalar_type());
  std::copy_n(values, count, static_cast<M*>(tensor.mutable_data_ptr()));
  return tensor;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce(const Tensor& z1, const Tensor& z2, const Tensor& temperature,
                                                    const std::optional<Tensor>& labels, const std::string& scheme, bool symmetric,
                                                    bool normalize, const std::string& reduction, bool z1_grad, bool z2_grad) {
  check_reduction(kOp, reduction);
  return dispatch_floating(kOp, "z1", z1, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using M = math_t<T>;
    InfoNceRequest request = check<M>(z1, z2, temperature, labels, scheme, symmetric);
    const int64_t rows = z1.size(0) * (request.self ? 2 : 1);
    request.normalize = normalize;
    request.gradient = reduction != "none";
    request.weight = reduction == "mean" ? 1.0 / static_cast<double>(std::max<int64_t>(rows, 1)) : 1.0;
    request.z1_grad = z1_grad;
    request.z2_grad = z2_grad;
    const InfoNceResult result = InfoNceRun<T>(request)();
    double sum = 0;
    for (double loss : result.loss) sum += request.weight * loss;
    Tensor loss = request.gradient ? numbers<M>(temperature, {}, &sum, 1) : numbers<M>(temperature, {rows}, result.loss.data(), rows);
    return std::make_tuple(loss, result.grad1, result.grad2, numbers<M>(temperature, {}, &result.grad_temperature, 1));
  });
}

Gradients info_nce_backward(const Tensor& grad_loss, const Tensor& z1, const Tensor& z2, const Tensor& temperature,
                            const std::optional<Tensor>& labels, const std::string& scheme, bool symmetric, bool normalize,
                            bool z1_grad, bool z2_grad) {
  return dispatch_floating(kOp, "z1", z1, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using M = math_t<T>;
    InfoNceRequest request = check<M>(z1, z2, temperature, labels, scheme, symmetric);
    const Tensor row_weight = torch::stable::contiguous(grad_loss);
    check_tensor(kOp, "grad_loss", row_weight, temperature.scalar_type(), {z1.size(0) * (request.self ? 2 : 1)});
    request.normalize = normalize;
    request.gradient = true;
    request.row_weight = row_weight.const_data_ptr();
    request.z1_grad = z1_grad;
    request.z2_grad = z2_grad;
    const InfoNceResult result = InfoNceRun<T>(request)();
    return std::make_tuple(result.grad1, result.grad2, numbers<M>(temperature, {}, &result.grad_temperature, 1));
  });
}

}  // namespace
}  // namespace cmlm

STABLE_TORCH_LIBRARY_IMPL(cmlm_fast, CPU, m) {
  m.impl("info_nce", TORCH_BOX(&cmlm::info_nce));
  m.impl("info_nce_backward", TORCH_BOX(&cmlm::info_nce_backward));
}
