// The whole block where the convolution is pointwise, in integers: BatchNorm, activation and DuQ give codes, whose products with
// the weight's codes are summed exactly. Nothing is materialised but the output.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "../torch/values.h"

namespace profit::cpu {

using torch::stable::Tensor;

// What block_pointwise takes, as the schema has it. x: [N, C, H, W] float32, channels_last. weight: [C_out, C, 1, 1] float32,
// quantized to `weight_bits` with the raw scale c_w (one value or C_out).
struct Pointwise {
  Tensor x;
  Norm norm;
  Tensor weight, c_w;
  int64_t weight_bits;
  Tensor a, c;
  std::optional<Tensor> bias;
  int64_t bits;
  bool is_signed;
  double offset;
  int64_t activation;

  static constexpr auto fields() {
    using P = Pointwise;
    return std::tuple{&P::x, &P::norm, &P::weight, &P::c_w, &P::weight_bits, &P::a, &P::c, &P::bias, &P::bits,
                      &P::is_signed, &P::offset, &P::activation};
  }
  RawQuantizer quantizer() const { return {a, c, bits, is_signed, offset, activation}; }
};

// y = conv(block_input(x), weight) + bias, written to y [N, C_out, H, W], channels_last.
// False, with y untouched, where the processor or the values ask for another way: no byte products, C no multiple of 4,
// intervals or scales beyond 2^-60 .. 2^60.
bool block_pointwise(Tensor y, Pointwise problem);

}  // namespace profit::cpu
