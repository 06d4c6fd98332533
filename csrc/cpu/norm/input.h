// The input side of a block: BatchNorm, activation and DuQ in one pass over x (docs/maths.md, section 1).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "../torch/values.h"

namespace profit::cpu {

using torch::stable::Tensor;

// x: [N, C, H, W], float32 / bfloat16 / float16, dense as NCHW or channels_last. Returns mean, unbiased variance and
// 1 / sqrt(biased variance + eps) over N, H, W: float32 [C], summed in double.
std::tuple<Tensor, Tensor, Tensor> block_moments(Tensor x, double eps);

// duq(act(alpha * x + shift)) like x, with alpha = gamma * invstd and shift = beta - mean * alpha.
Tensor block_input(Tensor x, Norm norm, RawQuantizer quantizer);

// grad: that of block_input's result. gx is set to dL/dx and may be grad itself; both have the dtype and strides of x. of_batch:
// mean and invstd are those of x itself, so gradients flow through them. Returns dL/dgamma, dL/dbeta, dL/da, dL/dc, each like
// what it belongs to.
std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>> block_input_backward(
    Tensor grad, Tensor gx, Tensor x, Norm norm, RawQuantizer quantizer, bool of_batch);

}  // namespace profit::cpu
