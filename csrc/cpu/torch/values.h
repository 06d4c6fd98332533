// A layer as values, in the order of all schemas: norm, quantizer, weight, bias, convolution.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace profit::cpu {

using torch::stable::Tensor;

// [C] each; without mean there is no BatchNorm.
struct Norm {
  std::optional<Tensor> mean, invstd, gamma, beta;

  static constexpr auto fields() { return std::tuple{&Norm::mean, &Norm::invstd, &Norm::gamma, &Norm::beta}; }
};

// The activation and the quantizer behind it; without bits the activation alone. a, c: raw, one value each.
struct RawQuantizer {
  std::optional<Tensor> a, c;
  std::optional<int64_t> bits;
  bool is_signed;
  double offset;
  int64_t activation;

  static constexpr auto fields() {
    using Q = RawQuantizer;
    return std::tuple{&Q::a, &Q::c, &Q::bits, &Q::is_signed, &Q::offset, &Q::activation};
  }
};

// stride, dilation: (h, w). padding: (left, right, top, bottom).
struct Convolution {
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
  double pad_value;

  static constexpr auto fields() {
    using C = Convolution;
    return std::tuple{&C::stride, &C::padding, &C::dilation, &C::groups, &C::pad_value};
  }
};

}  // namespace profit::cpu
