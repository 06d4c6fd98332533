// Rows of a tensor on their way into and out of the depthwise convolution: loading, activation and quantization, the
// gradient of both, storing. Included once per instruction set by conv/loops.h, hence no include guard.
//
// In the kernels a row lies as [group of 16 channels][column][16]; see Lanes in conv/kernels.h.

namespace profit::cpu::PROFIT_ISA {
namespace {

// What stands in front of the activation: nothing, or a BatchNorm as scale and shift of every lane.
struct NoFront {
  static constexpr bool normed = false;
  PROFIT_INLINE explicit NoFront(const FrontLanes&) {}
  PROFIT_INLINE Vec operator()(Vec x, int64_t /*lane*/) const { return x; }
};

struct AffineFront {
  static constexpr bool normed = true;
  const FrontLanes& lanes;
  PROFIT_INLINE explicit AffineFront(const FrontLanes& lanes) : lanes(lanes) {}
  PROFIT_INLINE Vec operator()(Vec x, int64_t lane) const { return x * load(lanes.alpha + lane) + load(lanes.shift + lane); }
};

// q = duq(act(v)), or act(v) alone, of v = front(x).
template <Activation act, bool quantized, typename Front>
PROFIT_TARGET void quantize_row(
    ConstLanes x, Lanes q, int64_t columns, int64_t groups, const Quantizer<float>& quantizer, const FrontLanes& front_lanes) {
  const Front front(front_lanes);
  const VecQuantizer k(quantizer);
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t m = 0; m < groups; ++m) {
      const float* from = x.at(m, i);
      float* to = q.at(m, i);
      __builtin_prefetch(from + x.ahead);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kGroup; j += PROFIT_LANES) {
        const Vec v = front(load(from + j), m * kGroup + j);
        store(to + j, quantized_act<act, quantized>(v, k));
      }
    }
  }
}

// Also keeps what the gradient needs: u, the clipped (h - d) / A, and the slope act'(v).
template <Activation act, bool quantized, typename Front>
PROFIT_TARGET void quantize_row_keeping(
    ConstLanes x, Lanes q, float* u, float* slope, int64_t columns, int64_t groups, const Quantizer<float>& quantizer,
    const FrontLanes& front_lanes) {
  const Front front(front_lanes);
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
          store(slope + kept + j, activate_grad<act>(v));
        }
      }
    }
  }
}

// gq, the gradient of the quantized row, becomes that of the row. Adds to sums[row][lane], by way of float32 sums over the columns
// in row_sums, the terms of -dL/dA and of s * dL/dC and, behind a BatchNorm, dL/dv and dL/dv * (x - mean); gx is alpha * dL/dv
// there, without what the statistics of the batch add.
template <Activation act, bool quantized, typename Front>
PROFIT_TARGET void finish_row(
    ConstLanes gq, ConstLanes x, const float* u, const float* slope, Lanes gx, int64_t columns, int64_t groups,
    const Quantizer<float>& quantizer, const FrontLanes& front, float* row_sums, double* sums) {
  const VecQuantizer k(quantizer);
  constexpr int64_t rows = Front::normed ? 4 : quantized ? 2 : 0;
  const int64_t lanes = groups * kGroup;
  for (int64_t m = 0; m < groups; ++m) {
    for (int64_t j = 0; j < kGroup; j += PROFIT_LANES) {
      const int64_t lane = m * kGroup + j;
      Vec sum_a{}, sum_c{}, sum_g{}, sum_gx{}, alpha{}, mean{};
      if constexpr (Front::normed) {
        alpha = load(front.alpha + lane);
        mean = load(front.mean + lane);
      }
      for (int64_t i = 0; i < columns; ++i) {
        const int64_t kept = (m * columns + i) * kGroup + j;
        float* to = gx.at(m, i) + j;
        __builtin_prefetch(to + gx.ahead, 1);
        const Vec clipped = quantized ? load(u + kept) : Vec{};
        const Vec act_slope = act != Activation::none ? load(slope + kept) : Vec{};
        Vec gv = quantized_act_grad<act, quantized>(load(gq.at(m, i) + j), clipped, act_slope, k, sum_a, sum_c);
        if constexpr (Front::normed) {
          sum_g += gv;
          sum_gx += gv * (load(x.at(m, i) + j) - mean);
          gv *= alpha;
        }
        store(to, gv);
      }
      if constexpr (rows > 0) {
        store(row_sums + lane, sum_a);
        store(row_sums + lanes + lane, sum_c);
      }
      if constexpr (Front::normed) {
        store(row_sums + 2 * lanes + lane, sum_g);
        store(row_sums + 3 * lanes + lane, sum_gx);
      }
    }
  }
  for (int64_t j = 0; j < rows * lanes; ++j) {
    sums[j] += row_sums[j];
  }
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

template <Activation act, bool quantized, typename Front>
void use_rows(RowKernels& kernels) {
  kernels.quantize = quantize_row<act, quantized, Front>;
  kernels.quantize_keeping = quantize_row_keeping<act, quantized, Front>;
  kernels.finish = finish_row<act, quantized, Front>;
}

template <Activation act, typename Front>
void use_rows(RowKernels& kernels, bool quantized) {
  return quantized ? use_rows<act, true, Front>(kernels) : use_rows<act, false, Front>(kernels);
}

template <typename Front>
void use_rows(RowKernels& kernels, bool quantized, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return use_rows<Activation::relu, Front>(kernels, quantized);
    case Activation::relu6:
      return use_rows<Activation::relu6, Front>(kernels, quantized);
    case Activation::hardswish:
      return use_rows<Activation::hardswish, Front>(kernels, quantized);
    case Activation::none:
      return use_rows<Activation::none, Front>(kernels, quantized);
  }
}

template <typename S>
void use_type(RowKernels& kernels) {
  kernels.load = load_row<S>;
  kernels.store = store_row<S>;
  kernels.round = round_row<S>;
}

}  // namespace
}  // namespace profit::cpu::PROFIT_ISA
