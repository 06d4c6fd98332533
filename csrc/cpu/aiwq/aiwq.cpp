// Means and variances in float64, each tensor read once: sums of y - shift and of its square, with one value of the channel for
// the shift, so that a large mean cancels before anything is squared. The inner loops are in aiwq/loops.h.
#include "aiwq.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "../conv/rows.h"
#include "../torch/check.h"
#include "moments.h"

namespace profit::cpu {

using torch::headeronly::ScalarType;

namespace {

// Values of a plane that are summed in one go.
constexpr int64_t kRun = 4096;

// Planes that lie in one run of memory each.
Moments plane_moments(const Tensor& y, const RowKernels& kernels) {
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
        kernels.add_run_moments(run, shift[channel], n, sums[2 * plane], sums[2 * plane + 1]);
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
  const bool planes = (g.width <= 1 || y.stride(3) == 1) && (g.height <= 1 || y.stride(2) == g.width);
  if (planes && g.height * g.width > 1) {
    return plane_moments(y, kernels);
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
          kernels.add_moments(lanes, shift.data() + task.first_channel, g.width, task.groups, sums.of(task));
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

Tensor aiwq_depthwise(
    Tensor x, Tensor y_new, Tensor weight_old, std::optional<Tensor> bias, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation, double pad_value, std::optional<Tensor> a_x,
    std::optional<Tensor> c_x, std::optional<int64_t> act_bits, bool is_signed, double offset, int64_t activation,
    double eps, std::optional<Tensor> mean, std::optional<Tensor> invstd, std::optional<Tensor> gamma,
    std::optional<Tensor> beta) {
  const Geometry g = geometry(x, weight_old, stride, padding, dilation);
  check_output(y_new);
  PROFIT_CHECK(
      y_new.size(0) == g.images && y_new.size(1) == g.channels() && y_new.size(2) == g.out_height &&
          y_new.size(3) == g.out_width,
      "aiwq: y_new must have the shape of the layer's output");
  const InputSide input(
      "aiwq", Front(x.size(1), mean, invstd, gamma, beta), a_x, c_x, act_bits, is_signed, offset, activation);
  const Plan plan(g, g.out_height, g.height * g.width);
  const auto type = y_new.scalar_type();
  const std::vector<float> w = pack(weight_old, type, plan, g.taps());
  const std::vector<float> b =
      bias.has_value() ? pack(*bias, type, plan, 1) : std::vector<float>(plan.blocks * plan.width(), 0.0f);
  const PackedFront front(input.front, plan, g.multiplier);
  const RowKernels kernels = row_kernels(
      x.scalar_type(), {input.quantized, input.front.present, false}, input.activation, input.quantizer, g.row_taps());
  const RowKernels of_output = plain_kernels(type);
  const float border = rounded(rounded(static_cast<float>(pad_value), kernels), of_output);
  const TensorRows in = TensorRows::of(x, false), fresh = TensorRows::of(y_new, false);
  // The new output's first values serve both: the two lie close together.
  std::vector<float> shift = first_values(y_new, of_output);
  shift.resize(shift.size() + plan.width(), 0.0f);
  TaskSums new_sums(plan), old_sums(plan);
  torch::stable::parallel_for(0, plan.tasks(), 1, [&](int64_t begin, int64_t end) {
    const int64_t row_floats = plan.width() * g.out_width;
    Scratch scratch(QuantizedRows::floats(g, plan) + 2 * row_floats);
    QuantizedRows rows(g, plan, kernels, input.quantizer, front, in, border, scratch);
    if (!fresh.is_float) {
      rows.round_with(of_output.round);
    }
    float *old = scratch.take(row_floats), *buffer = scratch.take(row_floats);
    for (int64_t index = begin; index < end; ++index) {
      const Plan::Task task = plan.task(index);
      const float* shifts = shift.data() + task.first_channel;
      const Lanes lanes{old, g.out_width * kGroup, kGroup};
      for (int64_t image = task.first_image; image < task.end_image; ++image) {
        rows.start(task, image);
        for (int64_t row = task.first_row; row < task.end_row; ++row) {
          kernels.forward(
              rows.window(row * g.stride_h), rows.group_stride(), w.data() + task.block * g.taps() * plan.width(),
              plan.width(), b.data() + task.block * plan.width(), lanes, g.out_width, task.groups, g.row_taps());
          of_output.round(lanes, g.out_width, task.groups);
          const ConstLanes from{old, g.out_width * kGroup, kGroup};
          kernels.add_moments(from, shifts, g.out_width, task.groups, old_sums.of(task));
          const ConstLanes beside = read_row(fresh, of_output, task, image, row, g.out_width, buffer);
          kernels.add_moments(beside, shifts, g.out_width, task.groups, new_sums.of(task));
        }
      }
    }
  });
  const double n = static_cast<double>(g.images * g.out_height * g.out_width);
  return kl(new_sums.moments(shift, n), old_sums.moments(shift, n), eps);
}

}  // namespace profit::cpu
