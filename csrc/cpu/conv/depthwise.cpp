// The depthwise convolution on the CPU, row by row: nothing is materialised but the output and the input's gradient. The
// backward computes the quantized input anew from x. The inner loops are in conv/loops.h and conv/row_loops.h.
#include "depthwise.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../norm/front.h"
#include "../torch/check.h"
#include "../torch/layout.h"
#include "../torch/parameters.h"
#include "plan.h"
#include "rows.h"

namespace profit::cpu {

namespace {

using torch::headeronly::ScalarType;

// c10::TensorImpl::is_channels_last as torch's convolution asks for it.
bool suggests_channels_last(const Tensor& t) {
  int64_t least = 0;
  if (t.stride(1) == 0) {
    return false;
  }
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) == 0 || t.stride(d) < least || (d == 0 && least == t.stride(1))) {
      return false;
    }
    least = t.stride(d) * std::max<int64_t>(1, t.size(d));
  }
  return true;
}

// [N, channels, h, w] of the dtype of x and the memory format that torch's own convolution would choose.
Tensor empty(const Tensor& x, const Tensor& weight, int64_t channels, int64_t h, int64_t w) {
  const bool last = suggests_channels_last(x) || suggests_channels_last(weight);
  const std::vector<int64_t> sizes = {x.size(0), channels, h, w};
  return torch::stable::empty(
      sizes, x.scalar_type(), std::nullopt, std::nullopt, std::nullopt,
      last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
}

// Everything a task of the backward adds to its sums in; one per task, added in order afterwards.
struct Partials {
  int64_t taps, width;
  std::vector<float> weight;   // [part][block][tap][lane]
  std::vector<float> bias;     // [part][block][lane]
  std::vector<double> a, c;    // [task]
  std::vector<double> g, gx;   // [part][block][lane]: of dL/dv and dL/dv * (x - mean)

  Partials(const Plan& plan, int64_t taps)
      : taps(taps),
        width(plan.width()),
        weight(plan.tasks() * taps * plan.width(), 0.0f),
        bias(plan.tasks() * plan.width(), 0.0f),
        a(plan.tasks(), 0.0),
        c(plan.tasks(), 0.0),
        g(plan.tasks() * plan.width(), 0.0),
        gx(g.size(), 0.0) {}
};

// [part][block][row][lane] -> [channel][row], a float32 tensor of `like`'s shape.
Tensor total(const std::vector<float>& partial, const Plan& plan, int64_t rows, const Tensor& like) {
  std::vector<double> sums(plan.blocks * rows * plan.width(), 0.0);
  const int64_t size = sums.size();
  for (int64_t part = 0; part < plan.chunks * plan.bands; ++part) {
    for (int64_t i = 0; i < size; ++i) {
      sums[i] += partial[part * size + i];
    }
  }
  Tensor result = torch::stable::empty(like.sizes(), ScalarType::Float);
  float* to = static_cast<float*>(result.mutable_data_ptr());
  for (int64_t ch = 0; ch < plan.channels; ++ch) {
    const double* from = sums.data() + (ch / plan.lanes) * rows * plan.width() + ch % plan.lanes;
    for (int64_t row = 0; row < rows; ++row) {
      to[ch * rows + row] = static_cast<float>(from[row * plan.width()]);
    }
  }
  return result;
}

// [part][block][lane] -> [input channel]: the filters of one are added up.
std::vector<double> per_input_channel(const std::vector<double>& partial, const Plan& plan, int64_t multiplier) {
  std::vector<double> sums(plan.channels / multiplier, 0.0);
  for (int64_t part = 0; part < plan.chunks * plan.bands; ++part) {
    for (int64_t c = 0; c < plan.channels; ++c) {
      sums[c / multiplier] += partial[(part * plan.blocks + c / plan.lanes) * plan.width() + c % plan.lanes];
    }
  }
  return sums;
}

// `from` in the dtype and with the strides of `like`.
Tensor like(const Tensor& like, const Tensor& from) {
  if (like.scalar_type() == from.scalar_type() && same_strides(like, from)) {
    return from;
  }
  Tensor to = torch::stable::empty_like(like);
  torch::stable::copy_(to, from);
  return to;
}

}  // namespace

Tensor block_depthwise(Depthwise layer) {
  const auto& [x, norm, quantizer, weight, bias, convolution] = layer;
  const Geometry g = geometry(x, weight, convolution);
  const InputSide input("depthwise", Front(g.in_channels, norm), quantizer);
  Tensor y = empty(x, weight, g.channels(), g.out_height, g.out_width);
  const Plan plan(g, g.out_height, g.height * g.width);
  if (plan.tasks() == 0) {
    return y;
  }
  const auto type = x.scalar_type();
  const std::vector<float> w = pack(weight, type, plan, g.taps());
  const std::vector<float> b =
      bias.has_value() ? pack(*bias, type, plan, 1) : std::vector<float>(plan.blocks * plan.width(), 0.0f);
  const PackedFront front(input.front, plan, g.multiplier);
  const RowKernels kernels = row_kernels(
      type, {input.quantized, input.front.present, false}, input.activation, input.quantizer, g.row_taps());
  const TensorRows in = TensorRows::of(x, false), out = TensorRows::of(y, true);

  const float border = rounded(static_cast<float>(convolution.pad_value), kernels);
  torch::stable::parallel_for(0, plan.tasks(), 1, [&](int64_t begin, int64_t end) {
    const int64_t row_floats = plan.groups * g.out_width * kGroup;
    Scratch scratch(QuantizedRows::floats(g, plan) + Scratch::rounded(row_floats));
    QuantizedRows rows(g, plan, kernels, input.quantizer, front, in, border, scratch);
    float* buffer = scratch.take(row_floats);
    for (int64_t index = begin; index < end; ++index) {
      const Plan::Task task = plan.task(index);
      const bool in_place = out.in_place(task, 1);
      for (int64_t image = task.first_image; image < task.end_image; ++image) {
        rows.start(task, image);
        for (int64_t row = task.first_row; row < task.end_row; ++row) {
          char* to = out.at(image, task.first_channel, row);
          const Lanes lanes = in_place ? Lanes{reinterpret_cast<float*>(to), kGroup, out.w, out.h}
                                       : Lanes{buffer, g.out_width * kGroup, kGroup};
          kernels.forward(
              rows.window(row * g.stride_h), rows.group_stride(), w.data() + task.block * g.taps() * plan.width(),
              plan.width(), b.data() + task.block * plan.width(), lanes, g.out_width, task.groups, g.row_taps());
          if (!in_place) {
            kernels.store(buffer, to, out.strides(), g.out_width, task.channels, task.groups, 1);
          }
        }
      }
    }
  });
  return y;
}

SevenGradients block_depthwise_backward(Tensor grad, Depthwise layer, bool of_batch, bool need_weight) {
  const auto& [x, norm, quantizer, weight, bias, convolution] = layer;
  const Geometry g = geometry(x, weight, convolution);
  const InputSide input("depthwise", Front(g.in_channels, norm), quantizer);
  PROFIT_CHECK(
      grad.is_cpu() && grad.scalar_type() == x.scalar_type() && grad.dim() == 4 && grad.size(0) == g.images &&
          grad.size(1) == g.channels() && grad.size(2) == g.out_height && grad.size(3) == g.out_width,
      "depthwise: grad must have the shape of the output and the dtype of x");
  Tensor gx = empty(x, weight, g.in_channels, g.height, g.width);
  const Plan plan(g, g.padded_height(), g.height * g.width);
  const auto type = x.scalar_type();
  const std::vector<float> w = pack(weight, type, plan, g.taps());
  const PackedFront front(input.front, plan, g.multiplier);
  const RowKernels kernels = row_kernels(
      type, {input.quantized, input.front.present, need_weight}, input.activation, input.quantizer, g.row_taps());
  const TensorRows in = TensorRows::of(x, false), upstream = TensorRows::of(grad, false), out = TensorRows::of(gx, true);

  const float border = rounded(static_cast<float>(convolution.pad_value), kernels);
  Partials partials(plan, g.taps());
  torch::stable::parallel_for(0, plan.tasks(), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(GradientRows::floats(g, plan) + KeptRow::floats(g, plan));
    GradientRows gradient(g, plan, kernels, upstream, scratch);
    KeptRow row(g, plan, kernels, input.quantizer, front, in, out, border, scratch);
    for (int64_t index = begin; index < end; ++index) {
      const Plan::Task task = plan.task(index);
      const float* weights = w.data() + task.block * g.taps() * plan.width();
      float* gw = partials.weight.data() + (task.part * plan.blocks + task.block) * g.taps() * plan.width();
      float* gb = partials.bias.data() + (task.part * plan.blocks + task.block) * plan.width();
      row.start_task(task);
      for (int64_t image = task.first_image; image < task.end_image; ++image) {
        gradient.start(task, image);
        // Row `padded` of the padded input meets kernel row ky in output row (padded - ky * dilation) / stride.
        for (int64_t padded = task.first_row; padded < task.end_row; ++padded) {
          const bool inside = g.top <= padded && padded < g.top + g.height;
          if (inside) {
            row.load(image, padded - g.top);
          }
          for (int64_t ky = 0; ky < g.kh; ++ky) {
            const int64_t at = padded - ky * g.dilation_h;
            if (at < 0 || at % g.stride_h != 0 || at / g.stride_h >= g.out_height) {
              continue;
            }
            const float* upstream_row = gradient.row(at / g.stride_h);
            const float* sums = gradient.sums(at / g.stride_h);
            float* gw_ky = gw + ky * g.kw * plan.width();
            if (inside) {
              kernels.backward(
                  upstream_row, row.q(), row.gq(), row.group_stride(), weights + ky * g.kw * plan.width(), gw_ky,
                  plan.width(), g.out_width, task.groups, g.row_taps());
            } else {
              for (int64_t kx = 0; kx < g.kw; ++kx) {
                for (int64_t i = 0; i < task.channels; ++i) {
                  gw_ky[kx * plan.width() + i] += border * sums[i];
                }
              }
            }
            for (int64_t i = 0; ky == 0 && i < task.channels; ++i) {
              gb[i] += sums[i];
            }
          }
          if (inside) {
            row.finish(image, padded - g.top);
          }
        }
      }
      row.sums(partials.a[index], partials.c[index]);
      if (input.front.present) {
        const int64_t at = (task.part * plan.blocks + task.block) * plan.width();
        std::copy_n(row.sums_g(), task.channels, partials.g.data() + at);
        std::copy_n(row.sums_gx(), task.channels, partials.gx.data() + at);
      }
    }
  });

  std::optional<Tensor> g_gamma, g_beta, ga, gc, gw, gb;
  if (input.quantized) {
    double dA = 0, dC = 0;
    for (int64_t i = 0; i < plan.tasks(); ++i) {
      dA -= partials.a[i];
      dC += partials.c[i] / input.quantizer.s;
    }
    ga = parameter_grad<float>(*quantizer.a, {dA});
    gc = parameter_grad<float>(*quantizer.c, {dC});
  }
  if (need_weight) {
    gw = like(weight, total(partials.weight, plan, g.taps(), weight));
  }
  if (bias.has_value()) {
    gb = like(*bias, total(partials.bias, plan, 1, *bias));
  }
  if (input.front.present) {
    // The gradient has the memory format of torch's convolution, which goes by the weight as well.
    std::tie(g_gamma, g_beta) = finish_batch_norm(
        gx, like(gx, x), input.front, per_input_channel(partials.g, plan, g.multiplier),
        per_input_channel(partials.gx, plan, g.multiplier), norm, of_batch);
  }
  return {gx, g_gamma, g_beta, ga, gc, gw, gb};
}

}  // namespace profit::cpu
