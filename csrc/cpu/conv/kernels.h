// The inner loops of the depthwise convolution as a table of functions, one table per instruction set, dtype, quantizer and
// kernel. Everything between loading and storing is float32 in the first two cache levels.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "../duq/quantizer.h"

namespace profit::cpu {

// Channels that lie together in the buffers: one 512-bit register of floats.
constexpr int64_t kGroup = 16;

// A row in memory: 16 channels of group m at column i start at p + m * group + i * column. The row that will be read next starts
// at p + ahead, for prefetching.
template <typename T>
struct RowView {
  T* p;
  int64_t group, column, ahead = 0;
  T* at(int64_t m, int64_t i) const { return p + m * group + i * column; }
};
using Lanes = RowView<float>;
using ConstLanes = RowView<const float>;

// Distances in elements between channels, columns and rows of a tensor.
struct Strides {
  int64_t channel, column, row;
};

// The taps of a kernel: kw of them `dilation` columns apart in each of kh rows; outputs are `stride` columns apart.
struct Taps {
  int64_t kh, kw, stride, dilation;
};

// The BatchNorm in front of the activation, beside the lanes of a block of channels: v = alpha * x + shift.
struct FrontLanes {
  const float *alpha, *shift, *mean;
};

// Which loops a layer needs. `quantized` false lets act(v) pass through; `normed`: there is a BatchNorm; `weight_grad`: the
// gradient of the weight is asked for.
struct Wanted {
  bool quantized, normed, weight_grad;
};

// What each does stands at its definition in conv/row_loops.h and conv/loops.h.
struct RowKernels {
  void (*load)(const void* from, Strides, float* to, int64_t columns, int64_t channels, int64_t groups, int64_t multiplier);
  void (*store)(const float* from, void* to, Strides, int64_t columns, int64_t channels, int64_t groups, int64_t multiplier);
  void (*round)(Lanes q, int64_t columns, int64_t groups);
  void (*quantize)(ConstLanes x, Lanes q, int64_t columns, int64_t groups, const Quantizer<float>&, const FrontLanes&);
  void (*quantize_keeping)(
      ConstLanes x, Lanes q, float* u, float* slope, int64_t columns, int64_t groups, const Quantizer<float>&,
      const FrontLanes&);
  void (*finish)(
      ConstLanes gq, ConstLanes x, const float* u, const float* slope, Lanes gx, int64_t columns, int64_t groups,
      const Quantizer<float>&, const FrontLanes&, float* row_sums, double* sums);
  void (*sum)(const float* g, float* sums, int64_t columns, int64_t groups);
  void (*forward)(
      const float* const* rows, int64_t row_group, const float* weight, int64_t lanes, const float* bias, Lanes out,
      int64_t columns, int64_t groups, const Taps&);
  void (*backward)(
      const float* g, const float* q, float* gq, int64_t row_group, const float* weight, float* gw, int64_t lanes,
      int64_t columns, int64_t groups, const Taps&);
};

// The table for the instruction set in use (isa.h). `type` is that of x.
RowKernels row_kernels(
    torch::headeronly::ScalarType type, const Wanted&, Activation activation, const Quantizer<float>&, const Taps&);

}  // namespace profit::cpu
