// The hot loops of DuQ. duq.cpp includes this file once per instruction set (see for_each_isa.h), hence no include guard.
#include "duq_math.h"

namespace PROFIT_ISA {

template <typename T, Activation act>
PROFIT_TARGET void forward(const T* __restrict x, T* __restrict y, int64_t n, const Constants<T>& k) {
  const T A = k.A, C = k.C, d = k.d, lo = k.lo, s = k.s;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T u = (activate<act>(x[i]) - d) / A;
    const T code = round_half_even(clamp(u, lo, T(1)) * s);
    y[i] = C * (code / s) + d;
  }
}

// Adds the sums over the n elements to `sums`. They run in double whatever T is.
template <typename T, Activation act>
PROFIT_TARGET void backward(
    const T* __restrict grad, const T* __restrict x, T* __restrict gx, int64_t n, const Constants<T>& k, Sums& sums) {
  const T A = k.A, d = k.d, lo = k.lo, s = k.s;
  const T ratio = k.C / k.A;
  double sum_a = 0, sum_c = 0;
#pragma omp simd reduction(+ : sum_a, sum_c)
  for (int64_t i = 0; i < n; ++i) {
    const T g = grad[i];
    const T u = (activate<act>(x[i]) - d) / A;
    const T clipped = clamp(u, lo, T(1));
    const T code = round_half_even(clipped * s);
    const bool inside = (u > lo) & (u < T(1));
    const T gh = g * (inside ? ratio : T(0));  // a NaN in g stays one
    gx[i] = gh * activate_grad<act>(x[i]);
    // With the clipped u an infinity outside adds 0, and a NaN is seen in the sum.
    sum_a += static_cast<double>(gh * clipped);
    sum_c += static_cast<double>(g * code);
  }
  sums.a += sum_a;
  sums.c += sum_c;
}

// 16-bit types pass through a small float buffer that stays in the first-level cache; the loops above then serve all.
constexpr int64_t kBuffer = 512;

template <typename S, typename T, Activation act>
PROFIT_TARGET void forward_any(const void* x_, void* y_, int64_t n, const Constants<T>& k) {
  const S* x = static_cast<const S*>(x_);
  S* y = static_cast<S*>(y_);
  if constexpr (std::is_same_v<S, T>) {
    forward<T, act>(x, y, n, k);
  } else {
    T in[kBuffer], out[kBuffer];
    for (int64_t i = 0; i < n; i += kBuffer) {
      const int64_t m = std::min(kBuffer, n - i);
      widen(x + i, in, m);
      forward<T, act>(in, out, m, k);
      narrow(out, y + i, m);
    }
  }
}

template <typename S, typename T, Activation act>
PROFIT_TARGET void backward_any(
    const void* grad_, const void* x_, void* gx_, int64_t n, const Constants<T>& k, Sums& sums) {
  const S* grad = static_cast<const S*>(grad_);
  const S* x = static_cast<const S*>(x_);
  S* gx = static_cast<S*>(gx_);
  if constexpr (std::is_same_v<S, T>) {
    backward<T, act>(grad, x, gx, n, k, sums);
  } else {
    T g[kBuffer], in[kBuffer], out[kBuffer];
    for (int64_t i = 0; i < n; i += kBuffer) {
      const int64_t m = std::min(kBuffer, n - i);
      widen(grad + i, g, m);
      widen(x + i, in, m);
      backward<T, act>(g, in, out, m, k, sums);
      narrow(out, gx + i, m);
    }
  }
}

template <typename S, typename T>
Loops<T> loops(Activation activation) {
  switch (activation) {
    case Activation::relu:
      return {forward_any<S, T, Activation::relu>, backward_any<S, T, Activation::relu>};
    case Activation::relu6:
      return {forward_any<S, T, Activation::relu6>, backward_any<S, T, Activation::relu6>};
    case Activation::hardswish:
      return {forward_any<S, T, Activation::hardswish>, backward_any<S, T, Activation::hardswish>};
    case Activation::none:
      break;
  }
  return {forward_any<S, T, Activation::none>, backward_any<S, T, Activation::none>};
}

}  // namespace PROFIT_ISA
