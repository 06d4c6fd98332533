// What stands in front of the activation: a BatchNorm, as the scale and shift of every channel.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <utility>
#include <vector>

#include "../duq/quantizer.h"
#include "../torch/check.h"
#include "../torch/parameters.h"
#include "../torch/values.h"

namespace profit::cpu {

using torch::stable::Tensor;

// v = alpha * x + shift per channel, with alpha = gamma * invstd and shift = beta - mean * alpha. Without mean, the identity.
struct Front {
  bool present;
  std::vector<float> mean, invstd, alpha, shift;

  explicit Front(int64_t channels, const Norm& norm = {})
      : present(norm.mean.has_value()),
        mean(channels, 0.0f),
        invstd(channels, 1.0f),
        alpha(channels, 1.0f),
        shift(channels, 0.0f) {
    for (const auto* t : {&norm.mean, &norm.invstd, &norm.gamma, &norm.beta}) {
      PROFIT_CHECK(
          !t->has_value() || (*t)->numel() == channels, "block: BatchNorm must have one value for each of the ", channels,
          " channels of x");
    }
    if (!present) {
      return;
    }
    PROFIT_CHECK(norm.invstd.has_value(), "block: mean needs invstd");
    mean = values<float>(*norm.mean);
    invstd = values<float>(*norm.invstd);
    const std::vector<float> g = norm.gamma.has_value() ? values<float>(*norm.gamma) : std::vector<float>(channels, 1.0f);
    const std::vector<float> b = norm.beta.has_value() ? values<float>(*norm.beta) : std::vector<float>(channels, 0.0f);
    for (int64_t i = 0; i < channels; ++i) {
      alpha[i] = invstd[i] * g[i];
      shift[i] = b[i] - mean[i] * alpha[i];
    }
  }
};

// What happens to x on its way to the convolution: q = duq(act(front(x))), or act(front(x)) alone. `op` starts error messages.
struct InputSide {
  Front front;
  Quantizer<float> quantizer;
  bool quantized;
  Activation activation;

  InputSide(const char* op, Front front, const RawQuantizer& raw)
      : front(std::move(front)),
        quantizer(),
        quantized(raw.bits.has_value()),
        activation(static_cast<Activation>(raw.activation)) {
    PROFIT_CHECK(0 <= raw.activation && raw.activation <= 3, op, ": unknown activation ", raw.activation);
    if (quantized) {
      PROFIT_CHECK(2 <= *raw.bits && *raw.bits <= 8, op, ": act_bits must be 2 to 8, got ", *raw.bits);
      PROFIT_CHECK(raw.a.has_value() && raw.c.has_value(), op, ": act_bits needs the interval a and the scale c");
      PROFIT_CHECK(raw.a->numel() == 1 && raw.c->numel() == 1, op, ": the input has one interval and one scale");
      quantizer = {
          softplus(values<float>(*raw.a)[0]), softplus(values<float>(*raw.c)[0]), *raw.bits, raw.is_signed, raw.offset};
    }
  }
};

// (dL/dgamma, dL/dbeta) from each channel's sums of dL/dv and of dL/dv * (x - mean). With the statistics of the batch, `grad`,
// which holds alpha * dL/dv, becomes dL/dx: alpha * (dL/dv - mean of dL/dv - x^ * mean of dL/dv * x^).
std::pair<std::optional<Tensor>, std::optional<Tensor>> finish_batch_norm(
    Tensor& grad, const Tensor& x, const Front& front, const std::vector<double>& of_g, const std::vector<double>& of_gx,
    const Norm& norm, bool of_batch);

}  // namespace profit::cpu
