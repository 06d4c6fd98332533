// BatchNorm, activation and DuQ on the CPU in one pass forward and two backward. The inner loops are in norm/loops.h.
#include "input.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <numeric>
#include <tuple>
#include <vector>

#include "../torch/check.h"
#include "../torch/layout.h"
#include "front.h"
#include "kernels.h"
#include "walk.h"

namespace profit::cpu {

namespace {

using torch::headeronly::ScalarType;

// Additions in float32 to a sum beside a lane before it goes on in double.
constexpr int64_t kAdditions = 64;

void check_input(const Tensor& x) {
  const auto type = x.scalar_type();
  PROFIT_CHECK(x.dim() == 4, "block: x must be [N, C, H, W]");
  PROFIT_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
      "block: x must be float32, bfloat16 or float16");
  PROFIT_CHECK(
      x.is_contiguous() || (is_dense(x) && (x.size(1) == 1 || x.stride(1) == 1)),
      "block: x must be contiguous or channels_last");
}

// Tiles of a tensor of any of the types as floats: in place, or by way of a buffer.
class Tiles {
 public:
  Tiles(const Tensor& t, bool writable, const BlockKernels& kernels, int64_t size)
      : data_(static_cast<char*>(writable ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr()))),
        is_float_(t.scalar_type() == ScalarType::Float),
        kernels_(kernels),
        buffer_(is_float_ ? 0 : size) {}

  // Where the floats of the tile may be written.
  float* room(int64_t at) { return is_float_ ? reinterpret_cast<float*>(data_) + at : buffer_.data(); }
  float* load(int64_t at, int64_t n) {
    if (!is_float_) {
      kernels_.widen(data_ + at * 2, buffer_.data(), n);
    }
    return room(at);
  }
  void store(int64_t at, int64_t n) {
    if (!is_float_) {
      kernels_.narrow(buffer_.data(), data_ + at * 2, n);
    }
  }

 private:
  char* data_;
  bool is_float_;
  const BlockKernels& kernels_;
  std::vector<float> buffer_;
};

// Sums of a channel over its parts, in order.
std::vector<double> total(const Walk& walk, const std::vector<double>& partial) {
  std::vector<double> sums(walk.channels(), 0.0);
  for (int64_t part = 0; part < walk.parts(); ++part) {
    for (int64_t i = 0; i < walk.channels(); ++i) {
      sums[i] += partial[part * walk.channels() + i];
    }
  }
  return sums;
}

Tensor from_values(const std::vector<double>& values, ScalarType type) {
  Tensor t = torch::stable::empty({static_cast<int64_t>(values.size())}, ScalarType::Float);
  float* to = static_cast<float*>(t.mutable_data_ptr());
  for (size_t i = 0; i < values.size(); ++i) {
    to[i] = static_cast<float>(values[i]);
  }
  return type == ScalarType::Float ? t : torch::stable::to(t, type);
}

// The per-channel sums of a backward, and those of the quantizer.
struct BackwardSums {
  std::vector<double> g, gx;  // [part][channel]: of dL/dv, and of dL/dv * (x - mean)
  std::vector<double> a, c;   // [task]: the terms of -dL/dA and of s * dL/dC

  explicit BackwardSums(const Walk& walk)
      : g(walk.parts() * walk.channels(), 0.0), gx(g.size(), 0.0), a(walk.tasks(), 0.0), c(walk.tasks(), 0.0) {}
};

// The first pass of the backward: gx = alpha * dL/dv.
void first_pass(
    const Walk& walk, const Tensor& grad, Tensor& gx, const Tensor& x, const InputSide& input, const BlockKernels& kernels,
    BackwardSums& sums) {
  walk.parallel([&](int64_t begin, int64_t end) {
    const int64_t room = walk.room();
    Tiles from(x, false, kernels, walk.tile()), upstream(grad, false, kernels, walk.tile());
    Tiles to(gx, true, kernels, walk.tile());
    std::vector<float> lane_sums(4 * room, 0.0f);
    const LaneSums lane{lane_sums.data(), lane_sums.data() + room, lane_sums.data() + 2 * room, lane_sums.data() + 3 * room};
    for (int64_t task = begin; task < end; ++task) {
      const auto alpha = walk.spread(input.front.alpha, task), shift = walk.spread(input.front.shift, task);
      const auto mean = walk.spread(input.front.mean, task);
      double* g = sums.g.data() + walk.part(task) * walk.channels();
      double* g_centred = sums.gx.data() + walk.part(task) * walk.channels();
      const auto flush = [&] {
        walk.gather(lane.g, task, g);
        walk.gather(lane.gx, task, g_centred);
        sums.a[task] = std::accumulate(lane.a, lane.a + room, sums.a[task]);
        sums.c[task] = std::accumulate(lane.c, lane.c + room, sums.c[task]);
        std::fill(lane_sums.begin(), lane_sums.end(), 0.0f);
      };
      int64_t added = 0;
      walk.tiles(task, [&](int64_t at, int64_t lanes, int64_t rows) {
        if (added + rows > kAdditions) {
          flush();
          added = 0;
        }
        const Tile tile{lanes, rows};
        kernels.input_backward(
            upstream.load(at, tile.size()), to.room(at), from.load(at, tile.size()), tile,
            {alpha.data(), shift.data(), mean.data()}, input.quantizer, lane);
        to.store(at, tile.size());
        added += rows;
      });
      flush();
    }
  });
}

}  // namespace

std::pair<std::optional<Tensor>, std::optional<Tensor>> finish_batch_norm(
    Tensor& grad, const Tensor& x, const Front& front, const std::vector<double>& of_g, const std::vector<double>& of_gx,
    const Norm& norm, bool of_batch) {
  const Walk walk(x);
  const double n = static_cast<double>(walk.samples());
  std::vector<double> g_gamma(walk.channels());
  std::vector<float> slope(walk.channels()), constant(walk.channels());
  for (int64_t i = 0; i < walk.channels(); ++i) {
    g_gamma[i] = of_gx[i] * front.invstd[i];
    slope[i] = static_cast<float>(-front.alpha[i] * front.invstd[i] * g_gamma[i] / n);
    constant[i] = static_cast<float>(-front.alpha[i] * of_g[i] / n);
  }
  if (of_batch) {
    const BlockKernels kernels = block_kernels(x.scalar_type(), false, Activation::none, {});
    walk.parallel([&](int64_t begin, int64_t end) {
      Tiles from(x, false, kernels, walk.tile()), gradient(grad, true, kernels, walk.tile());
      for (int64_t task = begin; task < end; ++task) {
        const auto mean = walk.spread(front.mean, task), slopes = walk.spread(slope, task);
        const auto constants = walk.spread(constant, task);
        walk.tiles(task, [&](int64_t at, int64_t lanes, int64_t rows) {
          const Tile tile{lanes, rows};
          kernels.finish(
              gradient.load(at, tile.size()), from.load(at, tile.size()), tile, slopes.data(), mean.data(), constants.data());
          gradient.store(at, tile.size());
        });
      }
    });
  }
  std::optional<Tensor> of_gamma, of_beta;
  if (norm.gamma.has_value()) {
    of_gamma = from_values(g_gamma, norm.gamma->scalar_type());
  }
  if (norm.beta.has_value()) {
    of_beta = from_values(of_g, norm.beta->scalar_type());
  }
  return {of_gamma, of_beta};
}

std::tuple<Tensor, Tensor, Tensor> block_moments(Tensor x, double eps) {
  check_input(x);
  const Walk walk(x);
  const BlockKernels kernels = block_kernels(x.scalar_type(), false, Activation::none, {});
  std::vector<double> sums(walk.parts() * walk.channels(), 0.0), squares(sums.size(), 0.0);
  walk.parallel([&](int64_t begin, int64_t end) {
    Tiles from(x, false, kernels, walk.tile());
    std::vector<double> sum(walk.room()), square(walk.room());
    for (int64_t task = begin; task < end; ++task) {
      std::fill(sum.begin(), sum.end(), 0.0);
      std::fill(square.begin(), square.end(), 0.0);
      walk.tiles(task, [&](int64_t at, int64_t lanes, int64_t rows) {
        const Tile tile{lanes, rows};
        kernels.moments(from.load(at, tile.size()), tile, sum.data(), square.data());
      });
      walk.gather(sum.data(), task, sums.data() + walk.part(task) * walk.channels());
      walk.gather(square.data(), task, squares.data() + walk.part(task) * walk.channels());
    }
  });
  std::vector<double> mean = total(walk, sums), var = total(walk, squares), invstd(walk.channels());
  const double n = static_cast<double>(walk.samples());
  for (int64_t i = 0; i < walk.channels(); ++i) {
    mean[i] /= n;
    const double biased = var[i] / n - mean[i] * mean[i];
    invstd[i] = 1.0 / std::sqrt((biased < 0 ? 0 : biased) + eps);
    var[i] = (biased < 0 ? 0 : biased) * (n / (n - 1));
  }
  return {from_values(mean, ScalarType::Float), from_values(var, ScalarType::Float), from_values(invstd, ScalarType::Float)};
}

Tensor block_input(Tensor x, Norm norm, RawQuantizer quantizer) {
  check_input(x);
  const Walk walk(x);
  const InputSide input("block", Front(walk.channels(), norm), quantizer);
  const Front& front = input.front;
  const auto kernels = block_kernels(x.scalar_type(), input.quantized, input.activation, input.quantizer);
  Tensor y = torch::stable::empty_like(x);
  walk.parallel([&](int64_t begin, int64_t end) {
    Tiles from(x, false, kernels, walk.tile()), to(y, true, kernels, walk.tile());
    for (int64_t task = begin; task < end; ++task) {
      const auto alpha = walk.spread(front.alpha, task), shift = walk.spread(front.shift, task);
      walk.tiles(task, [&](int64_t at, int64_t lanes, int64_t rows) {
        const Tile tile{lanes, rows};
        kernels.input(
            from.load(at, tile.size()), to.room(at), tile, {alpha.data(), shift.data(), nullptr}, input.quantizer);
        to.store(at, tile.size());
      });
    }
  });
  return y;
}

std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>> block_input_backward(
    Tensor grad, Tensor gx, Tensor x, Norm norm, RawQuantizer quantizer, bool of_batch) {
  check_input(x);
  PROFIT_CHECK(
      grad.scalar_type() == x.scalar_type() && grad.numel() == x.numel() && same_strides(grad, x) &&
          gx.scalar_type() == x.scalar_type() && gx.numel() == x.numel() && same_strides(gx, x),
      "block: grad and gx must have the shape, dtype and strides of x");
  const Walk walk(x);
  const InputSide input("block", Front(walk.channels(), norm), quantizer);
  const Front& front = input.front;
  const auto kernels = block_kernels(x.scalar_type(), input.quantized, input.activation, input.quantizer);
  BackwardSums sums(walk);
  first_pass(walk, grad, gx, x, input, kernels, sums);

  std::optional<Tensor> g_gamma, g_beta, ga, gc;
  if (input.quantized) {
    double dA = 0, dC = 0;
    for (int64_t task = 0; task < walk.tasks(); ++task) {
      dA -= sums.a[task];
      dC += sums.c[task] / input.quantizer.s;
    }
    ga = parameter_grad<float>(*quantizer.a, {dA});
    gc = parameter_grad<float>(*quantizer.c, {dC});
  }
  if (!front.present) {
    return {g_gamma, g_beta, ga, gc};
  }
  std::tie(g_gamma, g_beta) =
      finish_batch_norm(gx, x, front, total(walk, sums.g), total(walk, sums.gx), norm, of_batch);
  return {g_gamma, g_beta, ga, gc};
}

}  // namespace profit::cpu
