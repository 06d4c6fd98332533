#include "plan.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../torch/check.h"

namespace profit::cpu {

using torch::headeronly::ScalarType;

namespace {

// Tasks to aim at, and the work (elements) below which a task is not worth its start.
constexpr int64_t kTasks = 32;
constexpr int64_t kWork = 32768;
constexpr int64_t kMinRows = 8;

}  // namespace

Geometry geometry(const Tensor& x, const Tensor& weight, const Convolution& convolution) {
  const auto& [stride, padding, dilation, groups, pad_value] = convolution;
  const auto type = x.scalar_type();
  PROFIT_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
      "depthwise: x must be float32, bfloat16 or float16");
  PROFIT_CHECK(x.dim() == 4, "depthwise: x must be [N, C, H, W], got ", x.dim(), " dimensions");
  PROFIT_CHECK(
      weight.dim() == 4 && weight.size(1) == 1 && x.size(1) > 0 && weight.size(0) > 0 &&
          weight.size(0) % x.size(1) == 0 && weight.size(2) > 0 && weight.size(3) > 0,
      "depthwise: weight must be [C_out, 1, kh, kw] with C_out a multiple of the ", x.size(1), " channels of x");
  PROFIT_CHECK(groups == x.size(1), "depthwise: groups must be the ", x.size(1), " channels of x, got ", groups);
  PROFIT_CHECK(weight.is_cpu(), "depthwise: weight must be on the CPU, where x is");
  PROFIT_CHECK(
      stride.size() == 2 && dilation.size() == 2 && padding.size() == 4,
      "depthwise: stride and dilation must be (h, w), padding (left, right, top, bottom)");
  for (const auto* list : {&stride, &dilation}) {
    PROFIT_CHECK((*list)[0] >= 1 && (*list)[1] >= 1, "depthwise: stride and dilation must be at least 1");
  }
  for (const int64_t p : padding) {
    PROFIT_CHECK(p >= 0, "depthwise: padding must not be negative, got ", p);
  }
  Geometry g;
  g.images = x.size(0);
  g.in_channels = x.size(1);
  g.multiplier = weight.size(0) / x.size(1);
  g.height = x.size(2);
  g.width = x.size(3);
  g.kh = weight.size(2);
  g.kw = weight.size(3);
  g.stride_h = stride[0];
  g.stride_w = stride[1];
  g.dilation_h = dilation[0];
  g.dilation_w = dilation[1];
  g.left = padding[0];
  g.right = padding[1];
  g.top = padding[2];
  g.bottom = padding[3];
  const int64_t free_h = g.padded_height() - g.dilation_h * (g.kh - 1) - 1;
  const int64_t free_w = g.padded_width() - g.dilation_w * (g.kw - 1) - 1;
  PROFIT_CHECK(
      free_h >= 0 && free_w >= 0, "depthwise: the kernel, ", g.kh, " x ", g.kw, " with dilation ", g.dilation_h, " x ",
      g.dilation_w, ", is larger than the padded input, ", g.padded_height(), " x ", g.padded_width());
  g.out_height = free_h / g.stride_h + 1;
  g.out_width = free_w / g.stride_w + 1;
  return g;
}

Plan::Plan(const Geometry& g, int64_t rows, int64_t work, int64_t block)
    : channels(g.channels()), images(g.images), rows(rows) {
  if (g.multiplier == 1) {
    const int64_t all = ceil_div(channels, kGroup);
    groups = ceil_div(all, ceil_div(all, block / kGroup));
    lanes = groups * kGroup;
  } else {
    // The filters of one input channel stay in one block, where their gradients are added up.
    lanes = std::min(channels, g.multiplier * std::max<int64_t>(1, block / g.multiplier));
    groups = ceil_div(lanes, kGroup);
  }
  blocks = ceil_div(channels, lanes);
  const int64_t enough = ceil_div(kWork, std::max<int64_t>(1, work * width()));
  const int64_t spread = std::max<int64_t>(1, images * blocks / kTasks);
  images_per_chunk = std::max<int64_t>(1, std::min({images, enough, spread}));
  chunks = ceil_div(images, images_per_chunk);
  bands = 1;
  if (chunks * blocks < kTasks && chunks > 0) {
    bands = std::max<int64_t>(1, std::min(ceil_div(kTasks, chunks * blocks), rows / kMinRows));
  }
  rows_per_band = ceil_div(rows, bands);
  bands = ceil_div(rows, std::max<int64_t>(1, rows_per_band));
}

TensorRows TensorRows::of(const Tensor& t, bool writable) {
  void* data = writable ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
  const bool is_float = t.scalar_type() == ScalarType::Float;
  return {static_cast<char*>(data), is_float ? 4 : 2, t.stride(0), t.stride(1), t.stride(2), t.stride(3), is_float};
}

std::vector<float> pack(const Tensor& weight, ScalarType type, const Plan& plan, int64_t taps) {
  Tensor same = weight.scalar_type() == type ? weight : torch::stable::to(weight, type);
  same = type == ScalarType::Float ? same : torch::stable::to(same, ScalarType::Float);
  same = torch::stable::contiguous(same);
  const float* from = static_cast<const float*>(same.const_data_ptr());
  std::vector<float> packed(plan.blocks * taps * plan.width(), 0.0f);
  for (int64_t c = 0; c < plan.channels; ++c) {
    float* to = packed.data() + (c / plan.lanes) * taps * plan.width() + c % plan.lanes;
    for (int64_t tap = 0; tap < taps; ++tap) {
      to[tap * plan.width()] = from[c * taps + tap];
    }
  }
  return packed;
}

}  // namespace profit::cpu
