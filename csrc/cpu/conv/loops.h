// The inner loops of the depthwise convolution. Included once per instruction set by conv/kernels.cpp, hence no include
// guard. Sums run over the taps and then over the columns in one order whatever the width of a register: the same bits at every
// instruction set. No fused multiply-add: memory sets the pace here, and it gains nothing.
#include "../duq/math.h"
#include "row_loops.h"

namespace profit::cpu::PROFIT_ISA {
namespace {

// T columns of an output row: acc = bias + sum over the taps of weight * input. K: kernel width with dilation 1, or 0.
template <int K, int S, int T>
PROFIT_INLINE void forward_tile(
    const float* const* rows, int64_t at, const float* weight, int64_t tap_stride, Vec bias, float* out,
    int64_t out_column, int64_t ahead, const Taps& taps) {
  const int64_t kw = K > 0 ? K : taps.kw, stride = S > 0 ? S : taps.stride, dilation = K > 0 ? 1 : taps.dilation;
  Vec acc[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    acc[t] = bias;
  }
  for (int64_t y = 0; y < taps.kh; ++y) {
    const float* q = rows[y] + at;
#pragma GCC unroll 8
    for (int64_t x = 0; x < kw; ++x) {
      const Vec w = load(weight + (y * kw + x) * tap_stride);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        acc[t] += load(q + (t * stride + x * dilation) * kGroup) * w;
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    __builtin_prefetch(out + t * out_column + ahead, 1);
    store(out + t * out_column, acc[t]);
  }
}

// One output row. rows: the kh input rows; row_group: between their groups. weight: [tap][lane], `lanes` of them.
template <int K, int S>
PROFIT_TARGET void forward_row(
    const float* const* rows, int64_t row_group, const float* weight, int64_t lanes, const float* bias, Lanes out,
    int64_t columns, int64_t groups, const Taps& taps) {
  const int64_t step = S > 0 ? S : taps.stride;
  for (int64_t m = 0; m < groups; ++m) {
    for (int64_t l = 0; l < kGroup; l += PROFIT_LANES) {
      const float* w = weight + m * kGroup + l;
      const Vec b = load(bias + m * kGroup + l);
      const int64_t at = m * row_group + l;
      float* to = out.at(m, 0) + l;
      int64_t i = 0;
      for (; i + 8 <= columns; i += 8) {
        forward_tile<K, S, 8>(rows, at + i * step * kGroup, w, lanes, b, to + i * out.column, out.column, out.ahead, taps);
      }
      for (; i + 4 <= columns; i += 4) {
        forward_tile<K, S, 4>(rows, at + i * step * kGroup, w, lanes, b, to + i * out.column, out.column, out.ahead, taps);
      }
      for (; i < columns; ++i) {
        forward_tile<K, S, 1>(rows, at + i * step * kGroup, w, lanes, b, to + i * out.column, out.column, out.ahead, taps);
      }
    }
  }
}

// T columns of an output row's gradient g against one input row: gq += g * w, gw += g * q.
template <int K, int S, int T, bool weight_grad>
PROFIT_INLINE void backward_tile(const float* g, const float* q, float* gq, const Vec (&w)[K], Vec (&gw)[K]) {
  constexpr int kSpan = (T - 1) * S + K;
  Vec acc[kSpan];
#pragma GCC unroll 16
  for (int i = 0; i < kSpan; ++i) {
    acc[i] = load(gq + i * kGroup);
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const Vec v = load(g + t * kGroup);
#pragma GCC unroll 8
    for (int x = 0; x < K; ++x) {
      acc[t * S + x] += v * w[x];
      if constexpr (weight_grad) {
        gw[x] += v * load(q + (t * S + x) * kGroup);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kSpan; ++i) {
    store(gq + i * kGroup, acc[i]);
  }
}

// One output row's gradient against one input row, for the kw taps of one row of the kernel. g: [group][columns][16]; q and
// gq: [group][row_group / 16 columns][16]; weight and gw: [tap][lane], `lanes` of them.
template <int K, int S, bool weight_grad>
PROFIT_TARGET void backward_row(
    const float* g, const float* q, float* gq, int64_t row_group, const float* weight, float* gw, int64_t lanes,
    int64_t columns, int64_t groups, const Taps& taps) {
  for (int64_t m = 0; m < groups; ++m) {
    for (int64_t l = 0; l < kGroup; l += PROFIT_LANES) {
      const float* w_ = weight + m * kGroup + l;
      float* gw_ = gw + m * kGroup + l;
      const float* g_ = g + m * columns * kGroup + l;
      const float* q_ = q + m * row_group + l;
      float* gq_ = gq + m * row_group + l;
      if constexpr (K > 0) {
        Vec w[K], sum[K];
#pragma GCC unroll 8
        for (int x = 0; x < K; ++x) {
          w[x] = load(w_ + x * lanes);
          sum[x] = Vec{};
        }
        int64_t i = 0;
        for (; i + 4 <= columns; i += 4) {
          backward_tile<K, S, 4, weight_grad>(g_ + i * kGroup, q_ + i * S * kGroup, gq_ + i * S * kGroup, w, sum);
        }
        for (; i < columns; ++i) {
          backward_tile<K, S, 1, weight_grad>(g_ + i * kGroup, q_ + i * S * kGroup, gq_ + i * S * kGroup, w, sum);
        }
#pragma GCC unroll 8
        for (int x = 0; x < K; ++x) {
          store(gw_ + x * lanes, load(gw_ + x * lanes) + sum[x]);
        }
      } else {
        for (int64_t x = 0; x < taps.kw; ++x) {
          const Vec w = load(w_ + x * lanes);
          Vec sum = Vec{};
          for (int64_t i = 0; i < columns; ++i) {
            const Vec v = load(g_ + i * kGroup);
            const int64_t at = (i * taps.stride + x * taps.dilation) * kGroup;
            store(gq_ + at, load(gq_ + at) + v * w);
            if constexpr (weight_grad) {
              sum += v * load(q_ + at);
            }
          }
          store(gw_ + x * lanes, load(gw_ + x * lanes) + sum);
        }
      }
    }
  }
}

// sums[lane] = sum of the row over its columns.
PROFIT_TARGET inline void sum_row(const float* g, float* sums, int64_t columns, int64_t groups) {
  for (int64_t m = 0; m < groups; ++m) {
    for (int64_t l = 0; l < kGroup; l += PROFIT_LANES) {
      Vec sum = Vec{};
      for (int64_t i = 0; i < columns; ++i) {
        sum += load(g + (m * columns + i) * kGroup + l);
      }
      store(sums + m * kGroup + l, sum);
    }
  }
}

template <int K, int S>
void use_taps(RowKernels& kernels, bool weight_grad) {
  kernels.forward = forward_row<K, S>;
  kernels.backward = weight_grad ? backward_row<K, S, true> : backward_row<K, S, false>;
}

template <int K>
void use_width(RowKernels& kernels, int64_t stride, bool weight_grad) {
  return stride == 1 ? use_taps<K, 1>(kernels, weight_grad) : use_taps<K, 2>(kernels, weight_grad);
}

inline RowKernels kernels(ScalarType type, const Wanted& wanted, Activation activation, const Taps& taps) {
  RowKernels result;
  switch (type) {
    case ScalarType::BFloat16:
      use_type<BFloat16>(result);
      break;
    case ScalarType::Half:
      use_type<Half>(result);
      break;
    default:
      use_type<float>(result);
  }
  if (wanted.normed) {
    use_rows<AffineFront>(result, wanted.quantized, activation);
  } else {
    use_rows<NoFront>(result, wanted.quantized, activation);
  }
  result.sum = sum_row;
  use_taps<0, 0>(result, wanted.weight_grad);
  if (taps.dilation == 1 && taps.stride <= 2) {
    switch (taps.kw) {
      case 3:
        use_width<3>(result, taps.stride, wanted.weight_grad);
        break;
      case 5:
        use_width<5>(result, taps.stride, wanted.weight_grad);
        break;
      case 7:
        use_width<7>(result, taps.stride, wanted.weight_grad);
        break;
    }
  }
  return result;
}

}  // namespace
}  // namespace profit::cpu::PROFIT_ISA
