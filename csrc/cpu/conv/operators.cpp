// The operators of the depthwise convolution: with the weight's quantizer, and with a BatchNorm in front.
#include <torch/csrc/stable/ops.h>

#include "../duq/duq.h"
#include "../torch/check.h"
#include "../torch/layout.h"
#include "../torch/parameters.h"
#include "depthwise.h"

namespace profit::cpu {

namespace {

constexpr int64_t kNoActivation = static_cast<int64_t>(Activation::none);

Tensor quantized_weight(const DuqDepthwise& p) {
  PROFIT_CHECK(
      !p.weight_bits.has_value() || (2 <= *p.weight_bits && *p.weight_bits <= 8 && p.a_w.has_value() && p.c_w.has_value()),
      "depthwise: weight_bits must be 2 to 8 and needs the interval a and the scale c");
  return p.weight_bits.has_value() ? duq_forward(p.weight, *p.a_w, *p.c_w, *p.weight_bits, true, 0.0, kNoActivation) : p.weight;
}

InputSide input_of(const DuqDepthwise& p) {
  return {"depthwise", Front(p.x.dim() > 1 ? p.x.size(1) : 0), p.quantizer()};
}

InputSide input_of(const BlockDepthwise& p) { return {"block", Front(p.x.size(1), p.norm()), p.quantizer()}; }

}  // namespace

Tensor duq_depthwise_forward(DuqDepthwise p) {
  return depthwise_forward(p.x, input_of(p), quantized_weight(p), p.bias, p.convolution());
}

SevenGradients duq_depthwise_backward(Tensor grad, DuqDepthwise p, bool need_weight) {
  const InputSide input = input_of(p);
  const DepthwiseGradients g =
      depthwise_backward(grad, p.x, input, quantized_weight(p), p.bias, p.convolution(), need_weight);
  std::optional<Tensor> gw = g.weight, ga_x, gc_x, ga_w, gc_w;
  if (input.quantized) {
    ga_x = parameter_grad<float>(*p.a_x, {g.A});
    gc_x = parameter_grad<float>(*p.c_x, {g.C});
  }
  if (need_weight && p.weight_bits.has_value()) {
    std::tie(gw, ga_w, gc_w) = duq_backward(*gw, p.weight, *p.a_w, *p.c_w, *p.weight_bits, true, 0.0, kNoActivation);
  }
  return {g.x, gw, ga_x, gc_x, ga_w, gc_w, g.bias};
}

Tensor block_depthwise(BlockDepthwise p) { return depthwise_forward(p.x, input_of(p), p.weight, p.bias, p.convolution); }

SevenGradients block_depthwise_backward(Tensor grad, BlockDepthwise p, bool of_batch, bool need_weight) {
  const InputSide input = input_of(p);
  DepthwiseGradients g = depthwise_backward(grad, p.x, input, p.weight, p.bias, p.convolution, need_weight);
  // The gradient has the memory format of torch's convolution, which goes by the weight as well.
  Tensor walked = p.x;
  if (!same_strides(p.x, g.x)) {
    walked = torch::stable::empty_like(g.x);
    torch::stable::copy_(walked, p.x);
  }
  const auto [g_gamma, g_beta] = finish_batch_norm(g.x, walked, input.front, g.of_g, g.of_gx, p.norm(), of_batch);
  std::optional<Tensor> ga, gc;
  if (input.quantized) {
    ga = parameter_grad<float>(*p.a, {g.A});
    gc = parameter_grad<float>(*p.c, {g.C});
  }
  return {g.x, g_gamma, g_beta, g.weight, ga, gc, g.bias};
}

}  // namespace profit::cpu
