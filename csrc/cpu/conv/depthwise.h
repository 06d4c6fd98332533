// Depthwise convolution with a padding value, with what stands in front of it: BatchNorm, the activation and DuQ (docs/maths.md,
// sections 1 and 2).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "../torch/values.h"

namespace profit::cpu {

using torch::stable::Tensor;

// A depthwise layer, as the schema has it: y = conv(pad(duq(act(BatchNorm(x))), pad_value), weight) + bias.
// x: [N, C, H, W], float32 / bfloat16 / float16, any strides. weight: [C_out, 1, kh, kw], quantized already, C_out a multiple of C,
// any float dtype.
struct Depthwise {
  Tensor x;
  Norm norm;
  RawQuantizer quantizer;
  Tensor weight;
  std::optional<Tensor> bias;
  Convolution convolution;

  static constexpr auto fields() {
    using D = Depthwise;
    return std::tuple{&D::x, &D::norm, &D::quantizer, &D::weight, &D::bias, &D::convolution};
  }
};

// Returns y [N, C_out, H_out, W_out] in the dtype of x and the memory format that torch's own convolution would choose.
Tensor block_depthwise(Depthwise layer);

// Gradients of x, gamma, beta, a, c, weight, bias, each like what it belongs to.
using SevenGradients = std::tuple<
    Tensor, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>,
    std::optional<Tensor>>;

// grad: like y, any strides. of_batch: mean and invstd are those of x itself, so gradients flow through them. That of the weight
// is computed only where it is needed.
SevenGradients block_depthwise_backward(Tensor grad, Depthwise layer, bool of_batch, bool need_weight);

}  // namespace profit::cpu
