// AIWQ on the CPU: per-channel moments and the Gaussian KL of two outputs (docs/maths.md, section 3).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "../torch/values.h"

namespace profit::cpu {

using torch::stable::Tensor;

// y_new, y_old: [N, C, H, W], each float32 / bfloat16 / float16 of any strides. Returns KL [C], float32: NaN for a channel that
// holds NaN or a single sample.
Tensor aiwq_kl(Tensor y_new, Tensor y_old, double eps);

// [2, C] float64: mean and unbiased variance over N, H, W.
Tensor aiwq_moments(Tensor y);

// KL of y_new from conv(pad(duq(act(BatchNorm(x))), pad_value), weight_old) + bias, one filter per output channel, computed in the
// dtype of y_new; x and weight as in DuqDepthwise (conv/depthwise.h).
Tensor aiwq_depthwise(
    Tensor x, Tensor y_new, Tensor weight_old, std::optional<Tensor> bias, Convolution convolution, RawQuantizer quantizer,
    double eps, Norm norm);

// What aiwq_update takes, as the schema has it.
struct AiwqUpdate {
  Tensor x, y_new, weight_old, weight_new;
  std::optional<Tensor> bias;
  GroupedConvolution convolution;
  RawQuantizer quantizer;
  double eps;
  Norm norm;

  static constexpr auto fields() {
    using U = AiwqUpdate;
    return std::tuple{&U::x, &U::y_new, &U::weight_old, &U::weight_new, &U::bias,
                      &U::convolution, &U::quantizer, &U::eps, &U::norm};
  }
};

// KL of y_new from the output under weight_old, as aiwq_depthwise, given also the weight that gave y_new: only what differs
// between the two is convolved. Depthwise layers, and pointwise ones without groups and padding; x and y_new in float32.
// Nothing where too many weights of a pointwise layer differ for that to pay.
std::optional<Tensor> aiwq_update(AiwqUpdate problem);

}  // namespace profit::cpu
