// AIWQ from the update of the weight: for any scalar alpha of an output channel,
//
//     y_old = alpha * (y_new - b) + conv(x, w_old - alpha * w_new) + b
//
// With alpha the ratio of the two scales, w_old - alpha * w_new is 0 but for the codes that changed, about one in a hundred. A
// channel without any has a closed form; the convolution runs on the others (changed.cpp).
#include "update.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../torch/check.h"
#include "aiwq.h"

namespace profit::cpu {

namespace {

using torch::headeronly::ScalarType;

// Above this share of changed weights a dense convolution is faster.
constexpr double kDense = 0.15;

// Contiguous float32.
Tensor plain(const Tensor& t) {
  const Tensor same = t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
  return same.is_contiguous() ? same : torch::stable::contiguous(same);
}

}  // namespace

Update::Update(const Tensor& fresh, const Tensor& old, const AiwqKernels& loops)
    : taps(fresh.numel() / std::max<int64_t>(1, fresh.size(0))),
      alpha(fresh.size(0)),
      changed(fresh.size(0), 0),
      place(fresh.size(0), -1) {
  const float *w_new = static_cast<const float*>(fresh.const_data_ptr());
  const float *w_old = static_cast<const float*>(old.const_data_ptr());
  const int64_t channels = changed.size(), grain = ceil_div(1 << 15, std::max<int64_t>(1, taps));
  std::vector<float> largest_new(channels), largest_old(channels);
  torch::stable::parallel_for(0, channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      largest_new[c] = loops.largest(w_new + c * taps, taps);
      largest_old[c] = loops.largest(w_old + c * taps, taps);
    }
  });
  const auto ratio = [](float a, float b) { return a > 0 && b > 0 ? b / a : 1.0f; };
  const auto over_all = [](const std::vector<float>& v) { return v.empty() ? 0.0f : *std::max_element(v.begin(), v.end()); };
  const float whole = ratio(over_all(largest_new), over_all(largest_old));
  // One scale for the tensor, or one per channel where that leaves fewer differences.
  torch::stable::parallel_for(0, channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const float *from = w_new + c * taps, *to = w_old + c * taps;
      alpha[c] = whole;
      changed[c] = loops.differences(from, to, whole, nullptr, taps);
      const float own = ratio(largest_new[c], largest_old[c]);
      if (changed[c] > 0 && own != whole) {
        const int64_t count = loops.differences(from, to, own, nullptr, taps);
        if (count < changed[c]) {
          alpha[c] = own;
          changed[c] = count;
        }
      }
    }
  });
  int64_t size = 0;
  for (int64_t c = 0; c < channels; ++c) {
    if (changed[c] > 0) {
      place[c] = size;
      size += taps;
    }
  }
  delta.resize(size);
  torch::stable::parallel_for(0, channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      if (changed[c] > 0) {
        loops.differences(w_new + c * taps, w_old + c * taps, alpha[c], delta.data() + place[c], taps);
      }
    }
  });
}

double Update::share() const {
  int64_t sum = 0;
  for (const int64_t n : changed) {
    sum += n;
  }
  return static_cast<double>(sum) / static_cast<double>(std::max<int64_t>(1, taps * changed.size()));
}

std::optional<Tensor> aiwq_update(
    Tensor x, Tensor y_new, Norm norm, RawQuantizer quantizer, Tensor weight_old, std::optional<Tensor> bias,
    Convolution convolution, double eps, Tensor weight_new) {
  const auto& [stride, padding, dilation, groups, pad_value] = convolution;
  check_output(y_new);
  PROFIT_CHECK(
      x.dim() == 4 && x.scalar_type() == ScalarType::Float && y_new.scalar_type() == ScalarType::Float,
      "aiwq: x and y_new must be [N, C, H, W] in float32");
  PROFIT_CHECK(
      weight_old.dim() == 4 && weight_old.numel() == weight_new.numel() && weight_old.size(0) == weight_new.size(0) &&
          weight_old.size(0) == y_new.size(1),
      "aiwq: both weights must have the shape of the layer's");
  const bool is_depthwise = groups == x.size(1) && weight_old.size(1) == 1;
  PROFIT_CHECK(
      is_depthwise || (groups == 1 && weight_old.size(1) == x.size(1) && weight_old.size(2) == 1 &&
                       weight_old.size(3) == 1 && stride.size() == 2 && padding == std::vector<int64_t>(4, 0) &&
                       y_new.size(0) == x.size(0) && y_new.size(2) == ceil_div(x.size(2), stride[0]) &&
                       y_new.size(3) == ceil_div(x.size(3), stride[1])),
      "aiwq: a layer must be depthwise, or pointwise without groups and padding, and y_new its output");
  const int64_t channels = weight_old.size(0);
  const Tensor w_new = plain(weight_new), w_old = plain(weight_old);
  const std::vector<float> b = bias.has_value() ? values<float>(*bias) : std::vector<float>(channels, 0.0f);
  const InputSide input("aiwq", Front(x.size(1), norm), quantizer);
  const Wanted wanted = {input.quantized, input.front.present, false};
  if (!is_depthwise && is_wide(x, weight_old, stride)) {
    const RowKernels kernels = row_kernels(ScalarType::Float, wanted, input.activation, input.quantizer, {1, 1, 1, 1});
    const auto [fresh, old] = wide_moments(
        x, static_cast<const float*>(w_new.const_data_ptr()), static_cast<const float*>(w_old.const_data_ptr()), b, input,
        kernels);
    return kl(fresh, old, eps);
  }
  const AiwqKernels loops = aiwq_kernels();
  const Update update(w_new, w_old, loops);
  if (!is_depthwise && update.share() > kDense) {
    return std::nullopt;
  }

  const Moments fresh = moments(y_new);
  Moments old = fresh;
  for (int64_t c = 0; c < channels; ++c) {
    const double alpha = update.alpha[c];
    old.mean[c] = alpha * fresh.mean[c] + (1.0 - alpha) * b[c];
    old.variance[c] = alpha * alpha * fresh.variance[c];
  }
  std::vector<float> shift = first_values(y_new, plain_kernels(ScalarType::Float));
  if (is_depthwise) {
    const Geometry g = geometry(x, weight_old, convolution);
    PROFIT_CHECK(
        y_new.size(0) == g.images && y_new.size(2) == g.out_height && y_new.size(3) == g.out_width,
        "aiwq: y_new must have the shape of the layer's output");
    const RowKernels kernels = row_kernels(ScalarType::Float, wanted, input.activation, input.quantizer, g.row_taps());
    shift.resize(shift.size() + kGroup + g.multiplier, 0.0f);
    depthwise_moments({x, y_new, update, b, input, kernels, loops, shift}, g, static_cast<float>(pad_value), old);
  } else {
    const RowKernels kernels = row_kernels(ScalarType::Float, wanted, input.activation, input.quantizer, {1, 1, 1, 1});
    pointwise_moments({x, y_new, update, b, input, kernels, loops, shift}, stride, old);
  }
  return kl(fresh, old, eps);
}

}  // namespace profit::cpu
