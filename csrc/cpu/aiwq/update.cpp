// AIWQ from the update of the weight: for any scalar alpha of an output channel,
//
//     y_old = alpha * (y_new - b) + conv(x, w_old - alpha * w_new) + b
//
// With alpha the ratio of the two scales, w_old - alpha * w_new is 0 but for the codes that changed, about one in a hundred. A
// channel without any has a closed form. The convolution runs on the others: for depthwise layers on the groups of channels that
// hold one, for pointwise layers tap by tap, over 64 pixels at a time.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#include "../torch/check.h"
#include "aiwq.h"
#include "update.h"

namespace profit::cpu {

namespace {

using torch::headeronly::ScalarType;

// Pixels whose sums make one partial sum of a pointwise layer.
constexpr int64_t kPixels = 256;
// Above this share of changed weights a dense convolution is faster.
constexpr double kDense = 0.15;

// w_old = alpha * w_new + delta, per output channel.
struct Update {
  int64_t taps;
  std::vector<float> alpha;
  std::vector<int64_t> changed;  // weights that differ, per channel
  std::vector<int64_t> place;    // of the differences of a channel that has any, in `delta`
  std::vector<float> delta;

  Update(const Tensor& fresh, const Tensor& old, const RowKernels& kernels)
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
        largest_new[c] = kernels.largest(w_new + c * taps, taps);
        largest_old[c] = kernels.largest(w_old + c * taps, taps);
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
        changed[c] = kernels.differences(from, to, whole, nullptr, taps);
        const float own = ratio(largest_new[c], largest_old[c]);
        if (changed[c] > 0 && own != whole) {
          const int64_t count = kernels.differences(from, to, own, nullptr, taps);
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
          kernels.differences(w_new + c * taps, w_old + c * taps, alpha[c], delta.data() + place[c], taps);
        }
      }
    });
  }

  // The differences of a channel that has any.
  const float* of(int64_t c) const { return delta.data() + place[c]; }

  double share() const {
    int64_t sum = 0;
    for (const int64_t n : changed) {
      sum += n;
    }
    return static_cast<double>(sum) / static_cast<double>(std::max<int64_t>(1, taps * changed.size()));
  }
};

// Contiguous float32.
Tensor plain(const Tensor& t) {
  const Tensor same = t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
  return same.is_contiguous() ? same : torch::stable::contiguous(same);
}

struct Layer {
  const Tensor &x, &y_new;
  const Update& update;
  const std::vector<float>& bias;
  const InputSide& input;
  const RowKernels& kernels;
  const std::vector<float>& shift;

  // What alpha leaves of the bias.
  float rest_of_bias(int64_t c) const { return (1.0f - update.alpha[c]) * bias[c]; }
};

// Moments of the channels whose weights changed; those of the others are left as they are.
void depthwise(const Layer& layer, const Geometry& g, float border, Moments& old) {
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
          layer.kernels.add_scaled_lanes(
              lanes, beside, alpha.data() + task.block * plan.width(), rest.data() + task.block * plan.width(),
              g.out_width, task.groups);
          const ConstLanes done{row_old, g.out_width * kGroup, kGroup};
          layer.kernels.add_moments(
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

void pointwise(const Layer& layer, const std::vector<int64_t>& stride, Moments& old) {
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
    Scratch scratch((kBlock + 1 + count) * kTile);
    float *gathered = scratch.take(kBlock * kTile), *q = scratch.take(kTile), *y_old = scratch.take(count * kTile);
    std::fill_n(gathered, kBlock * kTile, 0.0f);
    const float *x_at[kTile], *y_at[kTile];
    for (int64_t first = begin * kPixels; first < std::min(end * kPixels, pixels); first += kTile) {
      const int64_t n = std::min(kTile, pixels - first), columns = ceil_div(n, kGroup);
      for (int64_t p = 0; p < n; ++p) {
        const int64_t pixel = first + p, image = pixel / (height * width), y = pixel / width % height, i = pixel % width;
        x_at[p] = reinterpret_cast<const float*>(in.at(image, 0, y * stride[0])) + i * stride[1] * in.w;
        y_at[p] = reinterpret_cast<const float*>(fresh.at(image, 0, y)) + i * fresh.w;
      }
      int64_t held = -1;  // which group of channels was gathered last
      for (int64_t o = 0; o < count; ++o) {
        const int64_t c = outputs[o], group = c / kBlock * kBlock;
        if (held != group) {
          layer.kernels.gather(y_at, n, group, std::min(kBlock, out_channels - group), fresh.c, gathered);
          held = group;
        }
        layer.kernels.scale(
            y_old + o * kTile, gathered + (c - group) * kTile, layer.update.alpha[c], layer.rest_of_bias(c), kTile);
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
          layer.kernels.gather(x_at, n, group, std::min(kBlock, in_channels - group), in.c, gathered);
          held = group;
        }
        scale.fill(layer.input.front.alpha[j]);
        offset.fill(layer.input.front.shift[j]);
        layer.kernels.quantize(
            {gathered + (j - group) * kTile, 0, kGroup}, {q, 0, kGroup}, columns, 1, layer.input.quantizer, lanes);
        layer.kernels.add_taps(y_old, q, taps[j].data(), taps[j].size());
      }
      double* into = sums.data() + first / kPixels * count * 2;
      for (int64_t o = 0; o < count; ++o) {
        layer.kernels.add_run_moments(y_old + o * kTile, layer.shift[outputs[o]], n, into[2 * o], into[2 * o + 1]);
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

}  // namespace

std::optional<Tensor> aiwq_update(
    Tensor x, Tensor y_new, Tensor weight_old, Tensor weight_new, std::optional<Tensor> bias,
    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
    double pad_value, std::optional<Tensor> a_x, std::optional<Tensor> c_x, std::optional<int64_t> act_bits,
    bool is_signed, double offset, int64_t activation, double eps, std::optional<Tensor> mean, std::optional<Tensor> invstd,
    std::optional<Tensor> gamma, std::optional<Tensor> beta) {
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
  const InputSide input(
      "aiwq", Front(x.size(1), mean, invstd, gamma, beta), a_x, c_x, act_bits, is_signed, offset, activation);
  const Wanted wanted = {input.quantized, input.front.present, false};
  if (!is_depthwise && is_wide(x, weight_old, stride)) {
    const RowKernels kernels = row_kernels(ScalarType::Float, wanted, input.activation, input.quantizer, {1, 1, 1, 1});
    const auto [fresh, old] = wide_moments(
        x, static_cast<const float*>(w_new.const_data_ptr()), static_cast<const float*>(w_old.const_data_ptr()), b, input,
        kernels);
    return kl(fresh, old, eps);
  }
  const Update update(w_new, w_old, plain_kernels(ScalarType::Float));
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
    const Geometry g = geometry(x, weight_old, stride, padding, dilation);
    PROFIT_CHECK(
        y_new.size(0) == g.images && y_new.size(2) == g.out_height && y_new.size(3) == g.out_width,
        "aiwq: y_new must have the shape of the layer's output");
    const RowKernels kernels = row_kernels(ScalarType::Float, wanted, input.activation, input.quantizer, g.row_taps());
    shift.resize(shift.size() + kGroup + g.multiplier, 0.0f);
    depthwise({x, y_new, update, b, input, kernels, shift}, g, static_cast<float>(pad_value), old);
  } else {
    const RowKernels kernels = row_kernels(ScalarType::Float, wanted, input.activation, input.quantizer, {1, 1, 1, 1});
    pointwise({x, y_new, update, b, input, kernels, shift}, stride, old);
  }
  return kl(fresh, old, eps);
}

}  // namespace profit::cpu
