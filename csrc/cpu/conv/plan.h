// Shapes of a depthwise convolution and how its work is divided.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../torch/values.h"
#include "kernels.h"

namespace profit::cpu {

using torch::stable::Tensor;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Geometry {
  int64_t images, in_channels, multiplier, height, width, out_height, out_width;
  int64_t kh, kw, stride_h, stride_w, dilation_h, dilation_w, left, right, top, bottom;

  int64_t channels() const { return in_channels * multiplier; }
  int64_t taps() const { return kh * kw; }
  int64_t padded_height() const { return height + top + bottom; }
  int64_t padded_width() const { return width + left + right; }
  Taps row_taps() const { return {kh, kw, stride_w, dilation_w}; }
};

// Checks shapes and types; raises.
Geometry geometry(const Tensor& x, const Tensor& weight, const Convolution& convolution);

// Channels of a block: wide enough to read memory in runs, narrow enough that a few rows of it stay in cache.
constexpr int64_t kBlock = 64;

// A task is one block of output channels, some images, one band of rows. The division follows from the shape alone and not from
// the number of threads, so that sums over tasks, added in order, have the same bits for any number of threads.
struct Plan {
  int64_t channels;          // in all
  int64_t lanes;             // channels of a block
  int64_t groups;            // groups of 16 that they fill, the last perhaps in part; the last block may have fewer
  int64_t blocks, chunks, bands;
  int64_t images_per_chunk, images;
  int64_t rows, rows_per_band;

  // rows: of what is divided into bands. work: elements of one image and channel. block: channels to take together.
  Plan(const Geometry& g, int64_t rows, int64_t work, int64_t block = kBlock);

  int64_t width() const { return groups * kGroup; }
  int64_t tasks() const { return blocks * chunks * bands; }

  struct Task {
    int64_t block, part, first_channel, channels, groups, first_image, end_image, first_row, end_row;
  };
  // part: which of the chunks * bands.
  Task task(int64_t index) const {
    const int64_t block = index % blocks, part = index / blocks, band = part % bands, chunk = part / bands;
    const int64_t here = std::min(lanes, channels - block * lanes);
    return {
        block,
        part,
        block * lanes,
        here,
        ceil_div(here, kGroup),
        chunk * images_per_chunk,
        std::min((chunk + 1) * images_per_chunk, images),
        band * rows_per_band,
        std::min((band + 1) * rows_per_band, rows)};
  }
};

// Memory of one thread, cut into pieces that start at a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : memory_(static_cast<float*>(std::aligned_alloc(64, ceil_div(floats + 1, 16) * 64)), &std::free) {}

  float* take(int64_t floats) {
    float* piece = memory_.get() + used_;
    used_ += rounded(floats);
    return piece;
  }
  static int64_t rounded(int64_t floats) { return ceil_div(floats, 16) * 16; }

 private:
  std::unique_ptr<float, decltype(&std::free)> memory_;
  int64_t used_ = 0;
};

// A tensor [N, C, H, W] of any strides, read or written row by row.
struct TensorRows {
  char* data;
  int64_t element, n, c, h, w;
  bool is_float;

  static TensorRows of(const Tensor& t, bool writable);

  // Where image i, channel j, row y start.
  char* at(int64_t i, int64_t j, int64_t y) const { return data + (i * n + j * c + y * h) * element; }
  Strides strides() const { return {c, w, h}; }
  // Whether the kernels can walk it in place: whole groups of float channels, side by side.
  bool in_place(const Plan::Task& task, int64_t multiplier) const {
    return is_float && multiplier == 1 && c == 1 && task.channels == task.groups * kGroup;
  }
};

// [C_out, taps] of any float dtype as [block][tap][lane], rounded to `type` first; missing lanes are 0.
std::vector<float> pack(const Tensor& weight, torch::headeronly::ScalarType type, const Plan& plan, int64_t taps);

}  // namespace profit::cpu
