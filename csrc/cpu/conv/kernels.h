// The inner loops of the depthwise convolution as a table of functions, one table per instruction set, dtype, quantizer and
// kernel. Everything between loading and storing is float32 in the first two cache levels.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <utility>

#include "../duq/quantizer.h"

namespace profit::cpu {

// Channels that lie together in the buffers: one 512-bit register of floats.
constexpr int64_t kGroup = 16;
// Pixels that a pointwise layer computes at a time.
constexpr int64_t kTile = 64;

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

// Rows that are multiplied by a matrix at once (rows_times).
constexpr int64_t kRowsTimes = 4;

// Which loops a layer needs. `quantized` false lets act(v) pass through; `normed`: there is a BatchNorm; `weight_grad`: the
// gradient of the weight is asked for.
struct Wanted {
  bool quantized, normed, weight_grad;
};

// What each does stands at its definition in conv/row_loops.h, conv/loops.h and aiwq/loops.h.
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
  void (*add_moments)(ConstLanes y, const float* shift, int64_t columns, int64_t groups, double* sums);
  void (*add_run_moments)(const float* y, float shift, int64_t n, double& first, double& second);
  void (*add_second_moments)(
      Lanes q, const float* shift, int64_t columns, int64_t groups, double* first, double* second);
  void (*add_taps)(float* to, const float* from, const std::pair<int32_t, float>* taps, int64_t count);
  void (*gather)(const float* const* at, int64_t n, int64_t first, int64_t channels, int64_t stride, float* to);
  float (*largest)(const float* w, int64_t n);
  int64_t (*differences)(const float* w_new, const float* w_old, float alpha, float* delta, int64_t n);
  void (*scale)(float* to, const float* from, float factor, float constant, int64_t n);
  void (*rows_times)(const float* const* w, const float* matrix, float* to, int64_t inputs, int64_t width);
  void (*add_scaled_lanes)(
      Lanes to, ConstLanes from, const float* factor, const float* constant, int64_t columns, int64_t groups);
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
