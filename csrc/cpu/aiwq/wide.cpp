// AIWQ of a pointwise layer with more outputs than inputs, from its input alone: with inputs q of mean m and covariance S,
//
//     y = w q + b   has   mean w m + b   and variance w S w^T       per output channel
//
// under the new weight as under the old. Neither output is read or written; S costs pixels * inputs^2 / 2 products.
#include <cmath>

#include "update.h"

namespace profit::cpu {

namespace {

// Pixels that are quantized at a time, and the parts with sums of their own; both fixed, for the same bits with any threads.
constexpr int64_t kColumns = 256;
constexpr int64_t kParts = 16;

// A run of pixels side by side in memory: `n` columns that start at `at`.
struct Run {
  const char* at;
  int64_t n;
};

// All pixels of x in runs of at most kColumns.
std::vector<Run> runs_of(const Tensor& x, const TensorRows& rows) {
  int64_t outer = x.size(0), middle = x.size(2), length = x.size(3);
  if (middle == 1 || rows.h == length * rows.w) {
    length *= middle;
    middle = 1;
    if (outer == 1 || rows.n == length * rows.w) {
      length *= outer;
      outer = 1;
    }
  }
  std::vector<Run> runs;
  for (int64_t i = 0; i < outer; ++i) {
    for (int64_t y = 0; y < middle; ++y) {
      for (int64_t start = 0; start < length; start += kColumns) {
        runs.push_back({rows.at(i, 0, y) + start * rows.w * rows.element, std::min(kColumns, length - start)});
      }
    }
  }
  return runs;
}

}  // namespace

bool is_wide(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride) {
  const int64_t pixels = x.size(0) * x.size(2) * x.size(3), inputs = x.size(1);
  return stride[0] == 1 && stride[1] == 1 && 2 * inputs <= weight.size(0) && 4 * inputs <= pixels;
}

std::pair<Moments, Moments> wide_moments(
    const Tensor& x, const float* w_new, const float* w_old, const std::vector<float>& bias, const InputSide& input,
    const RowKernels& kernels) {
  const int64_t inputs = x.size(1), outputs = bias.size(), groups = ceil_div(inputs, kGroup), width = groups * kGroup;
  const TensorRows rows = TensorRows::of(x, false);
  const std::vector<Run> runs = runs_of(x, rows);
  const int64_t count = runs.size(), parts = std::min(kParts, count);
  const AiwqKernels loops = aiwq_kernels();

  std::vector<float> alpha = input.front.alpha, offset = input.front.shift;
  alpha.resize(width, 0.0f);
  offset.resize(width, 0.0f);
  const FrontLanes lanes{alpha.data(), offset.data(), nullptr};
  const auto quantize = [&](const Run& run, float* loaded, float* q) {
    ConstLanes from{reinterpret_cast<const float*>(run.at), kGroup, rows.w};
    if (rows.c != 1 || inputs != width) {
      kernels.load(run.at, rows.strides(), loaded, run.n, inputs, groups, 1);
      from = {loaded, run.n * kGroup, kGroup};
    }
    kernels.quantize(from, {q, run.n * kGroup, kGroup}, run.n, groups, input.quantizer, lanes);
  };

  // About the mean of the first run, so that float32 products lose nothing to a common offset.
  std::vector<float> shift(width, 0.0f), first_run(2 * width * kColumns);
  quantize(runs[0], first_run.data(), first_run.data() + width * kColumns);
  kernels.sum(first_run.data() + width * kColumns, shift.data(), runs[0].n, groups);
  for (float& v : shift) {
    v /= static_cast<float>(runs[0].n);
  }

  std::vector<double> first(parts * width, 0.0), second(parts * width * width, 0.0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(2 * width * kColumns);
    float *loaded = scratch.take(width * kColumns), *q = scratch.take(width * kColumns);
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t r = part * count / parts; r < (part + 1) * count / parts; ++r) {
        quantize(runs[r], loaded, q);
        loops.add_second_moments(
            {q, runs[r].n * kGroup, kGroup}, shift.data(), runs[r].n, groups, first.data() + part * width,
            second.data() + part * width * width);
      }
    }
  });

  const double n = static_cast<double>(x.size(0) * x.size(2) * x.size(3));
  std::vector<double> mean(width, 0.0);
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t i = 0; i < width; ++i) {
      mean[i] += first[part * width + i];
    }
  }
  // Of the input; `second` holds the rows up to the diagonal's group.
  std::vector<float> covariance(inputs * width, 0.0f);
  for (int64_t i = 0; i < inputs; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) {
        sum += second[(part * width + i) * width + j];
      }
      const float value = static_cast<float>((sum - mean[i] * mean[j] / n) / (n - 1));
      covariance[i * width + j] = value;
      if (j < inputs) {
        covariance[j * width + i] = value;
      }
    }
  }
  for (int64_t i = 0; i < width; ++i) {
    mean[i] = shift[i] + mean[i] / n;
  }

  const auto through = [&](const float* weight) {
    Moments result;
    result.mean.assign(outputs, 0.0);
    result.variance.assign(outputs, 0.0);
    const int64_t blocks = ceil_div(outputs, kRowsTimes);
    torch::stable::parallel_for(0, blocks, ceil_div(1 << 17, inputs * width), [&](int64_t begin, int64_t end) {
      std::vector<float> products(kRowsTimes * width);
      for (int64_t block = begin; block < end; ++block) {
        const float* w[kRowsTimes];  // if there are fewer than that left, the last one again
        double m[kRowsTimes], v[kRowsTimes] = {};
        for (int64_t k = 0; k < kRowsTimes; ++k) {
          const int64_t o = std::min(block * kRowsTimes + k, outputs - 1);
          w[k] = weight + o * inputs;
          m[k] = bias[o];
        }
        loops.rows_times(w, covariance.data(), products.data(), inputs, width);
        for (int64_t i = 0; i < inputs; ++i) {
          for (int64_t k = 0; k < kRowsTimes; ++k) {
            m[k] += static_cast<double>(w[k][i]) * mean[i];
            v[k] += static_cast<double>(products[k * width + i]) * w[k][i];
          }
        }
        for (int64_t k = 0; k < std::min(kRowsTimes, outputs - block * kRowsTimes); ++k) {
          result.mean[block * kRowsTimes + k] = m[k];
          result.variance[block * kRowsTimes + k] = v[k] < 0 ? 0 : v[k];
        }
      }
    });
    return result;
  };
  return {through(w_new), through(w_old)};
}

}  // namespace profit::cpu
