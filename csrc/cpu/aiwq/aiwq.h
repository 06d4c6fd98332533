// AIWQ on the CPU: per-channel moments and the Gaussian KL of two outputs (docs/maths.md, section 3).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "../torch/values.h"

namespace profit::cpu {

using torch::stable::Tensor;

// y_new, y_old: [N, C, H, W], each float32 / bfloat16 / float16 of any strides. Returns KL [C], float32: NaN for a channel that
// holds NaN or a single sample.
Tensor aiwq_kl(Tensor y_new, Tensor y_old, double eps);

// [2, C] float64: mean and unbiased variance over N, H, W.
Tensor aiwq_moments(Tensor y);

// KL of y_new from the output of a depthwise layer under weight_old, with one filter per output channel; computed in the dtype of
// y_new. The layer as in conv/depthwise.h.
Tensor aiwq_depthwise(
    Tensor x, Tensor y_new, Norm norm, RawQuantizer quantizer, Tensor weight_old, std::optional<Tensor> bias,
    Convolution convolution, double eps);

// The same given also the weight that gave y_new: only what differs between the two is convolved. Depthwise layers, and pointwise
// ones without groups and padding; x and y_new in float32.
// Nothing where too many weights of a pointwise layer differ for that to pay.
std::optional<Tensor> aiwq_update(
    Tensor x, Tensor y_new, Norm norm, RawQuantizer quantizer, Tensor weight_old, std::optional<Tensor> bias,
    Convolution convolution, double eps, Tensor weight_new);

}  // namespace profit::cpu
