// Sums of products of bytes: activations' codes (0 to 255) by weights' codes (-127 to 127), in 32-bit integers.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace profit::cpu {

// Output channels beside each other: those of a register, and the registers of a full panel.
constexpr int64_t kColumns = 16, kPanelRegisters = 4;
// Rows are read in groups of at most this many: so many must be readable behind the last.
constexpr int64_t kMostRowsAtOnce = 16;

// The codes of a weight [C_out, C]: in panels of up to 64 output channels, in each four input channels of every output channel
// after another. Each panel is filled up to whole registers with zeros.
struct PackedWeight {
  int64_t outputs, inputs;
  std::vector<int8_t> codes;
  std::vector<int32_t> sums;  // per output channel
  std::vector<char> has_nan;  // per output channel

  // weight: [C_out, C], C a multiple of 4; step: per output channel, finite and not 0.
  PackedWeight(const float* weight, int64_t outputs, int64_t inputs, const std::vector<float>& step);

  int64_t room() const { return (outputs + kColumns - 1) / kColumns * kColumns; }
};

// An output channel's result from its sum of products: scale * (start + sum) + shift. Room for whole registers.
struct Epilogue {
  std::vector<int32_t> start;
  std::vector<float> scale, shift;
};

// y[row][o] for `rows` rows of codes [rows][C], from a processor that has byte products (isa.h).
void pointwise_products(const uint8_t* codes, int64_t rows, const PackedWeight& weight, const Epilogue& epilogue, float* y);

}  // namespace profit::cpu
