// The inner loops of a block's input side as a table of functions, one per instruction set, dtype, quantizer and activation.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "../duq/quantizer.h"

namespace profit::cpu {

// A tile: `rows` rows of `lanes` elements, one after the other.
struct Tile {
  int64_t lanes, rows;
  int64_t size() const { return lanes * rows; }
};

// Constants beside the lanes, and float32 sums, with room for whole registers.
struct LaneFront {
  const float *alpha, *shift, *mean;
};
struct LaneSums {
  float *g, *gx, *a, *c;
};

// What each does stands at its definition in norm/loops.h.
struct BlockKernels {
  void (*widen)(const void* from, float* to, int64_t n);
  void (*narrow)(const float* from, void* to, int64_t n);
  void (*input)(const float* x, float* y, Tile, const LaneFront&, const Quantizer<float>&);
  bool (*codes)(const float* x, uint8_t* codes, Tile, const LaneFront&, const Quantizer<float>&, float zero) = nullptr;  // AVX-512
  void (*input_backward)(
      const float* g, float* gx, const float* x, Tile, const LaneFront&, const Quantizer<float>&, const LaneSums&);
  void (*finish)(float* g, const float* x, Tile, const float* slope, const float* mean, const float* constant);
  void (*moments)(const float* x, Tile, double* sum, double* square);
};

// The table for the instruction set in use (isa.h). `type` is that of x; `quantized` false lets act(v) pass through.
BlockKernels block_kernels(
    torch::headeronly::ScalarType type, bool quantized, Activation activation, const Quantizer<float>& quantizer);

}  // namespace profit::cpu
