// The inner loops of a block's input side, over a run of n elements whose channels' constants stand beside them. Included once
// per instruction set by block_kernels.cpp, hence no include guard.
#include "duq_math.h"

namespace PROFIT_ISA {

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

// duq(act(v)), or act(v) alone, of v = alpha * x + shift. The constants (and the sums below) have room for whole registers.
template <Activation act, bool quantized>
PROFIT_TARGET void input(
    const float* x, float* y, int64_t n, const float* alpha, const float* shift, const Quantizer<float>& quantizer) {
  const VecQuantizer k(quantizer);
  for (int64_t i = 0; i < n; i += PROFIT_LANES) {
    const int64_t m = std::min<int64_t>(PROFIT_LANES, n - i);
    const Vec v = load_some(x + i, m) * load(alpha + i) + load(shift + i);
    if constexpr (quantized) {
      store_some(y + i, k.value(k.code(k.clipped<act>(v))), m);
    } else {
      store_some(y + i, activate<act>(v), m);
    }
  }
}

// g, the gradient of the result, becomes alpha times that of v. Adds to the sums of the latter and of it times x - mean, and to the terms of -dL/dA and of
// s * dL/dC.
template <Activation act, bool quantized>
PROFIT_TARGET void input_backward(
    float* g, const float* x, int64_t n, const float* alpha, const float* shift, const float* mean,
    const Quantizer<float>& quantizer, const LaneSums& sums) {
  const VecQuantizer k(quantizer);
  for (int64_t i = 0; i < n; i += PROFIT_LANES) {
    const int64_t m = std::min<int64_t>(PROFIT_LANES, n - i);
    const Vec from = load_some(x + i, m);
    const Vec v = from * load(alpha + i) + load(shift + i);
    Vec gv = load_some(g + i, m);
    if constexpr (quantized) {
      const Vec u = k.clipped<act>(v);
      store(sums.c + i, load(sums.c + i) + gv * k.code(u));
      gv *= k.slope(u);
      store(sums.a + i, load(sums.a + i) + gv * u);  // a NaN is seen in the sum
    }
    if constexpr (act != Activation::none) {
      const Vec slope = activate_grad<act>(v);
      gv *= v == v ? slope : Vec{};
    }
    store(sums.g + i, load(sums.g + i) + gv);
    store(sums.gx + i, load(sums.gx + i) + gv * (from - load(mean + i)));
    store_some(g + i, gv * load(alpha + i), m);
  }
}

// What the statistics of the batch add to g = alpha * dL/dv.
PROFIT_TARGET inline void finish(
    float* __restrict g, const float* __restrict x, int64_t n, const float* __restrict slope, const float* __restrict mean,
    const float* __restrict constant) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    g[i] += slope[i] * (x[i] - mean[i]) + constant[i];
  }
}

// Adds n elements and their squares to sums in double.
PROFIT_TARGET inline void moments(
    const float* __restrict x, int64_t n, double* __restrict sum, double* __restrict square) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const double v = x[i];
    sum[i] += v;
    square[i] += v * v;
  }
}

template <typename S>
PROFIT_TARGET void widen_any(const void* from, float* to, int64_t n) {
  widen(static_cast<const S*>(from), to, n);
}

template <typename S>
PROFIT_TARGET void narrow_any(const float* from, void* to, int64_t n) {
  narrow(from, static_cast<S*>(to), n);
}

template <bool quantized>
void use_activation(BlockKernels& kernels, Activation activation) {
  switch (activation) {
    case Activation::relu:
      kernels.input = input<Activation::relu, quantized>;
      kernels.input_backward = input_backward<Activation::relu, quantized>;
      break;
    case Activation::relu6:
      kernels.input = input<Activation::relu6, quantized>;
      kernels.input_backward = input_backward<Activation::relu6, quantized>;
      break;
    case Activation::hardswish:
      kernels.input = input<Activation::hardswish, quantized>;
      kernels.input_backward = input_backward<Activation::hardswish, quantized>;
      break;
    case Activation::none:
      kernels.input = input<Activation::none, quantized>;
      kernels.input_backward = input_backward<Activation::none, quantized>;
  }
}

inline BlockKernels kernels(ScalarType type, bool quantized, Activation activation) {
  BlockKernels result;
  if (type == ScalarType::BFloat16) {
    result.widen = widen_any<BFloat16>;
    result.narrow = narrow_any<BFloat16>;
  } else {
    result.widen = widen_any<Half>;
    result.narrow = narrow_any<Half>;
  }
  if (quantized) {
    use_activation<true>(result, activation);
  } else {
    use_activation<false>(result, activation);
  }
  result.finish = finish;
  result.moments = moments;
  return result;
}

}  // namespace PROFIT_ISA
