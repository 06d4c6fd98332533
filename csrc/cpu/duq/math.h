// The element-wise formulas of DuQ and of its activations, and the conversions of 16-bit types. Included once per
// instruction set by the files of loops (see for_each_isa.h), hence no include guard. Everything is branch-free so that a
// loop over it is vectorised; a comparison with NaN is false, so the selects below let NaN through.

namespace PROFIT_ISA {

// A register of floats. The formulas below take it, a float or a double for V.
typedef float Vec __attribute__((vector_size(PROFIT_LANES * sizeof(float)), aligned(alignof(float)), may_alias));

PROFIT_INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
PROFIT_INLINE void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }

// Half a register of floats as one of doubles.
typedef float HalfVec __attribute__((vector_size(PROFIT_LANES / 2 * sizeof(float)), aligned(alignof(float)), may_alias));
typedef double DoubleVec __attribute__((vector_size(PROFIT_LANES / 2 * sizeof(double)), aligned(alignof(double)), may_alias));

PROFIT_INLINE DoubleVec load_double(const float* p) {
  return __builtin_convertvector(*reinterpret_cast<const HalfVec*>(p), DoubleVec);
}

// v in every lane.
template <typename V, typename T>
PROFIT_INLINE V splat(T v) {
  if constexpr (std::is_arithmetic_v<V>) {
    return static_cast<V>(v);
  } else {
    return static_cast<float>(v) - V{};
  }
}

// Round half to even for |v| < 2^22 (float) or 2^51 (double): codes are below 256. The addition pushes the fraction out
// of the mantissa under the current rounding mode, which vectorises on SSE2 too, where there is no rounding instruction.
template <typename V>
PROFIT_INLINE V round_half_even(V v) {
  const V magic = splat<V>(std::is_same_v<V, double> ? 6755399441055744.0 : 12582912.0);
  return (v + magic) - magic;
}

// The larger and the smaller of v and a limit; a NaN in v stays. (The instructions return their second operand there; from the
// comparison written out, compilers make two instructions for a register.)
template <typename V>
PROFIT_INLINE V at_least(V v, V low) {
  return v < low ? low : v;
}
template <typename V>
PROFIT_INLINE V at_most(V v, V high) {
  return v > high ? high : v;
}
#if PROFIT_LANES == 16
PROFIT_INLINE Vec at_least(Vec v, Vec low) { return (Vec)_mm512_max_ps((__m512)low, (__m512)v); }
PROFIT_INLINE Vec at_most(Vec v, Vec high) { return (Vec)_mm512_min_ps((__m512)high, (__m512)v); }
#elif PROFIT_LANES == 8
PROFIT_INLINE Vec at_least(Vec v, Vec low) { return (Vec)_mm256_max_ps((__m256)low, (__m256)v); }
PROFIT_INLINE Vec at_most(Vec v, Vec high) { return (Vec)_mm256_min_ps((__m256)high, (__m256)v); }
#elif defined(__SSE2__)
PROFIT_INLINE Vec at_least(Vec v, Vec low) { return (Vec)_mm_max_ps((__m128)low, (__m128)v); }
PROFIT_INLINE Vec at_most(Vec v, Vec high) { return (Vec)_mm_min_ps((__m128)high, (__m128)v); }
#endif

template <typename V>
PROFIT_INLINE V clamp(V v, V low, V high) {
  return at_most(at_least(v, low), high);
}

#if PROFIT_LANES == 16
PROFIT_INLINE Vec fused_multiply_add(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif PROFIT_LANES == 8
PROFIT_INLINE Vec fused_multiply_add(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#endif

// v / b, correctly rounded, with `inverse` = 1 / b correctly rounded: the product v * inverse is at most one unit off the
// quotient, its remainder is exact in a fused multiply-add, and adding remainder * inverse rounds to the true quotient
// (Markstein, IBM J. Res. Dev. 34, 1990). Several times faster than a division. v finite, b and v / b far from overflow
// and underflow.
PROFIT_INLINE Vec divide(Vec v, Vec b, Vec inverse) {
#if PROFIT_LANES == 4
  (void)inverse;
  return v / b;
#else
  const Vec quotient = v * inverse;
  return fused_multiply_add(fused_multiply_add(-b, quotient, v), inverse, quotient);
#endif
}

// v / 3 and v / 6, correctly rounded without a division. The constant is kept in two parts whose fused products with any float
// round to the true quotient (Brisebarre and Muller, IEEE Trans. Computers 57, 2008; checked for every mantissa). Both parts are
// positive: infinities stay.
template <typename V>
PROFIT_INLINE V third(V v) {
  return v / splat<V>(3);
}
template <typename V>
PROFIT_INLINE V sixth(V v) {
  return v / splat<V>(6);
}
#if PROFIT_LANES > 4
PROFIT_INLINE Vec third(Vec v) {
  return fused_multiply_add(v, splat<Vec>(0x1.555554p-2f), v * splat<Vec>(0x1.555556p-26f));
}
PROFIT_INLINE Vec sixth(Vec v) {
  return fused_multiply_add(v, splat<Vec>(0x1.555554p-3f), v * splat<Vec>(0x1.555556p-27f));
}
#endif

// max(x, -3) * clip(x + 3, 0, 6). The max changes nothing but -inf, whose product with 0 would be NaN.
template <typename V>
PROFIT_INLINE V hardswish_times_six(V x) {
  const V three = splat<V>(3), above = at_least(x, -three);
  return above * at_most(above + three, splat<V>(6));
}

template <Activation act, typename V>
PROFIT_INLINE V activate(V x) {
  const V zero = splat<V>(0);
  if constexpr (act == Activation::relu) {
    return at_least(x, zero);
  } else if constexpr (act == Activation::relu6) {
    return clamp(x, zero, splat<V>(6));
  } else if constexpr (act == Activation::hardswish) {
    return sixth(hardswish_times_six(x));
  } else {
    return x;
  }
}

template <Activation act, typename V>
PROFIT_INLINE V activate_grad(V x) {
  const V zero = splat<V>(0), one = splat<V>(1);
  if constexpr (act == Activation::relu) {
    return x > zero ? one : zero;
  } else if constexpr (act == Activation::relu6) {
    // & and not &&: a branch would keep the loop scalar.
    return (x > zero) & (x < splat<V>(6)) ? one : zero;
  } else if constexpr (act == Activation::hardswish) {
    const V three = splat<V>(3);
    const V slope = x < three ? third(x) + splat<V>(0.5) : one;  // 1 for NaN, whose gradient is 0 already
    return x <= -three ? zero : slope;
  } else {
    return one;
  }
}

// A quantizer spread over registers. With PROFIT_LANES of 4 it divides and serves any A; otherwise see is_ordinary.
struct VecQuantizer {
  Vec A, inverse, d, lo, low, s, step, ratio;
  PROFIT_INLINE explicit VecQuantizer(const Quantizer<float>& k)
      : A(splat<Vec>(k.A)),
        inverse(splat<Vec>(k.inverse)),
        d(splat<Vec>(k.d)),
        lo(splat<Vec>(k.lo)),
        low(splat<Vec>(k.low)),
        s(splat<Vec>(k.s)),
        step(splat<Vec>(k.step)),
        ratio(splat<Vec>(k.ratio)) {}

  // u = clip((act(x) - d) / A, lo, 1), with the clip in front of the division, where it costs no infinity.
  template <Activation act>
  PROFIT_INLINE Vec clipped(Vec x) const {
    return divide(clamp(activate<act>(x) - d, low, A), A, inverse);
  }
  PROFIT_INLINE Vec code(Vec u) const { return round_half_even(u * s); }
  PROFIT_INLINE Vec value(Vec code) const { return code * step + d; }
  // C / A inside the clip, else 0: a factor, so that a NaN in the upstream gradient stays one.
  PROFIT_INLINE Vec slope(Vec u) const { return (u > lo) & (u < splat<Vec>(1)) ? ratio : Vec{}; }
};

// The 4 x 4 floats of which `rows` holds the rows, transposed, each new row `stride` behind the last.
PROFIT_INLINE void transpose4(const float* const* rows, float* to, int64_t stride) {
#if defined(__SSE2__)
  __m128 a = _mm_loadu_ps(rows[0]), b = _mm_loadu_ps(rows[1]), c = _mm_loadu_ps(rows[2]), d = _mm_loadu_ps(rows[3]);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a);
  _mm_storeu_ps(to + stride, b);
  _mm_storeu_ps(to + 2 * stride, c);
  _mm_storeu_ps(to + 3 * stride, d);
#else
  for (int64_t i = 0; i < 4; ++i) {
    for (int64_t j = 0; j < 4; ++j) {
      to[j * stride + i] = rows[i][j];
    }
  }
#endif
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
