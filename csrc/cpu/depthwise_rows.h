// Rows of a tensor on their way into and out of the depthwise convolution: loading, activation and quantization, the
// gradient of both, storing. Included once per instruction set by depthwise_loops.h, hence no include guard.
//
// In the kernels a row lies as [group of 16 channels][column][16]; see Lanes in depthwise_kernels.h.

namespace PROFIT_ISA {

// What stands in front of the activation, per channel: nothing here; a kernel that folds a BatchNorm in puts its scale and
// shift in place of it.
struct NoFront {
  PROFIT_INLINE Vec operator()(Vec x, int64_t /*lane*/) const { return x; }
};

// q = duq(act(x)), or act(x) alone.
template <Activation act, bool quantized, typename Front>
PROFIT_INLINE void quantize_row_(
    ConstLanes x, Lanes q, int64_t columns, int64_t groups, const Quantizer<float>& quantizer, const Front& front) {
  const VecQuantizer k(quantizer);
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t m = 0; m < groups; ++m) {
      const float* from = x.at(m, i);
      float* to = q.at(m, i);
      __builtin_prefetch(from + x.ahead);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kGroup; j += PROFIT_LANES) {
        const Vec v = front(load(from + j), m * kGroup + j);
        if constexpr (quantized) {
          store(to + j, k.value(k.code(k.clipped<act>(v))));
        } else {
          store(to + j, activate<act>(v));
        }
      }
    }
  }
}

// Also keeps what the gradient needs: u, the clipped (h - d) / A, and the slope act'(x).
template <Activation act, bool quantized, typename Front>
PROFIT_INLINE void quantize_row_keeping_(
    ConstLanes x, Lanes q, float* u, float* slope, int64_t columns, int64_t groups, const Quantizer<float>& quantizer,
    const Front& front) {
  const VecQuantizer k(quantizer);
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t m = 0; m < groups; ++m) {
      const float* from = x.at(m, i);
      float* to = q.at(m, i);
      const int64_t kept = (m * columns + i) * kGroup;
      __builtin_prefetch(from + x.ahead);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kGroup; j += PROFIT_LANES) {
        const Vec v = front(load(from + j), m * kGroup + j);
        if constexpr (quantized) {
          const Vec clipped = k.clipped<act>(v);
          store(u + kept + j, clipped);
          store(to + j, k.value(k.code(clipped)));
        } else {
          store(to + j, activate<act>(v));
        }
        if constexpr (act != Activation::none) {
          const Vec grad = activate_grad<act>(v);
          store(slope + kept + j, v == v ? grad : Vec{});
        }
      }
    }
  }
}

// gq, the gradient of the quantized row, becomes that of the row. Adds to sums[2][lane] the terms of -dL/dA and of s * dL/dC, by
// way of float32 sums over the row in row_sums[2][lane].
template <Activation act, bool quantized>
PROFIT_INLINE void finish_row_(
    ConstLanes gq, const float* u, const float* slope, Lanes gx, int64_t columns, int64_t groups,
    const Quantizer<float>& quantizer, float* row_sums, double* sums) {
  const VecQuantizer k(quantizer);
  const int64_t lanes = groups * kGroup;
  if constexpr (quantized) {
    std::fill_n(row_sums, 2 * lanes, 0.0f);
  }
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t m = 0; m < groups; ++m) {
      const float* from = gq.at(m, i);
      float* to = gx.at(m, i);
      float* sum_a = row_sums + m * kGroup;
      float* sum_c = sum_a + lanes;
      const int64_t kept = (m * columns + i) * kGroup;
      __builtin_prefetch(to + gx.ahead, 1);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kGroup; j += PROFIT_LANES) {
        const Vec g = load(from + j);
        Vec gh = g;
        if constexpr (quantized) {
          const Vec v = load(u + kept + j);
          gh = g * k.slope(v);
          store(sum_a + j, load(sum_a + j) + gh * v);
          store(sum_c + j, load(sum_c + j) + g * k.code(v));
        }
        if constexpr (act != Activation::none) {
          gh *= load(slope + kept + j);
        }
        store(to + j, gh);
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
    ConstLanes x, Lanes q, int64_t columns, int64_t groups, const Quantizer<float>& k) {
  quantize_row_<act, quantized>(x, q, columns, groups, k, NoFront{});
}

template <Activation act, bool quantized>
PROFIT_TARGET void quantize_row_keeping(
    ConstLanes x, Lanes q, float* u, float* slope, int64_t columns, int64_t groups, const Quantizer<float>& k) {
  quantize_row_keeping_<act, quantized>(x, q, u, slope, columns, groups, k, NoFront{});
}

template <Activation act, bool quantized>
PROFIT_TARGET void finish_row(
    ConstLanes gq, const float* u, const float* slope, Lanes gx, int64_t columns, int64_t groups, const Quantizer<float>& k,
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
      __builtin_prefetch(pixel + strides.row);
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
