// Registers of floats: loading and storing, limits, division, and the conversions of 16-bit types. Included once per instruction
// set by the files of loops (see for_each_isa.h), hence no include guard. All is branch-free, so that a loop over it is vectorised;
// a comparison with NaN is false, so the selects below let NaN through.

namespace profit::cpu::PROFIT_ISA {
namespace {

// A register of floats. Functions with a V take it, a float or a double.
typedef float Vec __attribute__((vector_size(PROFIT_LANES * sizeof(float)), aligned(alignof(float)), may_alias));

PROFIT_INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
PROFIT_INLINE void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }

// n elements of a register, at most PROFIT_LANES; the others are 0.
PROFIT_INLINE Vec load_some(const float* p, int64_t n) {
  if (n == PROFIT_LANES) {
    return load(p);
  }
  float some[PROFIT_LANES] = {};
  std::copy_n(p, n, some);
  return load(some);
}

PROFIT_INLINE void store_some(float* p, Vec v, int64_t n) {
  if (n == PROFIT_LANES) {
    return store(p, v);
  }
  float some[PROFIT_LANES];
  store(some, v);
  std::copy_n(some, n, p);
}

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

}  // namespace
}  // namespace profit::cpu::PROFIT_ISA
