// The raw parameters a and c of a quantizer: their values, what acts of them, and their gradients.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace profit::cpu {

using torch::stable::Tensor;

// A, C: clipping interval and output scale; d: offset; lo: lower end of the clip; s: number of steps.
// inverse = 1 / A; low = lo * A; step = C / s; ratio = C / A.
template <typename T>
struct Quantizer {
  T A, inverse, d, lo, low, s, step, ratio;

  Quantizer() = default;
  Quantizer(T A, T C, int64_t bits, bool is_signed, double offset)
      : A(A),
        inverse(T(1) / A),
        d(static_cast<T>(offset)),
        lo(is_signed ? T(-1) : T(0)),
        low(lo * A),
        s(static_cast<T>(is_signed ? (int64_t{1} << (bits - 1)) - 1 : (int64_t{1} << bits) - 1)),
        step(C / s),
        ratio(C / A) {}

  // The loops that divide by way of the inverse need room above and below A.
  bool is_ordinary() const { return T(0x1p-60) < A && A < T(0x1p60); }
};

// As torch.nn.functional.softplus of a double: the identity above 20. Through double, so that every backend has the same bits,
// which decide the codes. At least 2^-100, in every backend: by an interval of 0 a quotient would be NaN.
inline float softplus(float v) {
  const float value = v > 20.0f ? v : static_cast<float>(std::log1p(std::exp(static_cast<double>(v))));
  return value < 0x1p-100f ? 0x1p-100f : value;  // a NaN stays
}

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

// A or C. In double they come ready made, where no wider type is left to make their last bits the same (ops/duq/cpp.py).
template <typename T>
std::vector<T> intervals(const Tensor& parameter) {
  std::vector<T> result = values<T>(parameter);
  if constexpr (std::is_same_v<T, float>) {
    std::transform(result.begin(), result.end(), result.begin(), softplus);
  }
  return result;
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
