// Means and variances in float64, each tensor read once: sums of y - shift and of its square, with one value of the channel for
// the shift, so that a large mean cancels before anything is squared. The inner loops are in aiwq/loops.h.
#include "moments.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "../torch/check.h"
#include "aiwq.h"

namespace profit::cpu {

using torch::headeronly::ScalarType;

namespace {

// Values of a plane that are summed in one go.
constexpr int64_t kRun = 4096;

// Planes that lie in one run of memory each.
Moments plane_moments(const Tensor& y, const RowKernels& kernels, const AiwqKernels& loops) {
  const Geometry g = shape_of(y);
  const TensorRows rows = TensorRows::of(y, false);
  const std::vector<float> shift = first_values(y, kernels);
  const int64_t size = g.height * g.width, planes = g.images * g.in_channels;
  std::vector<double> sums(2 * planes, 0.0);
  torch::stable::parallel_for(0, planes, ceil_div(32768, std::max<int64_t>(1, size)), [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(rows.is_float ? 0 : kRun);
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t channel = plane % g.in_channels;
      const char* from = rows.at(plane / g.in_channels, channel, 0);
      for (int64_t start = 0; start < size; start += kRun) {
        const int64_t n = std::min(kRun, size - start);
        const float* run = reinterpret_cast<const float*>(from) + start;
        if (!rows.is_float) {
          // A run of n values is a column of n channels.
          kernels.load(from + start * rows.element, {1, 1, 0}, buffer.data(), 1, n, ceil_div(n, kGroup), 1);
          run = buffer.data();
        }
        loops.add_run_moments(run, shift[channel], n, sums[2 * plane], sums[2 * plane + 1]);
      }
    }
  });
  std::vector<double> first(g.in_channels, 0.0), second(g.in_channels, 0.0);
  for (int64_t plane = 0; plane < planes; ++plane) {
    first[plane % g.in_channels] += sums[2 * plane];
    second[plane % g.in_channels] += sums[2 * plane + 1];
  }
  return {first, second, shift, static_cast<double>(g.images * size)};
}

}  // namespace

Moments moments(const Tensor& y) {
  const Geometry g = shape_of(y);
  const RowKernels kernels = plain_kernels(y.scalar_type());
  const AiwqKernels loops = aiwq_kernels();
  const bool planes = (g.width <= 1 || y.stride(3) == 1) && (g.height <= 1 || y.stride(2) == g.width);
  if (planes && g.height * g.width > 1) {
    return plane_moments(y, kernels, loops);
  }
  const Plan plan(g, g.height, g.height * g.width);
  const TensorRows rows = TensorRows::of(y, false);
  const std::vector<float> shift = first_values(y, kernels);
  TaskSums sums(plan);
  torch::stable::parallel_for(0, plan.tasks(), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(plan.width() * g.width);
    float* buffer = scratch.take(plan.width() * g.width);
    for (int64_t index = begin; index < end; ++index) {
      const Plan::Task task = plan.task(index);
      for (int64_t image = task.first_image; image < task.end_image; ++image) {
        for (int64_t row = task.first_row; row < task.end_row; ++row) {
          const ConstLanes lanes = read_row(rows, kernels, task, image, row, g.width, buffer);
          loops.add_moments(lanes, shift.data() + task.first_channel, g.width, task.groups, sums.of(task));
        }
      }
    }
  });
  return sums.moments(shift, static_cast<double>(g.images * g.height * g.width));
}

Tensor kl(const Moments& fresh, const Moments& old, double eps) {
  const std::vector<int64_t> size = {static_cast<int64_t>(fresh.mean.size())};
  Tensor result = torch::stable::empty(size, ScalarType::Float);
  float* to = static_cast<float*>(result.mutable_data_ptr());
  for (size_t c = 0; c < fresh.mean.size(); ++c) {
    const double scale = old.variance[c] + eps, apart = fresh.mean[c] - old.mean[c];
    const double r_minus_1 = (fresh.variance[c] - old.variance[c]) / scale;
    to[c] = static_cast<float>(0.5 * (r_minus_1 - std::log1p(r_minus_1)) + 0.5 * apart * apart / scale);
  }
  return result;
}

Tensor aiwq_kl(Tensor y_new, Tensor y_old, double eps) {
  check_output(y_new);
  check_output(y_old);
  for (int64_t d = 0; d < 4; ++d) {
    PROFIT_CHECK(y_new.size(d) == y_old.size(d), "aiwq: both outputs must have one shape");
  }
  return kl(moments(y_new), moments(y_old), eps);
}

Tensor aiwq_moments(Tensor y) {
  check_output(y);
  const Moments found = moments(y);
  const int64_t channels = found.mean.size();
  const std::vector<int64_t> size = {2, channels};
  Tensor result = torch::stable::empty(size, ScalarType::Double);
  double* to = static_cast<double*>(result.mutable_data_ptr());
  std::copy(found.mean.begin(), found.mean.end(), to);
  std::copy(found.variance.begin(), found.variance.end(), to + channels);
  return result;
}

}  // namespace profit::cpu
