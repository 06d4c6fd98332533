// The input side of a block: BatchNorm, activation and DuQ in one pass over x (docs/maths.md, section 1).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace profit::cpu {

using torch::stable::Tensor;

// x: [N, C, H, W], float32 / bfloat16 / float16, dense as NCHW or channels_last. Returns mean, unbiased variance and
// 1 / sqrt(biased variance + eps) over N, H, W: float32 [C], summed in double.
std::tuple<Tensor, Tensor, Tensor> block_moments(Tensor x, double eps);

// duq(act(alpha * x + shift)) like x, with alpha = gamma * invstd and shift = beta - mean * alpha. mean, invstd, gamma, beta:
// [C] each; without mean there is no BatchNorm. a, c: one value each; without bits the activation alone.
Tensor block_input(
    Tensor x, std::optional<Tensor> mean, std::optional<Tensor> invstd, std::optional<Tensor> gamma, std::optional<Tensor> beta,
    std::optional<Tensor> a, std::optional<Tensor> c, std::optional<int64_t> bits, bool is_signed, double offset,
    int64_t activation);

// grad: that of block_input's result. gx is set to dL/dx and may be grad itself; both have the dtype and strides of x. of_batch: mean
// and invstd are those of x itself, so gradients flow through them. Returns dL/dgamma, dL/dbeta, dL/da, dL/dc, each like what it belongs to.
std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>> block_input_backward(
    Tensor grad, Tensor gx, Tensor x, std::optional<Tensor> mean, std::optional<Tensor> invstd, std::optional<Tensor> gamma,
    std::optional<Tensor> beta, std::optional<Tensor> a, std::optional<Tensor> c, std::optional<int64_t> bits, bool is_signed,
    double offset, int64_t activation, bool of_batch);

// The whole block where the convolution is depthwise: y = conv(pad(block_input(x), pad_value), weight) + bias. weight: quantized.
// Otherwise as duq_depthwise_forward (depthwise.h) takes it; x dense.
Tensor block_depthwise(
    Tensor x, Tensor mean, Tensor invstd, std::optional<Tensor> gamma, std::optional<Tensor> beta, Tensor weight,
    std::optional<Tensor> a, std::optional<Tensor> c, std::optional<Tensor> bias, std::optional<int64_t> bits, bool is_signed,
    double offset, int64_t activation, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, double pad_value);

// Gradients of x, gamma, beta, weight, a, c, bias; that of the weight only where it is needed.
std::tuple<
    Tensor, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>,
    std::optional<Tensor>>
block_depthwise_backward(
    Tensor grad, Tensor x, Tensor mean, Tensor invstd, std::optional<Tensor> gamma, std::optional<Tensor> beta, Tensor weight,
    std::optional<Tensor> a, std::optional<Tensor> c, std::optional<Tensor> bias, std::optional<int64_t> bits, bool is_signed,
    double offset, int64_t activation, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, double pad_value, bool of_batch, bool need_weight);

}  // namespace profit::cpu
