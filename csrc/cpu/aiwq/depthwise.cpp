// AIWQ of a depthwise layer, which is convolved again row by row under the old weight. The old output is not written anywhere.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../conv/rows.h"
#include "../torch/check.h"
#include "aiwq.h"
#include "moments.h"

namespace profit::cpu {

Tensor aiwq_depthwise(
    Tensor x, Tensor y_new, Norm norm, RawQuantizer quantizer, Tensor weight_old, std::optional<Tensor> bias,
    Convolution convolution, double eps) {
  const Geometry g = geometry(x, weight_old, convolution);
  check_output(y_new);
  PROFIT_CHECK(
      y_new.size(0) == g.images && y_new.size(1) == g.channels() && y_new.size(2) == g.out_height &&
          y_new.size(3) == g.out_width,
      "aiwq: y_new must have the shape of the layer's output");
  const InputSide input("aiwq", Front(x.size(1), norm), quantizer);
  const Plan plan(g, g.out_height, g.height * g.width);
  const auto type = y_new.scalar_type();
  const std::vector<float> w = pack(weight_old, type, plan, g.taps());
  const std::vector<float> b =
      bias.has_value() ? pack(*bias, type, plan, 1) : std::vector<float>(plan.blocks * plan.width(), 0.0f);
  const PackedFront front(input.front, plan, g.multiplier);
  const RowKernels kernels = row_kernels(
      x.scalar_type(), {input.quantized, input.front.present, false}, input.activation, input.quantizer, g.row_taps());
  const RowKernels of_output = plain_kernels(type);
  const AiwqKernels loops = aiwq_kernels();
  const float border = rounded(rounded(static_cast<float>(convolution.pad_value), kernels), of_output);
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
          loops.add_moments(from, shifts, g.out_width, task.groups, old_sums.of(task));
          const ConstLanes beside = read_row(fresh, of_output, task, image, row, g.out_width, buffer);
          loops.add_moments(beside, shifts, g.out_width, task.groups, new_sums.of(task));
        }
      }
    }
  });
  const double n = static_cast<double>(g.images * g.out_height * g.out_width);
  return kl(new_sums.moments(shift, n), old_sums.moments(shift, n), eps);
}

}  // namespace profit::cpu
