// The inner loops of a block's input side, over a run of n elements whose channels' constants stand beside them. Included once
// per instruction set by block_kernels.cpp, hence no include guard.
#include "duq_math.h"
#include "quantizer_math.h"

namespace PROFIT_ISA {

template <Activation act, bool quantized>
PROFIT_TARGET void input(
    const float* __restrict x, float* __restrict y, int64_t n, const float* __restrict alpha,
    const float* __restrict shift, const Quantizer& k) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float v = x[i] * alpha[i] + shift[i];
    if constexpr (quantized) {
      y[i] = round_half_even(scale_and_clip<act>(v, k) * k.s) * k.step + k.d;
    } else {
      y[i] = activate<float, act>(v);
    }
  }
}

// g, the gradient of the result, becomes that of v. Adds to the sums of g and of g * (x - mean), and to the terms of -dL/dA and of
// s * dL/dC.
template <Activation act, bool quantized>
PROFIT_TARGET void input_backward(
    float* __restrict g, const float* __restrict x, int64_t n, const float* __restrict alpha,
    const float* __restrict shift, const float* __restrict mean, const Quantizer& k, const LaneSums& sums) {
  float* __restrict of_g = sums.g;
  float* __restrict of_gx = sums.gx;
  float* __restrict of_a = sums.a;
  float* __restrict of_c = sums.c;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float v = x[i] * alpha[i] + shift[i];
    float gv = g[i];
    if constexpr (quantized) {
      const float u = scale_and_clip<act>(v, k);
      of_c[i] += gv * round_half_even(u * k.s);
      gv = (u > k.lo) & (u < 1.0f) ? gv * k.ratio : 0.0f;
      of_a[i] += gv * u;  // a NaN is seen in the sum
    }
    if constexpr (act != Activation::none) {
      const float slope = activate_grad<float, act>(v);
      gv *= v == v ? slope : 0.0f;
    }
    of_g[i] += gv;
    of_gx[i] += gv * (x[i] - mean[i]);
    g[i] = gv;
  }
}

// dL/dx of BatchNorm from dL/dv: scale * g + slope * (x - mean) + constant.
PROFIT_TARGET inline void finish(
    float* __restrict g, const float* __restrict x, int64_t n, const float* __restrict scale,
    const float* __restrict slope, const float* __restrict mean, const float* __restrict constant) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    g[i] = scale[i] * g[i] + slope[i] * (x[i] - mean[i]) + constant[i];
  }
}

// Adds `lines` runs of n elements each, which lie one after the other, to the sums of x and of its square.
PROFIT_TARGET inline void moments(
    const float* __restrict x, int64_t n, int64_t lines, double* __restrict sum, double* __restrict square) {
  int64_t line = 0;
  for (; line + 4 <= lines; line += 4) {
    const float* __restrict p = x + line * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const double a = p[i], b = p[n + i], c = p[2 * n + i], d = p[3 * n + i];
      sum[i] += (a + b) + (c + d);
      square[i] += (a * a + b * b) + (c * c + d * d);
    }
  }
  for (; line < lines; ++line) {
    const float* __restrict p = x + line * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const double a = p[i];
      sum[i] += a;
      square[i] += a * a;
    }
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
