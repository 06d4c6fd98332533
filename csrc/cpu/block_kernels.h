// The inner loops of a block's input side as a table of functions, one per instruction set, dtype, quantizer and activation.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "duq.h"
#include "parameters.h"

namespace profit::cpu {

// float32 sums beside the elements of a run.
struct LaneSums {
  float *g, *gx, *a, *c;
};

// What each does stands at its definition in block_loops.h.
struct BlockKernels {
  void (*widen)(const void* from, float* to, int64_t n);
  void (*narrow)(const float* from, void* to, int64_t n);
  void (*input)(const float* x, float* y, int64_t n, const float* alpha, const float* shift, const Quantizer<float>&);
  void (*input_backward)(
      float* g, const float* x, int64_t n, const float* alpha, const float* shift, const float* mean, const Quantizer<float>&,
      const LaneSums&);
  void (*finish)(float* g, const float* x, int64_t n, const float* slope, const float* mean, const float* constant);
  void (*moments)(const float* x, int64_t n, double* sum, double* square);
};

// The table for the instruction set in use (isa.h). `type` is that of x; `quantized` false lets act(v) pass through.
BlockKernels block_kernels(
    torch::headeronly::ScalarType type, bool quantized, Activation activation, const Quantizer<float>& quantizer);

}  // namespace profit::cpu
