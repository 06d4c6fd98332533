// AIWQ on the CPU: per-channel moments and the Gaussian KL of two outputs (docs/maths.md, section 3).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace profit::cpu {

using torch::stable::Tensor;

// y_new, y_old: [N, C, H, W], each float32 / bfloat16 / float16 of any strides. Returns KL [C], float32: NaN for a channel that
// holds NaN or a single sample.
Tensor aiwq_kl(Tensor y_new, Tensor y_old, double eps);

// [2, C] float64: mean and unbiased variance over N, H, W.
Tensor aiwq_moments(Tensor y);

// KL of y_new from conv(pad(duq(act(x)), pad_value), weight_old) + bias, one filter per output channel, computed in the dtype of
// y_new; arguments as duq_depthwise_forward. With a mean, x passes BatchNorm (front.h) first, as in block_depthwise. The old
// output is not written anywhere.
Tensor aiwq_depthwise(
    Tensor x, Tensor y_new, Tensor weight_old, std::optional<Tensor> bias, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation, double pad_value, std::optional<Tensor> a_x,
    std::optional<Tensor> c_x, std::optional<int64_t> act_bits, bool is_signed, double offset, int64_t activation,
    double eps, std::optional<Tensor> mean, std::optional<Tensor> invstd, std::optional<Tensor> gamma,
    std::optional<Tensor> beta);

// KL of y_new from the output under weight_old, as aiwq_depthwise, given also the weight that gave y_new: only what differs
// between the two is convolved. Depthwise layers, and pointwise ones without groups and padding; x and y_new in float32.
// Nothing where too many weights of a pointwise layer differ for that to pay.
std::optional<Tensor> aiwq_update(
    Tensor x, Tensor y_new, Tensor weight_old, Tensor weight_new, std::optional<Tensor> bias,
    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
    double pad_value, std::optional<Tensor> a_x, std::optional<Tensor> c_x, std::optional<int64_t> act_bits,
    bool is_signed, double offset, int64_t activation, double eps, std::optional<Tensor> mean, std::optional<Tensor> invstd,
    std::optional<Tensor> gamma, std::optional<Tensor> beta);

}  // namespace profit::cpu
