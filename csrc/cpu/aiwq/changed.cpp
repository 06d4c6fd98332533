// The moments of the channels whose weights changed: what changed is convolved anew. Depthwise layers do so for the groups of
// channels that hold one, pointwise layers tap by tap, over 64 pixels at a time.
#include <algorithm>
#include <array>

#include "update.h"

namespace profit::cpu {

namespace {

// Pixels whose sums make one partial sum of a pointwise layer.
constexpr int64_t kPixels = 256;

}  // namespace

void depthwise_moments(const Layer& layer, const Geometry& g, float border, Moments& old) {
  const Plan plan(g, g.out_height, g.height * g.width, kGroup);
  std::vector<float> delta(plan.blocks * g.taps() * plan.width(), 0.0f), nothing(plan.width(), 0.0f);
  std::vector<float> alpha(plan.blocks * plan.width(), 0.0f), rest(plan.blocks * plan.width(), 0.0f);
  std::vector<char> needed(plan.blocks, 0);
  for (int64_t c = 0; c < plan.channels; ++c) {
    const int64_t block = c / plan.lanes, lane = c % plan.lanes;
    needed[block] |= layer.update.changed[c] > 0;
    alpha[block * plan.width() + lane] = layer.update.alpha[c];
    rest[block * plan.width() + lane] = layer.rest_of_bias(c);
    for (int64_t tap = 0; layer.update.changed[c] > 0 && tap < g.taps(); ++tap) {
      delta[(block * g.taps() + tap) * plan.width() + lane] = layer.update.of(c)[tap];
    }
  }
  const TensorRows in = TensorRows::of(layer.x, false), fresh = TensorRows::of(layer.y_new, false);
  const PackedFront front(layer.input.front, plan, g.multiplier);
  TaskSums sums(plan);
  torch::stable::parallel_for(0, plan.tasks(), 1, [&](int64_t begin, int64_t end) {
    const int64_t row_floats = plan.width() * g.out_width;
    Scratch scratch(QuantizedRows::floats(g, plan) + 2 * row_floats);
    QuantizedRows rows(g, plan, layer.kernels, layer.input.quantizer, front, in, border, scratch);
    float *row_old = scratch.take(row_floats), *buffer = scratch.take(row_floats);
    const Lanes lanes{row_old, g.out_width * kGroup, kGroup};
    for (int64_t index = begin; index < end; ++index) {
      const Plan::Task task = plan.task(index);
      if (!needed[task.block]) {
        continue;
      }
      for (int64_t image = task.first_image; image < task.end_image; ++image) {
        rows.start(task, image);
        for (int64_t row = task.first_row; row < task.end_row; ++row) {
          layer.kernels.forward(
              rows.window(row * g.stride_h), rows.group_stride(), delta.data() + task.block * g.taps() * plan.width(),
              plan.width(), nothing.data(), lanes, g.out_width, task.groups, g.row_taps());
          const ConstLanes beside = read_row(fresh, layer.kernels, task, image, row, g.out_width, buffer);
          layer.loops.add_scaled_lanes(
              lanes, beside, alpha.data() + task.block * plan.width(), rest.data() + task.block * plan.width(),
              g.out_width, task.groups);
          const ConstLanes done{row_old, g.out_width * kGroup, kGroup};
          layer.loops.add_moments(
              done, layer.shift.data() + task.first_channel, g.out_width, task.groups, sums.of(task));
        }
      }
    }
  });
  const Moments found = sums.moments(layer.shift, static_cast<double>(g.images * g.out_height * g.out_width));
  for (int64_t c = 0; c < plan.channels; ++c) {
    if (layer.update.changed[c] > 0) {
      old.mean[c] = found.mean[c];
      old.variance[c] = found.variance[c];
    }
  }
}

void pointwise_moments(const Layer& layer, const std::vector<int64_t>& stride, Moments& old) {
  const int64_t in_channels = layer.x.size(1), out_channels = layer.y_new.size(1);
  std::vector<int64_t> outputs;  // the changed ones
  std::vector<std::vector<std::pair<int32_t, float>>> taps(in_channels);  // of an input: (place in outputs, delta)
  for (size_t o = 0; o < layer.update.changed.size(); ++o) {
    if (layer.update.changed[o] == 0) {
      continue;
    }
    const float* delta = layer.update.of(o);
    for (int64_t j = 0; j < in_channels; ++j) {
      if (delta[j] != 0.0f) {
        taps[j].emplace_back(outputs.size(), delta[j]);
      }
    }
    outputs.push_back(o);
  }
  const TensorRows in = TensorRows::of(layer.x, false), fresh = TensorRows::of(layer.y_new, false);
  const int64_t height = layer.y_new.size(2), width = layer.y_new.size(3), pixels = layer.y_new.size(0) * height * width;
  const int64_t tasks = ceil_div(pixels, kPixels), count = outputs.size();
  std::vector<double> sums(tasks * count * 2, 0.0);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch((kBlock + 1 + count) * kTilePixels);
    float *gathered = scratch.take(kBlock * kTilePixels), *q = scratch.take(kTilePixels);
    float* y_old = scratch.take(count * kTilePixels);
    std::fill_n(gathered, kBlock * kTilePixels, 0.0f);
    const float *x_at[kTilePixels], *y_at[kTilePixels];
    for (int64_t first = begin * kPixels; first < std::min(end * kPixels, pixels); first += kTilePixels) {
      const int64_t n = std::min(kTilePixels, pixels - first), columns = ceil_div(n, kGroup);
      for (int64_t p = 0; p < n; ++p) {
        const int64_t pixel = first + p, image = pixel / (height * width), y = pixel / width % height, i = pixel % width;
        x_at[p] = reinterpret_cast<const float*>(in.at(image, 0, y * stride[0])) + i * stride[1] * in.w;
        y_at[p] = reinterpret_cast<const float*>(fresh.at(image, 0, y)) + i * fresh.w;
      }
      int64_t held = -1;  // which group of channels was gathered last
      for (int64_t o = 0; o < count; ++o) {
        const int64_t c = outputs[o], group = c / kBlock * kBlock;
        if (held != group) {
          layer.loops.gather(y_at, n, group, std::min(kBlock, out_channels - group), fresh.c, gathered);
          held = group;
        }
        layer.loops.scale(
            y_old + o * kTilePixels, gathered + (c - group) * kTilePixels, layer.update.alpha[c], layer.rest_of_bias(c),
            kTilePixels);
      }
      held = -1;
      std::array<float, kGroup> scale, offset;  // of one channel's BatchNorm, beside 16 of its pixels
      const FrontLanes lanes{scale.data(), offset.data(), nullptr};
      for (int64_t j = 0; j < in_channels; ++j) {
        if (taps[j].empty()) {
          continue;
        }
        const int64_t group = j / kBlock * kBlock;
        if (held != group) {
          layer.loops.gather(x_at, n, group, std::min(kBlock, in_channels - group), in.c, gathered);
          held = group;
        }
        scale.fill(layer.input.front.alpha[j]);
        offset.fill(layer.input.front.shift[j]);
        layer.kernels.quantize(
            {gathered + (j - group) * kTilePixels, 0, kGroup}, {q, 0, kGroup}, columns, 1, layer.input.quantizer, lanes);
        layer.loops.add_taps(y_old, q, taps[j].data(), taps[j].size());
      }
      double* into = sums.data() + first / kPixels * count * 2;
      for (int64_t o = 0; o < count; ++o) {
        layer.loops.add_run_moments(y_old + o * kTilePixels, layer.shift[outputs[o]], n, into[2 * o], into[2 * o + 1]);
      }
    }
  });
  std::vector<double> first(count, 0.0), second(count, 0.0);
  std::vector<float> shift(count);
  for (int64_t o = 0; o < count; ++o) {
    shift[o] = layer.shift[outputs[o]];
    for (int64_t task = 0; task < tasks; ++task) {
      first[o] += sums[(task * count + o) * 2];
      second[o] += sums[(task * count + o) * 2 + 1];
    }
  }
  const Moments found(first, second, shift, static_cast<double>(pixels));
  for (int64_t o = 0; o < count; ++o) {
    old.mean[outputs[o]] = found.mean[o];
    old.variance[outputs[o]] = found.variance[o];
  }
}

}  // namespace profit::cpu
