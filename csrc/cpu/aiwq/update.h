// The parts of aiwq_update (aiwq.h).
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "../conv/rows.h"
#include "moments.h"

namespace profit::cpu {

// w_old = alpha * w_new + delta, per output channel.
struct Update {
  int64_t taps;
  std::vector<float> alpha;
  std::vector<int64_t> changed;  // weights that differ, per channel
  std::vector<int64_t> place;    // of the differences of a channel that has any, in `delta`
  std::vector<float> delta;

  // Both contiguous in float32, of one shape.
  Update(const Tensor& fresh, const Tensor& old, const AiwqKernels& loops);

  // The differences of a channel that has any.
  const float* of(int64_t c) const { return delta.data() + place[c]; }

  // Of all weights, those that differ.
  double share() const;
};

// What both ways to the changed channels read.
struct Layer {
  const Tensor &x, &y_new;
  const Update& update;
  const std::vector<float>& bias;
  const InputSide& input;
  const RowKernels& kernels;
  const AiwqKernels& loops;
  const std::vector<float>& shift;

  // What alpha leaves of the bias.
  float rest_of_bias(int64_t c) const { return (1.0f - update.alpha[c]) * bias[c]; }
};

// The moments under the old weight of the channels whose weights changed; those of the others are left as they are.
void depthwise_moments(const Layer& layer, const Geometry& g, float border, Moments& old);
void pointwise_moments(const Layer& layer, const std::vector<int64_t>& stride, Moments& old);

// Whether a pointwise layer's moments are cheaper to have from its input than from its outputs.
bool is_wide(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride);

// Of the outputs under the new and the old weight, each [C_out, C_in] contiguous; x in float32.
std::pair<Moments, Moments> wide_moments(
    const Tensor& x, const float* w_new, const float* w_old, const std::vector<float>& bias, const InputSide& input,
    const RowKernels& kernels);

}  // namespace profit::cpu
