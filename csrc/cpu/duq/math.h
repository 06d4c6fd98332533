// The element-wise formulas of DuQ and of its activations, for V a register of floats, a float or a double. Included once per
// instruction set by the files of loops (see for_each_isa.h), hence no include guard. Branch-free, as simd/vec.h.
#include "../simd/vec.h"

namespace profit::cpu::PROFIT_ISA {
namespace {

// Round half to even for |v| < 2^22 (float) or 2^51 (double): codes are below 256. The addition pushes the fraction out
// of the mantissa under the current rounding mode, which vectorises on SSE2 too, where there is no rounding instruction.
template <typename V>
PROFIT_INLINE V round_half_even(V v) {
  const V magic = splat<V>(std::is_same_v<V, double> ? 6755399441055744.0 : 12582912.0);
  return (v + magic) - magic;
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

// 0 for a NaN.
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
    const V slope = x < three ? third(x) + splat<V>(0.5) : one;
    return x > -three ? slope : zero;
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

// The same for doubles, one by one.
struct DoubleQuantizer {
  const Quantizer<double>& k;

  template <Activation act>
  PROFIT_INLINE double clipped(double x) const {
    return clamp((activate<act>(x) - k.d) / k.A, k.lo, 1.0);
  }
  PROFIT_INLINE double code(double u) const { return round_half_even(u * k.s); }
  PROFIT_INLINE double value(double code) const { return code * k.step + k.d; }
  PROFIT_INLINE double slope(double u) const { return (u > k.lo) & (u < 1.0) ? k.ratio : 0.0; }
};

// duq(act(v)), or act(v) alone.
template <Activation act, bool quantized, typename V, typename K>
PROFIT_INLINE V quantized_act(V v, const K& k) {
  if constexpr (quantized) {
    return k.value(k.code(k.template clipped<act>(v)));
  } else {
    return activate<act>(v);
  }
}

// dL/dv from the gradient g of quantized_act(v), with u = clipped(v) and slope = act'(v). Adds the terms of -dL/dA and of
// s * dL/dC.
template <Activation act, bool quantized, typename V, typename K>
PROFIT_INLINE V quantized_act_grad(V g, V u, V slope, const K& k, V& sum_a, V& sum_c) {
  if constexpr (quantized) {
    const V inside = g * k.slope(u);
    sum_a += inside * u;  // a NaN is seen in the sum
    sum_c += g * k.code(u);
    g = inside;
  }
  if constexpr (act != Activation::none) {
    g *= slope;
  }
  return g;
}

}  // namespace
}  // namespace profit::cpu::PROFIT_ISA
