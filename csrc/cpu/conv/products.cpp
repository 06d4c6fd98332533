#include "products.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace profit::cpu {

PackedWeight::PackedWeight(const float* weight, int64_t outputs_, int64_t inputs_, const std::vector<float>& step)
    : outputs(outputs_), inputs(inputs_), codes(room() * inputs_, 0), sums(outputs_, 0), has_nan(outputs_, 0) {
  constexpr int64_t kPanel = kColumns * kPanelRegisters;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, inputs));
  torch::stable::parallel_for(0, outputs, grain, [&](int64_t begin, int64_t end) {
    std::vector<int8_t> row(inputs);
    for (int64_t o = begin; o < end; ++o) {
      const float* w = weight + o * inputs;
      const float inverse = 1.0f / step[o];
      int32_t sum = 0;
      float nothing = 0.0f;  // a NaN is seen in the sum of zeros
#pragma omp simd reduction(+ : sum, nothing)
      for (int64_t i = 0; i < inputs; ++i) {
        const float code = w[i] * inverse;
        nothing += code - code;
        // To the nearest integer, as in round_half_even; the value is one but for roundings.
        const int32_t whole = static_cast<int32_t>((code + 12582912.0f) - 12582912.0f);
        row[i] = static_cast<int8_t>(whole);
        sum += whole;
      }
      sums[o] = sum;
      has_nan[o] = !(nothing == 0.0f);
      const int64_t panel = o / kPanel * kPanel, width = std::min(kPanel, room() - panel);
      int8_t* to = codes.data() + panel * inputs + (o - panel) * 4;
      for (int64_t i = 0; i < inputs; i += 4) {
        std::memcpy(to + i * width, row.data() + i, 4);
      }
    }
  });
}

#if defined(__x86_64__)

namespace {

#define PROFIT_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

// `kRows` rows of codes by `kRegisters` registers of output channels; `count` rows and `columns` channels are written.
template <int kRows, int kRegisters>
PROFIT_VNNI void products(
    const uint8_t* codes, const int8_t* weight, int64_t inputs, const int32_t* start, const float* scale, const float* shift,
    float* y, int64_t stride, int64_t count, int64_t columns) {
  __m512i sums[kRows][kRegisters];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kRegisters; ++j) {
      sums[r][j] = _mm512_loadu_si512(start + j * kColumns);
    }
  }
  for (int64_t i = 0; i < inputs; i += 4) {
    __m512i w[kRegisters];
#pragma GCC unroll 4
    for (int j = 0; j < kRegisters; ++j) {
      w[j] = _mm512_loadu_si512(weight + j * kColumns * 4);
    }
    weight += kRegisters * kColumns * 4;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      int32_t four;
      std::memcpy(&four, codes + r * inputs + i, 4);
      const __m512i q = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int j = 0; j < kRegisters; ++j) {
        sums[r][j] = _mm512_dpbusd_epi32(sums[r][j], q, w[j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    if (r >= count) {
      return;
    }
#pragma GCC unroll 4
    for (int j = 0; j < kRegisters; ++j) {
      const int64_t left = std::clamp<int64_t>(columns - j * kColumns, 0, kColumns);
      const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
      const __m512 value = _mm512_cvtepi32_ps(sums[r][j]);
      const __m512 result = _mm512_add_ps(
          _mm512_mul_ps(value, _mm512_loadu_ps(scale + j * kColumns)), _mm512_loadu_ps(shift + j * kColumns));
      _mm512_mask_storeu_ps(y + r * stride + j * kColumns, mask, result);
    }
  }
}

template <int kRows, int kRegisters>
PROFIT_VNNI void panel(
    const uint8_t* codes, int64_t rows, const int8_t* weight, int64_t inputs, const int32_t* start, const float* scale,
    const float* shift, float* y, int64_t stride, int64_t columns) {
  for (int64_t row = 0; row < rows; row += kRows) {
    products<kRows, kRegisters>(
        codes + row * inputs, weight, inputs, start, scale, shift, y + row * stride, stride,
        std::min<int64_t>(kRows, rows - row), columns);
  }
}

#undef PROFIT_VNNI

}  // namespace

void pointwise_products(const uint8_t* codes, int64_t rows, const PackedWeight& weight, const Epilogue& epilogue, float* y) {
  // As many accumulators as leave registers for the weight and the codes.
  constexpr decltype(&panel<6, 4>) kPanels[] = {panel<16, 1>, panel<12, 2>, panel<8, 3>, panel<6, 4>};
  for (int64_t at = 0; at < weight.outputs; at += kColumns * kPanelRegisters) {
    const int64_t registers = std::min(kPanelRegisters, (weight.room() - at) / kColumns);
    kPanels[registers - 1](
        codes, rows, weight.codes.data() + at * weight.inputs, weight.inputs, epilogue.start.data() + at,
        epilogue.scale.data() + at, epilogue.shift.data() + at, y + at, weight.outputs, weight.outputs - at);
  }
}

#else

void pointwise_products(const uint8_t*, int64_t, const PackedWeight&, const Epilogue&, float*) {}  // has_byte_products is false

#endif

}  // namespace profit::cpu
