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

// Whether a pointwise layer's moments are cheaper to have from its input than from its outputs.
bool is_wide(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride);

// Of the outputs under the new and the old weight, each [C_out, C_in] contiguous; x in float32.
std::pair<Moments, Moments> wide_moments(
    const Tensor& x, const float* w_new, const float* w_old, const std::vector<float>& bias, const InputSide& input,
    const RowKernels& kernels);

}  // namespace profit::cpu
