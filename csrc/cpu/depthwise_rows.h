// Rows of a tensor on their way into and out of the depthwise convolution: loading, activation and quantization, the
// gradient of both, storing. Included once per instruction set by depthwise_loops.h, hence no include guard.
//
// In the kernels a row lies as [group of 16 channels][column][16]; see Lanes in depthwise_kernels.h.

namespace PROFIT_ISA {

// What stands in front of the activation, per channel: nothing here; a kernel that folds a BatchNorm in puts its scale and
// shift in place of it.
struct NoFront {
  PROFIT_INLINE float operator()(float x, int64_t) const { return x; }
};

// act(x) for a finite quotient: what is beyond 1e30 will be clipped to A, which is below 2^60.
template <Activation act>
PROFIT_INLINE float activate_clipped(float x) {
  if constexpr (act == Activation::hardswish) {
    float product = (x < -3.0f ? -3.0f : x) * clamp(x + 3.0f, 0.0f, 6.0f);
    product = product > 1e30f ? 1e30f : product;
    return divide(product, 6.0f, 1.0f / 6.0f);
  } else {
    return activate<float, act>(x);
  }
}

// clip((h - d) / A, lo, 1) with the clip in front of the division, where it costs no infinity.
template <Activation act>
PROFIT_INLINE float scale_and_clip(float x, const Quantizer& k) {
  return divide(clamp(activate_clipped<act>(x) - k.d, k.low, k.A), k.A, k.inverse);
}

template <Activation act, bool quantized, typename Front>
PROFIT_INLINE void quantize_row_(
    ConstLanes x, Lanes q, int64_t columns, int64_t groups, const Quantizer& k, const Front& front) {
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t m = 0; m < groups; ++m) {
      const float* __restrict from = x.at(m, i);
      float* __restrict to = q.at(m, i);
#pragma omp simd
      for (int64_t j = 0; j < kGroup; ++j) {
        const float v = front(from[j], m * kGroup + j);
        if constexpr (quantized) {
          to[j] = round_half_even(scale_and_clip<act>(v, k) * k.s) * k.step + k.d;
        } else {
          to[j] = activate<float, act>(v);
        }
      }
    }
  }
}

// Also keeps what the gradient needs: u, the clipped (h - d) / A, and the slope act'(x).
template <Activation act, bool quantized, typename Front>
PROFIT_INLINE void quantize_row_keeping_(
    ConstLanes x, Lanes q, float* u, float* slope, int64_t columns, int64_t groups, const Quantizer& k,
    const Front& front) {
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t m = 0; m < groups; ++m) {
      const float* __restrict from = x.at(m, i);
      float* __restrict to = q.at(m, i);
      float* __restrict u_ = u + (m * columns + i) * kGroup;
      float* __restrict slope_ = slope + (m * columns + i) * kGroup;
#pragma omp simd
      for (int64_t j = 0; j < kGroup; ++j) {
        const float v = front(from[j], m * kGroup + j);
        if constexpr (quantized) {
          const float clipped = scale_and_clip<act>(v, k);
          u_[j] = clipped;
          to[j] = round_half_even(clipped * k.s) * k.step + k.d;
        } else {
          to[j] = activate<float, act>(v);
        }
        if constexpr (act != Activation::none) {
          const float grad = activate_grad<float, act>(v);
          slope_[j] = v == v ? grad : 0.0f;
        }
      }
    }
  }
}

// gq, the gradient of the quantized row, becomes that of the row. Adds to sums[2][lane] the terms of -dL/dA and of s * dL/dC, by
// way of float32 sums over the row in row_sums[2][lane].
template <Activation act, bool quantized>
PROFIT_INLINE void finish_row_(
    ConstLanes gq, const float* u, const float* slope, Lanes gx, int64_t columns, int64_t groups, const Quantizer& k,
    float* row_sums, double* sums) {
  const int64_t lanes = groups * kGroup;
  if constexpr (quantized) {
    std::fill_n(row_sums, 2 * lanes, 0.0f);
  }
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t m = 0; m < groups; ++m) {
      const float* __restrict g = gq.at(m, i);
      const float* __restrict u_ = u + (m * columns + i) * kGroup;
      const float* __restrict slope_ = slope + (m * columns + i) * kGroup;
      float* __restrict to = gx.at(m, i);
      float* __restrict a_ = row_sums + m * kGroup;
      float* __restrict c_ = row_sums + lanes + m * kGroup;
#pragma omp simd
      for (int64_t j = 0; j < kGroup; ++j) {
        float gh = g[j];
        if constexpr (quantized) {
          const float v = u_[j];
          gh = (v > k.lo) & (v < 1.0f) ? gh * k.ratio : 0.0f;
          a_[j] += gh * v;  // a NaN is seen in the sum
          c_[j] += g[j] * round_half_even(v * k.s);
        }
        to[j] = act == Activation::none ? gh : gh * slope_[j];
      }
    }
  }
  if constexpr (quantized) {
    for (int64_t j = 0; j < 2 * lanes; ++j) {
      sums[j] += row_sums[j];
    }
  }
}

template <Activation act, bool quantized>
PROFIT_TARGET void quantize_row(
    ConstLanes x, Lanes q, int64_t columns, int64_t groups, const Quantizer& k) {
  quantize_row_<act, quantized>(x, q, columns, groups, k, NoFront{});
}

template <Activation act, bool quantized>
PROFIT_TARGET void quantize_row_keeping(
    ConstLanes x, Lanes q, float* u, float* slope, int64_t columns, int64_t groups, const Quantizer& k) {
  quantize_row_keeping_<act, quantized>(x, q, u, slope, columns, groups, k, NoFront{});
}

template <Activation act, bool quantized>
PROFIT_TARGET void finish_row(
    ConstLanes gq, const float* u, const float* slope, Lanes gx, int64_t columns, int64_t groups, const Quantizer& k,
    float* row_sums, double* sums) {
  finish_row_<act, quantized>(gq, u, slope, gx, columns, groups, k, row_sums, sums);
}

// The row at `from` (channels and columns `strides` apart, `channels` of them) into dense groups; missing channels are 0.
// Each input channel is repeated `multiplier` times, once per filter.
template <typename S>
PROFIT_TARGET void load_row(
    const void* from_, Strides strides, float* to, int64_t columns, int64_t channels, int64_t groups,
    int64_t multiplier) {
  const S* from = static_cast<const S*>(from_);
  if (multiplier > 1 || (strides.channel != 1 && channels > 1)) {
    for (int64_t c = 0; c < groups * kGroup; ++c) {
      const S* line = from + (c / multiplier) * strides.channel;
      float* out = to + (c / kGroup) * columns * kGroup + c % kGroup;
      for (int64_t i = 0; i < columns; ++i) {
        out[i * kGroup] = c < channels ? static_cast<float>(line[i * strides.column]) : 0.0f;
      }
    }
    return;
  }
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t m = 0; m < groups; ++m) {
      const S* pixel = from + i * strides.column + m * kGroup;
      float* out = to + (m * columns + i) * kGroup;
      const int64_t n = channels - m * kGroup;
      if (n >= kGroup) {
        widen(pixel, out, kGroup);
      } else {
        std::fill_n(out, kGroup, 0.0f);
        widen(pixel, out, std::max<int64_t>(0, n));
      }
    }
  }
}

// The reverse: dense groups to the row at `to`. The `multiplier` values of one input channel are added up.
template <typename S>
PROFIT_TARGET void store_row(
    const float* from, void* to_, Strides strides, int64_t columns, int64_t channels, int64_t groups,
    int64_t multiplier) {
  S* to = static_cast<S*>(to_);
  if (multiplier > 1 || (strides.channel != 1 && channels > 1)) {
    for (int64_t c = 0; c < channels; c += multiplier) {
      S* line = to + (c / multiplier) * strides.channel;
      for (int64_t i = 0; i < columns; ++i) {
        float sum = 0;
        for (int64_t f = c; f < c + multiplier; ++f) {
          sum += from[((f / kGroup) * columns + i) * kGroup + f % kGroup];
        }
        line[i * strides.column] = static_cast<S>(sum);
      }
    }
    return;
  }
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t m = 0; m * kGroup < channels; ++m) {
      const int64_t n = std::min(kGroup, channels - m * kGroup);
      narrow(from + (m * columns + i) * kGroup, to + i * strides.column + m * kGroup, n);
    }
  }
}

// The row as it would be read back from a tensor of type S: the reference hands the quantized input on in the dtype of x.
template <typename S>
PROFIT_TARGET void round_row(Lanes q, int64_t columns, int64_t groups) {
  if constexpr (!std::is_same_v<S, float>) {
    S narrowed[kGroup];
    for (int64_t i = 0; i < columns; ++i) {
      for (int64_t m = 0; m < groups; ++m) {
        narrow(q.at(m, i), narrowed, kGroup);
        widen(narrowed, q.at(m, i), kGroup);
      }
    }
  }
}

template <Activation act, bool quantized>
void use_rows(RowKernels& kernels) {
  kernels.quantize = quantize_row<act, quantized>;
  kernels.quantize_keeping = quantize_row_keeping<act, quantized>;
  kernels.finish = finish_row<act, quantized>;
}

template <bool quantized>
void use_rows(RowKernels& kernels, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return use_rows<Activation::relu, quantized>(kernels);
    case Activation::relu6:
      return use_rows<Activation::relu6, quantized>(kernels);
    case Activation::hardswish:
      return use_rows<Activation::hardswish, quantized>(kernels);
    case Activation::none:
      return use_rows<Activation::none, quantized>(kernels);
  }
}

template <typename S>
void use_type(RowKernels& kernels) {
  kernels.load = load_row<S>;
  kernels.store = store_row<S>;
  kernels.round = round_row<S>;
}

}  // namespace PROFIT_ISA
