// The inner loops of a block's input side, over tiles whose lanes have their channels' constants beside them. Included once
// per instruction set by norm/kernels.cpp, hence no include guard.
#include "../duq/math.h"

namespace profit::cpu::PROFIT_ISA {
namespace {

// duq(act(v)), or act(v) alone, of v = alpha * x + shift.
template <Activation act, bool quantized>
PROFIT_TARGET void input(
    const float* x, float* y, Tile tile, const LaneFront& front, const Quantizer<float>& quantizer) {
  const VecQuantizer k(quantizer);
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int64_t i = 0; i < tile.lanes; i += PROFIT_LANES) {
      const int64_t n = std::min<int64_t>(PROFIT_LANES, tile.lanes - i), at = row * tile.lanes + i;
      const Vec v = load_some(x + at, n) * load(front.alpha + i) + load(front.shift + i);
      store_some(y + at, quantized_act<act, quantized>(v, k), n);
    }
  }
}

#if PROFIT_LANES == 16  // byte products need these registers (isa.h)
typedef int32_t IntVec __attribute__((vector_size(PROFIT_LANES * sizeof(int32_t))));
typedef uint8_t ByteVec __attribute__((vector_size(PROFIT_LANES), aligned(1), may_alias));

// The codes of duq(act(v)), from 0 to 255 by adding `zero`. False where one is NaN: its byte means nothing.
template <Activation act>
PROFIT_TARGET bool codes(
    const float* x, uint8_t* y, Tile tile, const LaneFront& front, const Quantizer<float>& quantizer, float zero) {
  const VecQuantizer k(quantizer);
  const Vec bias = splat<Vec>(zero);
  Vec nothing = {};  // a NaN is seen in the sum of zeros
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int64_t i = 0; i < tile.lanes; i += PROFIT_LANES) {
      const int64_t n = std::min<int64_t>(PROFIT_LANES, tile.lanes - i), at = row * tile.lanes + i;
      const Vec v = load_some(x + at, n) * load(front.alpha + i) + load(front.shift + i);
      const Vec code = k.code(k.clipped<act>(v));
      nothing += code - code;
      const ByteVec bytes = __builtin_convertvector(__builtin_convertvector(code + bias, IntVec), ByteVec);
      std::memcpy(y + at, &bytes, n);
    }
  }
  bool all = true;
  for (int64_t j = 0; j < PROFIT_LANES; ++j) {
    all &= nothing[j] == 0;
  }
  return all;
}
#endif

// gx = alpha * dL/dv from g, the gradient of the result; both may be one. Adds to the sums of dL/dv, of dL/dv * (x - mean), and of
// the terms of -dL/dA and of s * dL/dC.
template <Activation act, bool quantized>
PROFIT_TARGET void input_backward(
    const float* g, float* gx, const float* x, Tile tile, const LaneFront& front, const Quantizer<float>& quantizer,
    const LaneSums& sums) {
  const VecQuantizer k(quantizer);
  for (int64_t i = 0; i < tile.lanes; i += PROFIT_LANES) {
    const int64_t n = std::min<int64_t>(PROFIT_LANES, tile.lanes - i);
    const Vec alpha = load(front.alpha + i), shift = load(front.shift + i), mean = load(front.mean + i);
    Vec of_g = load(sums.g + i), of_gx = load(sums.gx + i), of_a = load(sums.a + i), of_c = load(sums.c + i);
    for (int64_t at = i; at < tile.size(); at += tile.lanes) {
      // Columns of a tile are no stream that the processor would see: the next tile's are asked for.
      __builtin_prefetch(x + at + tile.size());
      __builtin_prefetch(g + at + tile.size());
      const Vec from = load_some(x + at, n);
      const Vec v = from * alpha + shift;
      const Vec gv = quantized_act_grad<act, quantized>(
          load_some(g + at, n), k.clipped<act>(v), activate_grad<act>(v), k, of_a, of_c);
      of_g += gv;
      of_gx += gv * (from - mean);
      store_some(gx + at, gv * alpha, n);
    }
    store(sums.g + i, of_g);
    store(sums.gx + i, of_gx);
    store(sums.a + i, of_a);
    store(sums.c + i, of_c);
  }
}

// What the statistics of the batch add to g = alpha * dL/dv.
PROFIT_TARGET inline void finish(
    float* g, const float* x, Tile tile, const float* slope, const float* mean, const float* constant) {
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int64_t i = 0; i < tile.lanes; i += PROFIT_LANES) {
      const int64_t n = std::min<int64_t>(PROFIT_LANES, tile.lanes - i), at = row * tile.lanes + i;
      const Vec centred = load_some(x + at, n) - load(mean + i);
      store_some(g + at, load_some(g + at, n) + load(slope + i) * centred + load(constant + i), n);
    }
  }
}

// Adds x and its square to sums in double.
PROFIT_TARGET inline void moments(const float* x, Tile tile, double* sum, double* square) {
  constexpr int64_t kHalf = PROFIT_LANES / 2;
  for (int64_t i = 0; i < tile.lanes; i += PROFIT_LANES) {
    const int64_t n = std::min<int64_t>(PROFIT_LANES, tile.lanes - i);
    DoubleVec first[2], second[2];
#pragma GCC unroll 2
    for (int64_t h = 0; h < 2; ++h) {
      first[h] = *reinterpret_cast<DoubleVec*>(sum + i + h * kHalf);
      second[h] = *reinterpret_cast<DoubleVec*>(square + i + h * kHalf);
    }
    for (int64_t at = i; at < tile.size(); at += tile.lanes) {
      const float* from = x + at;
      float some[PROFIT_LANES] = {};
      if (n < PROFIT_LANES) {
        std::copy_n(from, n, some);
        from = some;
      }
      __builtin_prefetch(x + at + tile.size());
#pragma GCC unroll 2
      for (int64_t h = 0; h < 2; ++h) {
        const DoubleVec v = load_double(from + h * kHalf);
        first[h] += v;
        second[h] += v * v;
      }
    }
#pragma GCC unroll 2
    for (int64_t h = 0; h < 2; ++h) {
      *reinterpret_cast<DoubleVec*>(sum + i + h * kHalf) = first[h];
      *reinterpret_cast<DoubleVec*>(square + i + h * kHalf) = second[h];
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

template <Activation act, bool quantized>
void use(BlockKernels& kernels) {
  kernels.input = input<act, quantized>;
  kernels.input_backward = input_backward<act, quantized>;
#if PROFIT_LANES == 16
  kernels.codes = codes<act>;
#endif
}

template <bool quantized>
void use_activation(BlockKernels& kernels, Activation activation) {
  switch (activation) {
    case Activation::relu:
      use<Activation::relu, quantized>(kernels);
      break;
    case Activation::relu6:
      use<Activation::relu6, quantized>(kernels);
      break;
    case Activation::hardswish:
      use<Activation::hardswish, quantized>(kernels);
      break;
    case Activation::none:
      use<Activation::none, quantized>(kernels);
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

}  // namespace
}  // namespace profit::cpu::PROFIT_ISA
