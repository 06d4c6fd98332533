#include "pointwise.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../norm/front.h"
#include "../norm/kernels.h"
#include "../norm/walk.h"
#include "../simd/isa.h"
#include "../torch/check.h"
#include "products.h"

namespace profit::cpu {

namespace {

using torch::headeronly::ScalarType;

// Bytes of codes that a thread makes before it multiplies them: they stay in the second-level cache beside a panel of weights.
constexpr int64_t kChunk = 32768;
// Chunks there should be at least, for the threads.
constexpr int64_t kChunks = 16;
// The channels whose products surely fit 32 bits.
constexpr int64_t kMostChannels = 65536;

// Whether the channels of a pixel lie together, and pixel by pixel.
bool is_last(const Tensor& x) {
  const int64_t strides[] = {x.size(1) * x.size(2) * x.size(3), 1, x.size(1) * x.size(3), x.size(1)};
  for (int64_t d = 0; d < 4; ++d) {
    if (x.size(d) > 1 && x.stride(d) != strides[d]) {
      return false;
    }
  }
  return true;
}

// The steps of the weight's codes, C / s, per output channel.
std::vector<float> weight_steps(const Tensor& c_w, int64_t bits, int64_t outputs) {
  std::vector<float> steps = values<float>(c_w);
  PROFIT_CHECK(
      steps.size() == 1 || static_cast<int64_t>(steps.size()) == outputs, "block: the weight's scale must have 1 or ", outputs,
      " values");
  for (float& step : steps) {
    step = softplus(step) / static_cast<float>(levels(bits, true));
  }
  steps.resize(outputs, steps[0]);
  return steps;
}

// y = step_x * step_w * (sum of codes' products) + d * step_w * (sum of the weight's codes) + bias. With `zero` added to the codes
// of x, the sum starts at -zero times that of the weight's codes.
Epilogue epilogue_of(
    const PackedWeight& weight, const std::vector<float>& steps, const Quantizer<float>& quantizer, int64_t zero,
    const std::optional<Tensor>& bias) {
  Epilogue e{
      std::vector<int32_t>(weight.room(), 0), std::vector<float>(weight.room(), 0.0f), std::vector<float>(weight.room(), 0.0f)};
  const std::vector<float> b = bias.has_value() ? values<float>(*bias) : std::vector<float>(weight.outputs, 0.0f);
  for (int64_t o = 0; o < weight.outputs; ++o) {
    const double step = weight.has_nan[o] ? std::numeric_limits<double>::quiet_NaN() : steps[o];
    e.start[o] = static_cast<int32_t>(-zero * weight.sums[o]);
    e.scale[o] = static_cast<float>(quantizer.step * step);
    e.shift[o] = static_cast<float>(quantizer.d * step * weight.sums[o] + b[o]);
  }
  return e;
}

// x on its way to codes: constants beside the lanes of as many pixels as fill whole registers.
class Input {
 public:
  Input(const InputSide& input, const Walk& walk, float zero)
      : input_(input),
        kernels_(block_kernels(ScalarType::Float, true, input.activation, input.quantizer)),
        channels_(walk.channels()),
        lanes_(walk.lanes()),
        zero_(zero),
        alpha_(walk.spread(input.front.alpha, 0)),
        shift_(walk.spread(input.front.shift, 0)) {}

  // The codes of `pixels` pixels; false where one is NaN.
  bool codes(const float* x, uint8_t* to, int64_t pixels) const {
    const int64_t n = pixels * channels_, rows = n / lanes_, rest = n % lanes_;
    bool all = tile(x, to, {lanes_, rows});
    return rest == 0 ? all : tile(x + rows * lanes_, to + rows * lanes_, {rest, 1}) && all;
  }

 private:
  bool tile(const float* x, uint8_t* to, const Tile& tile) const {
    return kernels_.codes(x, to, tile, {alpha_.data(), shift_.data(), nullptr}, input_.quantizer, zero_);
  }

  const InputSide& input_;
  BlockKernels kernels_;
  int64_t channels_, lanes_;
  float zero_;
  std::vector<float> alpha_, shift_;
};

}  // namespace

bool block_pointwise(
    Tensor y, Tensor x, Norm norm, RawQuantizer quantizer, Tensor weight, std::optional<Tensor> bias, Tensor c_w,
    int64_t weight_bits) {
  PROFIT_CHECK(
      x.scalar_type() == ScalarType::Float && y.scalar_type() == ScalarType::Float && weight.scalar_type() == ScalarType::Float,
      "block: integers serve float32");
  PROFIT_CHECK(2 <= weight_bits && weight_bits <= 8, "block: weight_bits must be 2 to 8, got ", weight_bits);
  PROFIT_CHECK(x.dim() == 4 && y.dim() == 4 && is_last(x) && is_last(y), "block: x and y must be channels_last");
  const int64_t channels = x.size(1), outputs = weight.size(0), pixels = x.numel() / std::max<int64_t>(1, channels);
  PROFIT_CHECK(
      weight.numel() == outputs * channels && y.numel() == pixels * outputs && y.size(1) == outputs,
      "block: weight and y must fit x");
  PROFIT_CHECK(!bias.has_value() || bias->numel() == outputs, "block: bias must have ", outputs, " values");
  if (!has_byte_products() || !quantizer.bits.has_value() || channels % 4 != 0 || channels > kMostChannels) {
    return false;
  }
  const InputSide input("block", Front(channels, norm), quantizer);
  const std::vector<float> steps = weight_steps(c_w, weight_bits, outputs);
  if (!input.quantizer.is_ordinary() || !is_ordinary<float>(input.quantizer.step) ||
      !std::all_of(steps.begin(), steps.end(), is_ordinary<float>)) {
    return false;
  }
  const Tensor dense = weight.is_contiguous() ? weight : torch::stable::contiguous(weight);
  const PackedWeight packed(static_cast<const float*>(dense.const_data_ptr()), outputs, channels, steps);
  const int64_t zero = quantizer.is_signed ? 128 : 0;
  const Epilogue epilogue = epilogue_of(packed, steps, input.quantizer, zero, bias);
  const Input codes_of(input, Walk(x), static_cast<float>(zero));

  const float* from = static_cast<const float*>(x.const_data_ptr());
  float* to = static_cast<float*>(y.mutable_data_ptr());
  const int64_t chunk = std::max<int64_t>(kMostRowsAtOnce, std::min(kChunk / channels, (pixels + kChunks - 1) / kChunks));
  const int64_t grain = std::max<int64_t>(1, 65536 / (chunk * (channels + outputs)));
  torch::stable::parallel_for(0, (pixels + chunk - 1) / chunk, grain, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> codes((chunk + kMostRowsAtOnce) * channels, 0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * chunk, rows = std::min(chunk, pixels - first);
      const float* source = from + first * channels;
      const bool all = codes_of.codes(source, codes.data(), rows);
      pointwise_products(codes.data(), rows, packed, epilogue, to + first * outputs);
      for (int64_t row = 0; row < rows && !all; ++row) {
        // All outputs of a pixel read all of its inputs.
        if (!codes_of.codes(source + row * channels, codes.data(), 1)) {
          std::fill_n(to + (first + row) * outputs, outputs, std::numeric_limits<float>::quiet_NaN());
        }
      }
    }
  });
  return true;
}

}  // namespace profit::cpu
