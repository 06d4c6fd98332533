// The inner loops of AIWQ as a table of functions, one per instruction set; all in float32, with sums in double. They have the same
// bits at every instruction set.
#pragma once

#include <cstdint>
#include <utility>

#include "../conv/kernels.h"

namespace profit::cpu {

// Pixels that a pointwise layer computes at a time.
constexpr int64_t kTilePixels = 64;
// Rows that are multiplied by a matrix at once (rows_times).
constexpr int64_t kRowsTimes = 4;

// What each does stands at its definition in aiwq/loops.h.
struct AiwqKernels {
  void (*add_moments)(ConstLanes y, const float* shift, int64_t columns, int64_t groups, double* sums);
  void (*add_run_moments)(const float* y, float shift, int64_t n, double& first, double& second);
  void (*add_second_moments)(
      Lanes q, const float* shift, int64_t columns, int64_t groups, double* first, double* second);
  void (*add_taps)(float* to, const float* from, const std::pair<int32_t, float>* taps, int64_t count);
  void (*add_scaled_lanes)(
      Lanes to, ConstLanes from, const float* factor, const float* constant, int64_t columns, int64_t groups);
  void (*gather)(const float* const* at, int64_t n, int64_t first, int64_t channels, int64_t stride, float* to);
  float (*largest)(const float* w, int64_t n);
  int64_t (*differences)(const float* w_new, const float* w_old, float alpha, float* delta, int64_t n);
  void (*scale)(float* to, const float* from, float factor, float constant, int64_t n);
  void (*rows_times)(const float* const* w, const float* matrix, float* to, int64_t inputs, int64_t width);
};

// The table for the instruction set in use (isa.h).
AiwqKernels aiwq_kernels();

}  // namespace profit::cpu
