// The element-wise formulas of DuQ and of its activations, and the conversions of 16-bit types. Included once per
// instruction set by the files of loops (see for_each_isa.h), hence no include guard. Everything is branch-free so that a
// loop over it is vectorised; a comparison with NaN is false, so the selects below let NaN through.

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

// v / b, correctly rounded, with `inverse` = 1 / b correctly rounded: the quotient of a product is at most one unit off, its
// remainder is exact in a fused multiply-add, and adding remainder * inverse rounds to the true quotient (Markstein, IBM
// J. Res. Dev. 34, 1990). Several times faster than a division. v finite, b and v / b far from overflow and underflow.
PROFIT_INLINE float divide(float v, float b, float inverse) {
#if PROFIT_HAS_FMA
  const float quotient = v * inverse;
  return __builtin_fmaf(__builtin_fmaf(-b, quotient, v), inverse, quotient);
#else
  (void)inverse;
  return v / b;
#endif
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

PROFIT_TARGET inline void widen(const float* __restrict from, float* __restrict to, int64_t n) {
  std::memcpy(to, from, n * sizeof(float));
}

PROFIT_TARGET inline void narrow(const float* __restrict from, float* __restrict to, int64_t n) {
  std::memcpy(to, from, n * sizeof(float));
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

}  // namespace PROFIT_ISA
