// A block with a depthwise convolution: BatchNorm, activation, DuQ and convolution in one pass; nothing is materialised but the
// output and dL/dx.
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "../norm/front.h"
#include "../norm/input.h"
#include "../torch/layout.h"
#include "depthwise.h"

namespace profit::cpu {

Tensor block_depthwise(
    Tensor x, Tensor mean, Tensor invstd, std::optional<Tensor> gamma, std::optional<Tensor> beta, Tensor weight,
    std::optional<Tensor> a, std::optional<Tensor> c, std::optional<Tensor> bias, std::optional<int64_t> bits, bool is_signed,
    double offset, int64_t activation, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, double pad_value) {
  const InputSide input(
      "block", Front(x.size(1), mean, invstd, gamma, beta), a, c, bits, is_signed, offset, activation);
  return depthwise_forward(x, input, weight, bias, {stride, padding, dilation, pad_value});
}

std::tuple<
    Tensor, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>,
    std::optional<Tensor>>
block_depthwise_backward(
    Tensor grad, Tensor x, Tensor mean, Tensor invstd, std::optional<Tensor> gamma, std::optional<Tensor> beta, Tensor weight,
    std::optional<Tensor> a, std::optional<Tensor> c, std::optional<Tensor> bias, std::optional<int64_t> bits, bool is_signed,
    double offset, int64_t activation, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, double pad_value, bool of_batch, bool need_weight) {
  const InputSide input(
      "block", Front(x.size(1), mean, invstd, gamma, beta), a, c, bits, is_signed, offset, activation);
  DepthwiseGradients g =
      depthwise_backward(grad, x, input, weight, bias, {stride, padding, dilation, pad_value}, need_weight);
  // The gradient has the memory format of torch's convolution, which goes by the weight as well.
  Tensor walked = x;
  if (!same_strides(x, g.x)) {
    walked = torch::stable::empty_like(g.x);
    torch::stable::copy_(walked, x);
  }
  const auto [g_gamma, g_beta] = finish_batch_norm(g.x, walked, input.front, g.of_g, g.of_gx, gamma, beta, of_batch);
  std::optional<Tensor> ga, gc;
  if (input.quantized) {
    ga = parameter_grad<float>(*a, {g.A});
    gc = parameter_grad<float>(*c, {g.C});
  }
  return {g.x, g_gamma, g_beta, g.weight, ga, gc, g.bias};
}

}  // namespace profit::cpu
