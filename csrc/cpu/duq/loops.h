// The hot loops of DuQ. Included once per instruction set by duq/kernels.cpp, hence no include guard.
#include "math.h"

namespace profit::cpu::PROFIT_ISA {
namespace {

// Elements after which float32 sums are added to those in double, and the size of the buffers of 16-bit types, which stay
// in the first-level cache.
constexpr int64_t kStretch = 512;
// Sums run in this many lanes whatever the width of a register, so that they have the same bits at every instruction set.
constexpr int64_t kLanes = 16;

// y = C * round(u * s) / s + d, or the code round(u * s) alone.
template <Activation act, bool code_alone>
PROFIT_INLINE void forward_stretch(
    const float* __restrict x, float* __restrict y, int64_t n, const Quantizer<float>& quantizer) {
  const VecQuantizer k(quantizer);
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + PROFIT_LANES <= n; i += PROFIT_LANES) {
    const Vec code = k.code(k.clipped<act>(load(x + i)));
    store(y + i, code_alone ? code : k.value(code));
  }
  if (i < n) {
    float in[PROFIT_LANES] = {}, out[PROFIT_LANES];
    std::copy_n(x + i, n - i, in);
    const Vec code = k.code(k.clipped<act>(load(in)));
    store(out, code_alone ? code : k.value(code));
    std::copy_n(out, n - i, y + i);
  }
}

template <Activation act, bool code_alone>
PROFIT_INLINE void forward_stretch(const double* x, double* y, int64_t n, const Quantizer<double>& quantizer) {
  const DoubleQuantizer k{quantizer};
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const double code = k.code(k.clipped<act>(x[i]));
    y[i] = code_alone ? code : k.value(code);
  }
}

struct LaneSums {
  double a[kLanes] = {}, c[kLanes] = {};
  PROFIT_INLINE void add_to(Sums& sums) const {
    for (int64_t j = 0; j < kLanes; ++j) {
      sums.a += a[j];
      sums.c += c[j];
    }
  }
};

// dL/dx; adds the terms of -dL/dA and of s * dL/dC.
template <Activation act, typename V, typename K>
PROFIT_INLINE V backward_one(V g, V x, const K& k, V& sum_a, V& sum_c) {
  return quantized_act_grad<act, true>(g, k.template clipped<act>(x), activate_grad<act>(x), k, sum_a, sum_c);
}

// Up to kStretch elements.
template <Activation act>
PROFIT_INLINE void backward_stretch(
    const float* __restrict grad, const float* __restrict x, float* __restrict gx, int64_t n,
    const Quantizer<float>& quantizer, LaneSums& sums) {
  constexpr int64_t kRegisters = kLanes / PROFIT_LANES;
  const VecQuantizer k(quantizer);
  Vec sum_a[kRegisters] = {}, sum_c[kRegisters] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRegisters; ++r) {
      const int64_t at = i + r * PROFIT_LANES;
      store(gx + at, backward_one<act>(load(grad + at), load(x + at), k, sum_a[r], sum_c[r]));
    }
  }
  if (i < n) {
    float g[kLanes] = {}, in[kLanes] = {}, out[kLanes];
    std::copy_n(grad + i, n - i, g);
    std::copy_n(x + i, n - i, in);
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRegisters; ++r) {
      const int64_t at = r * PROFIT_LANES;
      store(out + at, backward_one<act>(load(g + at), load(in + at), k, sum_a[r], sum_c[r]));
    }
    std::copy_n(out, n - i, gx + i);
  }
  float a[kLanes], c[kLanes];
#pragma GCC unroll 4
  for (int64_t r = 0; r < kRegisters; ++r) {
    store(a + r * PROFIT_LANES, sum_a[r]);
    store(c + r * PROFIT_LANES, sum_c[r]);
  }
  for (int64_t j = 0; j < kLanes; ++j) {
    sums.a[j] += a[j];
    sums.c[j] += c[j];
  }
}

template <Activation act>
PROFIT_INLINE void backward_stretch(
    const double* grad, const double* x, double* gx, int64_t n, const Quantizer<double>& quantizer, LaneSums& sums) {
  const DoubleQuantizer k{quantizer};
  for (int64_t i = 0; i < n; ++i) {
    gx[i] = backward_one<act>(grad[i], x[i], k, sums.a[i % kLanes], sums.c[i % kLanes]);
  }
}

template <typename S, typename T, Activation act>
PROFIT_TARGET void forward(const void* x_, void* y_, int64_t n, const Quantizer<T>& k) {
  const S* x = static_cast<const S*>(x_);
  S* y = static_cast<S*>(y_);
  if constexpr (std::is_same_v<S, T>) {
    forward_stretch<act, false>(x, y, n, k);
  } else {
    T in[kStretch], out[kStretch];
    for (int64_t i = 0; i < n; i += kStretch) {
      const int64_t m = std::min(kStretch, n - i);
      widen(x + i, in, m);
      forward_stretch<act, false>(in, out, m, k);
      narrow(out, y + i, m);
    }
  }
}

template <typename S, typename T, Activation act>
PROFIT_TARGET void backward(
    const void* grad_, const void* x_, void* gx_, int64_t n, const Quantizer<T>& k, Sums& sums) {
  const S* grad = static_cast<const S*>(grad_);
  const S* x = static_cast<const S*>(x_);
  S* gx = static_cast<S*>(gx_);
  LaneSums lanes;
  for (int64_t i = 0; i < n; i += kStretch) {
    const int64_t m = std::min(kStretch, n - i);
    if constexpr (std::is_same_v<S, T>) {
      backward_stretch<act>(grad + i, x + i, gx + i, m, k, lanes);
    } else {
      T g[kStretch], in[kStretch], out[kStretch];
      widen(grad + i, g, m);
      widen(x + i, in, m);
      backward_stretch<act>(g, in, out, m, k, lanes);
      narrow(out, gx + i, m);
    }
  }
  lanes.add_to(sums);
}

// The integer codes; true if one of the inputs has none.
template <typename S, typename T, Activation act>
PROFIT_TARGET bool codes(const void* x_, void* codes_, int64_t n, const Quantizer<T>& k) {
  const S* x = static_cast<const S*>(x_);
  int8_t* to = static_cast<int8_t*>(codes_);
  T in[kStretch], out[kStretch];
  bool nan = false;
  for (int64_t i = 0; i < n; i += kStretch) {
    const int64_t m = std::min(kStretch, n - i);
    const T* from = in;
    if constexpr (std::is_same_v<S, T>) {
      from = x + i;
    } else {
      widen(x + i, in, m);
    }
    forward_stretch<act, true>(from, out, m, k);
    for (int64_t j = 0; j < m; ++j) {
      nan |= out[j] != out[j];
      // By way of int32: uint8 codes have the same bits as the int8 they wrap to.
      to[i + j] = static_cast<int8_t>(static_cast<int32_t>(out[j] == out[j] ? out[j] : T(0)));
    }
  }
  return nan;
}

template <typename S, typename T, Activation act>
Loops<T> loops_of() {
  return {forward<S, T, act>, backward<S, T, act>, codes<S, T, act>};
}

template <typename S, typename T>
Loops<T> loops(Activation activation) {
  switch (activation) {
    case Activation::relu:
      return loops_of<S, T, Activation::relu>();
    case Activation::relu6:
      return loops_of<S, T, Activation::relu6>();
    case Activation::hardswish:
      return loops_of<S, T, Activation::hardswish>();
    case Activation::none:
      break;
  }
  return loops_of<S, T, Activation::none>();
}

}  // namespace
}  // namespace profit::cpu::PROFIT_ISA
