// The raw parameters a and c of a quantizer: their values, and their gradients.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace profit::cpu {

using torch::stable::Tensor;

inline double sigmoid(double v) { return 1.0 / (1.0 + std::exp(-v)); }

template <typename T>
constexpr torch::headeronly::ScalarType scalar_type() {
  return std::is_same_v<T, double> ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;
}

// The values of a raw parameter as T: a whole model may have been moved to bfloat16, parameters of quantizers included.
template <typename T>
std::vector<T> values(const Tensor& raw) {
  Tensor same = raw.scalar_type() == scalar_type<T>() ? raw : torch::stable::to(raw, scalar_type<T>());
  if (!same.is_contiguous()) {
    same = torch::stable::contiguous(same);
  }
  const T* data = static_cast<const T*>(same.const_data_ptr());
  return std::vector<T>(data, data + same.numel());
}

// Gradient of the raw parameter, dL/draw = dL/dsoftplus * sigmoid(raw), from the channel sums; in double that of A or C itself.
// Returned like raw.
template <typename T>
Tensor parameter_grad(const Tensor& raw, const std::vector<double>& per_channel) {
  const std::vector<T> v = values<T>(raw);
  std::vector<double> total(v.size(), 0.0);
  for (size_t i = 0; i < per_channel.size(); ++i) {
    total[v.size() > 1 ? i : 0] += per_channel[i];
  }
  Tensor grad = torch::stable::empty(raw.sizes(), scalar_type<T>());
  T* g = static_cast<T*>(grad.mutable_data_ptr());
  for (size_t i = 0; i < v.size(); ++i) {
    g[i] = static_cast<T>(std::is_same_v<T, double> ? total[i] : total[i] * sigmoid(v[i]));
  }
  return raw.scalar_type() == scalar_type<T>() ? grad : torch::stable::to(grad, raw.scalar_type());
}

}  // namespace profit::cpu
