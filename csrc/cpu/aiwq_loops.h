// Sums for means and variances. Included once per instruction set by depthwise_loops.h, hence no include guard.
namespace PROFIT_ISA {

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

}  // namespace PROFIT_ISA
