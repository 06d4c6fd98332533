// What stands in front of the activation: a BatchNorm, as the scale and shift of every channel.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <utility>
#include <vector>

#include "../duq/quantizer.h"
#include "../torch/check.h"
#include "../torch/parameters.h"

namespace profit::cpu {

using torch::stable::Tensor;

// v = alpha * x + shift per channel, with alpha = gamma * invstd and shift = beta - mean * alpha. Without mean, the identity.
struct Front {
  bool present;
  std::vector<float> mean, invstd, alpha, shift;

  explicit Front(
      int64_t channels, const std::optional<Tensor>& mean_ = {}, const std::optional<Tensor>& invstd_ = {},
      const std::optional<Tensor>& gamma = {}, const std::optional<Tensor>& beta = {})
      : present(mean_.has_value()), mean(channels, 0.0f), invstd(channels, 1.0f), alpha(channels, 1.0f), shift(channels, 0.0f) {
    for (const auto* t : {&mean_, &invstd_, &gamma, &beta}) {
      PROFIT_CHECK(
          !t->has_value() || (*t)->numel() == channels, "block: BatchNorm must have one value for each of the ", channels,
          " channels of x");
    }
    if (!present) {
      return;
    }
    PROFIT_CHECK(invstd_.has_value(), "block: mean needs invstd");
    mean = values<float>(*mean_);
    invstd = values<float>(*invstd_);
    const std::vector<float> g = gamma.has_value() ? values<float>(*gamma) : std::vector<float>(channels, 1.0f);
    const std::vector<float> b = beta.has_value() ? values<float>(*beta) : std::vector<float>(channels, 0.0f);
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

  InputSide(
      const char* op, Front front, const std::optional<Tensor>& a, const std::optional<Tensor>& c, std::optional<int64_t> bits,
      bool is_signed, double offset, int64_t activation)
      : front(std::move(front)), quantizer(), quantized(bits.has_value()), activation(static_cast<Activation>(activation)) {
    PROFIT_CHECK(0 <= activation && activation <= 3, op, ": unknown activation ", activation);
    if (quantized) {
      PROFIT_CHECK(2 <= *bits && *bits <= 8, op, ": act_bits must be 2 to 8, got ", *bits);
      PROFIT_CHECK(a.has_value() && c.has_value(), op, ": act_bits needs the interval a and the scale c");
      PROFIT_CHECK(a->numel() == 1 && c->numel() == 1, op, ": the input has one interval and one scale");
      quantizer = {softplus(values<float>(*a)[0]), softplus(values<float>(*c)[0]), *bits, is_signed, offset};
    }
  }
};

// (dL/dgamma, dL/dbeta) from each channel's sums of dL/dv and of dL/dv * (x - mean). With the statistics of the batch, `grad`,
// which holds alpha * dL/dv, becomes dL/dx: alpha * (dL/dv - mean of dL/dv - x^ * mean of dL/dv * x^).
std::pair<std::optional<Tensor>, std::optional<Tensor>> finish_batch_norm(
    Tensor& grad, const Tensor& x, const Front& front, const std::vector<double>& of_g, const std::vector<double>& of_gx,
    const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta, bool of_batch);

}  // namespace profit::cpu
