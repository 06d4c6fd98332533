// What the ways to AIWQ share: moments from sums, and the reading of outputs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "../conv/plan.h"
#include "../torch/check.h"
#include "kernels.h"

namespace profit::cpu {

using torch::stable::Tensor;

// Means and unbiased variances per channel, from sums of y - shift and of its square over n values.
struct Moments {
  std::vector<double> mean, variance;

  Moments() = default;
  Moments(const std::vector<double>& first, const std::vector<double>& second, const std::vector<float>& shift, double n)
      : mean(first.size()), variance(first.size()) {
    for (size_t c = 0; c < first.size(); ++c) {
      mean[c] = shift[c] + first[c] / n;
      variance[c] = (second[c] - first[c] * (first[c] / n)) / (n - 1);
      // Rounding may leave a constant channel a hair below 0; NaN passes.
      variance[c] = variance[c] < 0 ? 0 : variance[c];
    }
  }
};

// Sums of the tasks of a plan, [part][block][2][lane], added in order.
class TaskSums {
 public:
  explicit TaskSums(const Plan& plan) : plan_(plan), sums_(plan.tasks() * 2 * plan.width(), 0.0) {}

  double* of(const Plan::Task& task) { return sums_.data() + (task.part * plan_.blocks + task.block) * 2 * plan_.width(); }

  Moments moments(const std::vector<float>& shift, double n) const {
    std::vector<double> first(plan_.channels, 0.0), second(plan_.channels, 0.0);
    for (int64_t index = 0; index < plan_.tasks(); ++index) {
      const Plan::Task task = plan_.task(index);
      const double* sums = sums_.data() + (task.part * plan_.blocks + task.block) * 2 * plan_.width();
      for (int64_t lane = 0; lane < task.channels; ++lane) {
        first[task.first_channel + lane] += sums[lane];
        second[task.first_channel + lane] += sums[task.groups * kGroup + lane];
      }
    }
    return {first, second, shift, n};
  }

 private:
  const Plan& plan_;
  std::vector<double> sums_;
};

inline void check_output(const Tensor& y) {
  using torch::headeronly::ScalarType;
  const auto type = y.scalar_type();
  PROFIT_CHECK(y.dim() == 4 && y.is_cpu(), "aiwq: outputs must be [N, C, H, W] on the CPU");
  PROFIT_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
      "aiwq: outputs must be float32, bfloat16 or float16");
}

inline Geometry shape_of(const Tensor& y) {
  Geometry g{};
  g.images = y.size(0);
  g.in_channels = y.size(1);
  g.multiplier = 1;
  g.height = y.size(2);
  g.width = y.size(3);
  return g;
}

// Those that load and round.
inline RowKernels plain_kernels(torch::headeronly::ScalarType type) {
  return row_kernels(type, {}, Activation::none, {}, {1, 1, 1, 1});
}

// The first value of each channel, 0 in the lanes behind the last.
inline std::vector<float> first_values(const Tensor& y, const RowKernels& kernels) {
  const int64_t channels = y.size(1), groups = ceil_div(channels, kGroup);
  std::vector<float> values(groups * kGroup, 0.0f);
  if (y.numel() > 0) {
    const TensorRows rows = TensorRows::of(y, false);
    kernels.load(rows.at(0, 0, 0), rows.strides(), values.data(), 1, channels, groups, 1);
  }
  return values;
}

// Reads a row of a task as lanes, by way of `buffer` where it cannot be walked in place.
inline ConstLanes read_row(
    const TensorRows& rows, const RowKernels& kernels, const Plan::Task& task, int64_t image, int64_t y, int64_t columns,
    float* buffer) {
  const char* from = rows.at(image, task.first_channel, y);
  if (rows.in_place(task, 1)) {
    return {reinterpret_cast<const float*>(from), kGroup, rows.w, rows.h};
  }
  kernels.load(from, rows.strides(), buffer, columns, task.channels, task.groups, 1);
  return {buffer, columns * kGroup, kGroup};
}

// Of y [N, C, H, W], over N, H, W.
Moments moments(const Tensor& y);

// Gaussian KL of the first from the second, [C], float32; eps is added to both variances.
Tensor kl(const Moments& fresh, const Moments& old, double eps);

}  // namespace profit::cpu
