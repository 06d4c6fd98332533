// Depthwise convolution with a padding value, the activation, DuQ and the weight quantizer in front of it (docs/maths.md,
// sections 1 and 2).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../norm/front.h"

namespace profit::cpu {

using torch::stable::Tensor;

// y = conv(pad(duq(act(x)), pad_value), duq(weight)) + bias.
// x: [N, C, H, W], float32 / bfloat16 / float16, any strides. weight: [C_out, 1, kh, kw], C_out a multiple of C, any float
// dtype. a_x, c_x: one value each; a_w, c_w: one value or one per output channel. act_bits, weight_bits: absent, that side
// passes through. stride, dilation: (h, w). padding: (left, right, top, bottom).
// Returns y [N, C_out, H_out, W_out] in the dtype of x and the memory format that torch's own convolution would choose.
Tensor duq_depthwise_forward(
    Tensor x, Tensor weight, std::optional<Tensor> a_x, std::optional<Tensor> c_x, std::optional<Tensor> a_w,
    std::optional<Tensor> c_w, std::optional<Tensor> bias, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, std::optional<int64_t> act_bits, std::optional<int64_t> weight_bits, bool is_signed,
    double offset, int64_t activation, double pad_value);

// grad: like y, any strides. Returns the gradients of x, weight, a_x, c_x, a_w, c_w, bias, each like what it belongs to; without
// need_weight none of weight, a_w, c_w is computed.
std::tuple<
    Tensor, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>,
    std::optional<Tensor>>
duq_depthwise_backward(
    Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> a_x, std::optional<Tensor> c_x,
    std::optional<Tensor> a_w, std::optional<Tensor> c_w, std::optional<Tensor> bias, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation, std::optional<int64_t> act_bits,
    std::optional<int64_t> weight_bits, bool is_signed, double offset, int64_t activation, double pad_value,
    bool need_weight);

// The same for what other operators put in front, with the weight quantized already.
struct Convolution {
  std::vector<int64_t> stride, padding, dilation;
  double pad_value;
};

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
