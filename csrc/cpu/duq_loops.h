// The hot loops of DuQ. duq.cpp includes this file once per instruction set, with PROFIT_ISA naming the namespace and
// PROFIT_TARGET the function attribute, hence no include guard. Everything is written branch-free over plain arrays so
// that the compiler vectorises it; a comparison with NaN is false, so the selects below let NaN through.

namespace PROFIT_ISA {

// Round half to even for |v| < 2^22 (float) or 2^51 (double): codes are below 256. The addition pushes the fraction out
// of the mantissa under the current rounding mode, which vectorises on SSE2 too, where there is no rounding instruction.
template <typename T>
PROFIT_INLINE T round_half_even(T v) {
  constexpr T magic = std::is_same_v<T, float> ? T(12582912.0) : T(6755399441055744.0);
  return (v + magic) - magic;
}

template <typename T>
PROFIT_INLINE T clamp(T v, T low, T high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

template <typename T, Activation act>
PROFIT_INLINE T activate(T x) {
  if constexpr (act == Activation::relu) {
    return x < T(0) ? T(0) : x;
  } else if constexpr (act == Activation::relu6) {
    return clamp(x, T(0), T(6));
  } else if constexpr (act == Activation::hardswish) {
    // The first clamp changes nothing but -inf, whose product with 0 would be NaN.
    return (x < T(-3) ? T(-3) : x) * clamp(x + T(3), T(0), T(6)) / T(6);
  } else {
    return x;
  }
}

template <typename T, Activation act>
PROFIT_INLINE T activate_grad(T x) {
  if constexpr (act == Activation::relu) {
    return x > T(0) ? T(1) : T(0);
  } else if constexpr (act == Activation::relu6) {
    // & and not &&: a branch would keep the loop scalar.
    return (x > T(0)) & (x < T(6)) ? T(1) : T(0);
  } else if constexpr (act == Activation::hardswish) {
    const T slope = x < T(3) ? x / T(3) + T(0.5) : T(1);  // 1 for NaN, whose gradient is 0 already
    return x <= T(-3) ? T(0) : slope;
  } else {
    return T(1);
  }
}

template <typename T, Activation act>
PROFIT_TARGET void forward(const T* __restrict x, T* __restrict y, int64_t n, const Constants<T>& k) {
  const T A = k.A, C = k.C, d = k.d, lo = k.lo, s = k.s;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T u = (activate<T, act>(x[i]) - d) / A;
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
    const T u = (activate<T, act>(x[i]) - d) / A;
    const T clipped = clamp(u, lo, T(1));
    const T code = round_half_even(clipped * s);
    const bool inside = (u > lo) & (u < T(1));
    const T gh = inside ? g * ratio : T(0);
    gx[i] = gh * activate_grad<T, act>(x[i]);
    // With the clipped u an infinity outside adds 0, and a NaN is seen in the sum.
    sum_a += static_cast<double>(gh * clipped);
    sum_c += static_cast<double>(g * code);
  }
  sums.a += sum_a;
  sums.c += sum_c;
}

PROFIT_TARGET inline void widen(const BFloat16* __restrict from, float* __restrict to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t v = static_cast<uint32_t>(from[i].x) << 16;
    std::memcpy(&to[i], &v, sizeof(v));
  }
}

// The header-only conversion branches on NaN, which keeps the loop scalar: 3 times slower. Same bits as torch's:
// round half to even on the bit pattern, any NaN becomes 0x7fc0.
PROFIT_TARGET inline void narrow(const float* __restrict from, BFloat16* __restrict to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    uint32_t v;
    std::memcpy(&v, &from[i], sizeof(v));
    const uint32_t rounded = (v + 0x7fffu + ((v >> 16) & 1u)) >> 16;
    to[i].x = static_cast<uint16_t>((v & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}

PROFIT_TARGET inline void widen(const Half* __restrict from, float* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<float>(from[i]);
  }
}

PROFIT_TARGET inline void narrow(const float* __restrict from, Half* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<Half>(from[i]);
  }
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
