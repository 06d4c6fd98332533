// Depthwise convolution with a padding value, with what stands in front of it: BatchNorm, the activation and DuQ (docs/maths.md,
// sections 1 and 2).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../norm/front.h"
#include "../torch/values.h"

namespace profit::cpu {

using torch::stable::Tensor;

// y = conv(pad(duq(act(x)), pad_value), duq(weight)) + bias, as the schema has it.
// x: [N, C, H, W], float32 / bfloat16 / float16, any strides. weight: [C_out, 1, kh, kw], C_out a multiple of C, any float
// dtype. a_x, c_x: one value each; a_w, c_w: one value or one per output channel. act_bits, weight_bits: absent, that side
// passes through.
struct DuqDepthwise {
  Tensor x, weight;
  std::optional<Tensor> a_x, c_x, a_w, c_w, bias;
  std::vector<int64_t> stride, padding, dilation;
  std::optional<int64_t> act_bits, weight_bits;
  bool is_signed;
  double offset;
  int64_t activation;
  double pad_value;

  static constexpr auto fields() {
    using D = DuqDepthwise;
    return std::tuple{&D::x, &D::weight, &D::a_x, &D::c_x, &D::a_w, &D::c_w, &D::bias, &D::stride, &D::padding, &D::dilation,
                      &D::act_bits, &D::weight_bits, &D::is_signed, &D::offset, &D::activation, &D::pad_value};
  }
  RawQuantizer quantizer() const { return {a_x, c_x, act_bits, is_signed, offset, activation}; }
  Convolution convolution() const { return {stride, padding, dilation, pad_value}; }
};

// Returns y [N, C_out, H_out, W_out] in the dtype of x and the memory format that torch's own convolution would choose.
Tensor duq_depthwise_forward(DuqDepthwise problem);

// Gradients of seven tensors, each like what it belongs to.
using SevenGradients = std::tuple<
    Tensor, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>,
    std::optional<Tensor>>;

// grad: like y, any strides. Returns the gradients of x, weight, a_x, c_x, a_w, c_w, bias; without need_weight none of weight, a_w,
// c_w is computed.
SevenGradients duq_depthwise_backward(Tensor grad, DuqDepthwise problem, bool need_weight);

// The whole block: y = conv(pad(duq(act(BatchNorm(x))), pad_value), weight) + bias, as the schema has it. weight: quantized
// already. x: dense.
struct BlockDepthwise {
  Tensor x, mean, invstd;
  std::optional<Tensor> gamma, beta;
  Tensor weight;
  std::optional<Tensor> a, c, bias;
  std::optional<int64_t> bits;
  bool is_signed;
  double offset;
  int64_t activation;
  Convolution convolution;

  static constexpr auto fields() {
    using B = BlockDepthwise;
    return std::tuple{&B::x, &B::mean, &B::invstd, &B::gamma, &B::beta, &B::weight, &B::a, &B::c, &B::bias, &B::bits,
                      &B::is_signed, &B::offset, &B::activation, &B::convolution};
  }
  Norm norm() const { return {mean, invstd, gamma, beta}; }
  RawQuantizer quantizer() const { return {a, c, bits, is_signed, offset, activation}; }
};

Tensor block_depthwise(BlockDepthwise problem);

// Gradients of x, gamma, beta, weight, a, c, bias; that of the weight only where it is needed.
SevenGradients block_depthwise_backward(Tensor grad, BlockDepthwise problem, bool of_batch, bool need_weight);

// What both do, with the weight quantized already.
Tensor depthwise_forward(
    const Tensor& x, const InputSide& input, const Tensor& weight, const std::optional<Tensor>& bias,
    const Convolution& convolution);

// A, C: dL/dA and dL/dC of the input quantizer. of_g, of_gx: behind a BatchNorm, the sums of each channel of x for
// finish_batch_norm; x is alpha * dL/dv then.
struct DepthwiseGradients {
  Tensor x;
  std::optional<Tensor> weight, bias;
  double A = 0, C = 0;
  std::vector<double> of_g, of_gx;
};

DepthwiseGradients depthwise_backward(
    const Tensor& grad, const Tensor& x, const InputSide& input, const Tensor& weight, const std::optional<Tensor>& bias,
    const Convolution& convolution, bool need_weight);

}  // namespace profit::cpu
