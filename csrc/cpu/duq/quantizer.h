// A quantizer's numbers, and the activation in front of it. No torch in here: kernels include it.
#pragma once

#include <cmath>
#include <cstdint>

namespace profit::cpu {

enum class Activation : int64_t { none = 0, relu = 1, relu6 = 2, hardswish = 3 };

// The largest code; the lowest is 0, or its negative for a signed quantizer.
constexpr int64_t levels(int64_t bits, bool is_signed) { return (int64_t{1} << (is_signed ? bits - 1 : bits)) - 1; }

// Whether a product with the inverse may stand for the division by v: that needs room above and below.
template <typename T>
bool is_ordinary(T v) {
  return T(0x1p-60) < v && v < T(0x1p60);
}

// A, C: clipping interval and output scale; d: offset; lo: lower end of the clip; s: the largest code.
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
        s(static_cast<T>(levels(bits, is_signed))),
        step(C / s),
        ratio(C / A) {}

  bool is_ordinary() const { return cpu::is_ordinary(A); }
};

// As torch.nn.functional.softplus of a double: the identity above 20. Through double, so that every backend has the same bits,
// which decide the codes. At least 2^-100, in every backend: by an interval of 0 a quotient would be NaN.
inline float softplus(float v) {
  const float value = v > 20.0f ? v : static_cast<float>(std::log1p(std::exp(static_cast<double>(v))));
  return value < 0x1p-100f ? 0x1p-100f : value;  // a NaN stays
}

}  // namespace profit::cpu
