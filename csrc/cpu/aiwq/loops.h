// The inner loops of AIWQ: sums for means and variances, and what pointwise layers compute. Included once per instruction set by
// aiwq/kernels.cpp, hence no include guard.
#include "../simd/vec.h"

namespace profit::cpu::PROFIT_ISA {
namespace {

// Adds to sums[lane] the sum of y - shift over the columns, and to sums[lanes + lane] that of its square, lanes = 16 * groups.
PROFIT_TARGET inline void add_row(ConstLanes y, const float* shift, int64_t columns, int64_t groups, double* sums) {
  constexpr int64_t kStep = PROFIT_LANES / 2;
  const int64_t lanes = groups * kGroup;
  for (int64_t m = 0; m < groups; ++m) {
    for (int64_t l = 0; l < kGroup; l += 2 * kStep) {
      const int64_t lane = m * kGroup + l;
      DoubleVec shift_[2], first[2], second[2];
#pragma GCC unroll 2
      for (int64_t h = 0; h < 2; ++h) {
        shift_[h] = load_double(shift + lane + h * kStep);
        first[h] = *reinterpret_cast<DoubleVec*>(sums + lane + h * kStep);
        second[h] = *reinterpret_cast<DoubleVec*>(sums + lanes + lane + h * kStep);
      }
      for (int64_t i = 0; i < columns; ++i) {
        const float* from = y.at(m, i) + l;
        __builtin_prefetch(from + y.ahead);
#pragma GCC unroll 2
        for (int64_t h = 0; h < 2; ++h) {
          const DoubleVec v = load_double(from + h * kStep) - shift_[h];
          first[h] += v;
          second[h] += v * v;
        }
      }
#pragma GCC unroll 2
      for (int64_t h = 0; h < 2; ++h) {
        *reinterpret_cast<DoubleVec*>(sums + lane + h * kStep) = first[h];
        *reinterpret_cast<DoubleVec*>(sums + lanes + lane + h * kStep) = second[h];
      }
    }
  }
}

// The same for n values of one channel side by side, in 8 lanes whatever the width of a register.
PROFIT_TARGET inline void add_run(const float* y, float shift, int64_t n, double& first, double& second) {
  constexpr int64_t kLanes = 8;
  double s1[kLanes] = {}, s2[kLanes] = {};
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) {
      const double v = static_cast<double>(y[i + j]) - static_cast<double>(shift);
      s1[j] += v;
      s2[j] += v * v;
    }
  }
  for (int64_t i = n - n % kLanes; i < n; ++i) {
    const double v = static_cast<double>(y[i]) - static_cast<double>(shift);
    s1[0] += v;
    s2[0] += v * v;
  }
  for (int64_t j = 0; j < kLanes; ++j) {
    first += s1[j];
    second += s2[j];
  }
}

// Adds to first[lane] the sum of q - shift over the columns, and to second[lane][lane] that of the products of two lanes, for the
// second lane in the first one's group or before it.
PROFIT_TARGET inline void add_second_moments(
    Lanes q, const float* shift, int64_t columns, int64_t groups, double* first, double* second) {
  constexpr int64_t kRows = 8;
  const int64_t width = groups * kGroup;
  for (int64_t m = 0; m < groups; ++m) {
    for (int64_t l = 0; l < kGroup; l += PROFIT_LANES) {
      const Vec s = load(shift + m * kGroup + l);
      Vec sum = Vec{};
      for (int64_t i = 0; i < columns; ++i) {
        const Vec v = load(q.at(m, i) + l) - s;
        store(q.at(m, i) + l, v);
        sum += v;
      }
      for (int64_t j = 0; j < PROFIT_LANES; ++j) {
        first[m * kGroup + l + j] += sum[j];
      }
    }
  }
  for (int64_t m = 0; m < groups; ++m) {
    for (int64_t row = 0; row < kGroup; row += kRows) {
      for (int64_t other = 0; other <= m; ++other) {
        for (int64_t l = 0; l < kGroup; l += PROFIT_LANES) {
          Vec acc[kRows] = {};
          for (int64_t i = 0; i < columns; ++i) {
            const float* scalars = q.at(m, i) + row;
            const Vec v = load(q.at(other, i) + l);
#pragma GCC unroll 8
            for (int64_t r = 0; r < kRows; ++r) {
              acc[r] += splat<Vec>(scalars[r]) * v;
            }
          }
#pragma GCC unroll 8
          for (int64_t r = 0; r < kRows; ++r) {
            float lanes[PROFIT_LANES];
            store(lanes, acc[r]);
            double* to = second + (m * kGroup + row + r) * width + other * kGroup + l;
            for (int64_t j = 0; j < PROFIT_LANES; ++j) {
              to[j] += lanes[j];
            }
          }
        }
      }
    }
  }
}

// The largest magnitude. Floats of one sign are ordered as their bits are, and a maximum of integers is vectorised.
PROFIT_TARGET inline float largest(const float* w, int64_t n) {
  uint32_t bits = 0;
#pragma omp simd reduction(max : bits)
  for (int64_t i = 0; i < n; ++i) {
    uint32_t v;
    std::memcpy(&v, w + i, sizeof(v));
    v &= 0x7fffffffu;
    bits = v > bits ? v : bits;
  }
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// How many w_old differ from alpha * w_new by more than the roundings of one code under two scales; `delta`, unless null, gets
// the differences, 0 for the others.
PROFIT_TARGET inline int64_t differences(
    const float* __restrict w_new, const float* __restrict w_old, float alpha, float* __restrict delta, int64_t n) {
  constexpr float kSame = 5e-7f;
  int32_t count = 0;
  if (delta == nullptr) {
#pragma omp simd reduction(+ : count)
    for (int64_t i = 0; i < n; ++i) {
      const float scaled = alpha * w_new[i];
      const bool same = std::fabs(w_old[i] - scaled) <= kSame * (std::fabs(w_old[i]) + std::fabs(scaled));
      count += same ? 0 : 1;
    }
  } else {
#pragma omp simd reduction(+ : count)
    for (int64_t i = 0; i < n; ++i) {
      const float scaled = alpha * w_new[i], apart = w_old[i] - scaled;
      const bool same = std::fabs(apart) <= kSame * (std::fabs(w_old[i]) + std::fabs(scaled));
      count += same ? 0 : 1;
      delta[i] = same ? 0.0f : apart;
    }
  }
  return count;
}

// Some channels of n pixels, `stride` apart at each of `at`, to to[channel][kTilePixels].
PROFIT_TARGET inline void gather(
    const float* const* at, int64_t n, int64_t first, int64_t channels, int64_t stride, float* to) {
  const int64_t whole_channels = stride == 1 ? channels / 4 * 4 : 0, whole_pixels = n / 4 * 4;
  for (int64_t p = 0; p < whole_pixels; p += 4) {
    for (int64_t i = p; i < p + 4; ++i) {
      for (int64_t c = 0; c < channels; c += kGroup) {
        __builtin_prefetch(at[i] + first + channels + c);  // in all likelihood the next to be gathered
      }
    }
    for (int64_t c = 0; c < whole_channels; c += 4) {
      const float* rows[4] = {at[p] + first + c, at[p + 1] + first + c, at[p + 2] + first + c, at[p + 3] + first + c};
      transpose4(rows, to + c * kTilePixels + p, kTilePixels);
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t p = c < whole_channels ? whole_pixels : 0; p < n; ++p) {
      to[c * kTilePixels + p] = at[p][(first + c) * stride];
    }
  }
}

// to = factor * from + constant; n is a multiple of 16.
PROFIT_TARGET inline void scale(float* to, const float* from, float factor, float constant, int64_t n) {
  const Vec f = splat<Vec>(factor), c = splat<Vec>(constant);
  for (int64_t i = 0; i < n; i += PROFIT_LANES) {
    store(to + i, f * load(from + i) + c);
  }
}

// Adds to row t.first of `to`, kTilePixels long each, t.second times `from`, for each of the taps t.
PROFIT_TARGET inline void add_taps(float* to, const float* from, const std::pair<int32_t, float>* taps, int64_t count) {
  for (int64_t t = 0; t < count; ++t) {
    float* row = to + taps[t].first * kTilePixels;
    const Vec f = splat<Vec>(taps[t].second);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kTilePixels; i += PROFIT_LANES) {
      store(row + i, load(row + i) + f * load(from + i));
    }
  }
}

// to[o] = w[o] * matrix for kRowsTimes rows w of `inputs` values each; the matrix has `inputs` rows of `width`. Added up row by row
// of the matrix, so that there are the same bits at every instruction set.
PROFIT_TARGET inline void rows_times(
    const float* const* w, const float* matrix, float* to, int64_t inputs, int64_t width) {
  constexpr int64_t kRegisters = 2;
  for (int64_t first = 0; first < width; first += kRegisters * PROFIT_LANES) {
    // If the width is not a multiple of two registers, the last columns are computed twice.
    const int64_t at = std::min(first, std::max<int64_t>(0, width - kRegisters * PROFIT_LANES));
    const int64_t second = std::min<int64_t>(PROFIT_LANES, width - PROFIT_LANES - at);
    Vec sums[kRowsTimes][kRegisters] = {};
    for (int64_t i = 0; i < inputs; ++i) {
      const float* row = matrix + i * width + at;
      const Vec left = load(row), right = load(row + second);
#pragma GCC unroll 4
      for (int64_t o = 0; o < kRowsTimes; ++o) {
        const Vec factor = splat<Vec>(w[o][i]);
        sums[o][0] += factor * left;
        sums[o][1] += factor * right;
      }
    }
    for (int64_t o = 0; o < kRowsTimes; ++o) {
      store(to + o * width + at, sums[o][0]);
      store(to + o * width + at + second, sums[o][1]);
    }
  }
}

// to += factor * from + constant, factor and constant per lane.
PROFIT_TARGET inline void add_scaled_lanes(
    Lanes to, ConstLanes from, const float* factor, const float* constant, int64_t columns, int64_t groups) {
  for (int64_t m = 0; m < groups; ++m) {
    for (int64_t l = 0; l < kGroup; l += PROFIT_LANES) {
      const Vec f = load(factor + m * kGroup + l), c = load(constant + m * kGroup + l);
      for (int64_t i = 0; i < columns; ++i) {
        store(to.at(m, i) + l, load(to.at(m, i) + l) + (f * load(from.at(m, i) + l) + c));
      }
    }
  }
}

inline AiwqKernels kernels() {
  return {add_row, add_run, add_second_moments, add_taps, add_scaled_lanes, gather, largest, differences, scale, rows_times};
}

}  // namespace
}  // namespace profit::cpu::PROFIT_ISA
