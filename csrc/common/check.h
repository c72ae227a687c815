// The one error pattern, and the checks that host functions make on their tensors. Host code only. Throw before any
// parallel_for: an exception that leaves a worker thread loses its message.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace cmlm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Value>
[[noreturn]] void fail(const char* op, const char* argument, const std::string& rule, const Value& value) {
  std::ostringstream words;
  words << "cmlm_fast::" << op << ": expected " << argument << " to be " << rule << ", got " << value;
  throw std::runtime_error(words.str());  // RuntimeError in Python
}

// rule and value are evaluated only when the condition fails.
#define CMLM_CHECK(op, condition, argument, rule, value)                         \
  do {                                                                           \
    if (!(condition)) [[unlikely]] ::cmlm::fail(op, argument, rule, value);      \
  } while (false)

// "Float [3, 4]", for messages.
inline std::string describe(const Tensor& tensor) {
  std::ostringstream words;
  words << torch::headeronly::toString(tensor.scalar_type()) << " [";
  for (int64_t d = 0; d < tensor.dim(); ++d) words << (d ? ", " : "") << tensor.size(d);
  words << "]";
  return words.str();
}

// Requires a contiguous tensor of this dtype and shape on `device`; size -1 matches any.
inline void check_tensor(const char* op, const char* argument, const Tensor& tensor, ScalarType dtype,
                         std::initializer_list<int64_t> shape,
                         torch::headeronly::DeviceType device = torch::headeronly::DeviceType::CPU) {
  const bool cpu = device == torch::headeronly::DeviceType::CPU;
  bool fits = tensor.scalar_type() == dtype && tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (int64_t size : shape) fits = fits && (size < 0 || tensor.size(d) == size), ++d;
  if (fits && tensor.is_contiguous() && (cpu ? tensor.is_cpu() : tensor.is_cuda())) return;
  std::ostringstream rule;
  rule << "a contiguous " << (cpu ? "CPU" : "CUDA") << " tensor, " << torch::headeronly::toString(dtype) << " [";
  const char* comma = "";
  for (int64_t size : shape) rule << comma << (size < 0 ? std::string("any") : std::to_string(size)), comma = ", ";
  rule << "]";
  fail(op, argument, rule.str(), describe(tensor) + (tensor.is_contiguous() ? "" : ", not contiguous"));
}

}  // namespace cmlm
