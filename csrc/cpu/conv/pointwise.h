// The whole block where the convolution is pointwise, in integers: BatchNorm, activation and DuQ give codes, whose products with
// the weight's codes are summed exactly. Nothing is materialised but the output.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "../torch/values.h"

namespace profit::cpu {

using torch::stable::Tensor;

// y = conv(block_input(x), weight) + bias, written to y [N, C_out, H, W]. x: [N, C, H, W] float32; both channels_last. weight:
// [C_out, C, 1, 1] float32, quantized to `weight_bits` with the raw scale c_w (one value or C_out).
// False, with y untouched, where the processor or the values ask for another way: no byte products, C no multiple of 4, no
// quantizer, intervals or scales beyond 2^-60 .. 2^60.
bool block_pointwise(
    Tensor y, Tensor x, Norm norm, RawQuantizer quantizer, Tensor weight, std::optional<Tensor> bias, Tensor c_w,
    int64_t weight_bits);

}  // namespace profit::cpu
