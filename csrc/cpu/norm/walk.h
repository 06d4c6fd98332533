// How a block's input side walks a tensor: in tiles of rows whose lanes stand beside per-channel constants, divided into tasks by
// the shape alone, so that sums over tasks, added in order, have the same bits for any number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace profit::cpu {

using torch::stable::Tensor;

// Floats of the widest register.
constexpr int64_t kRegister = 16;
// Elements of a tile, which stays in the first-level cache, and the rows it has at least and at most: sums run over them in
// registers, in float32.
constexpr int64_t kTile = 2048, kLeastRows = 4, kMostRows = 64;
// Lanes of a row at most, where rows of a pixel are put together to fill registers.
constexpr int64_t kMostLanes = 2048;
// Elements of a task, and how many tasks there are at most.
constexpr int64_t kTask = 65536, kMostTasks = 64;

class Walk {
 public:
  explicit Walk(const Tensor& x)
      : images_(x.size(0)), channels_(x.size(1)), plane_(x.size(2) * x.size(3)), last_(!x.is_contiguous() || plane_ == 1) {
    if (images_ * channels_ * plane_ == 0) {
      return;
    }
    if (last_) {
      // A pixel's channels, of as many pixels as fill whole registers.
      const int64_t whole = std::lcm(channels_, kRegister);
      lanes_ = whole <= kMostLanes ? whole : channels_;
    } else {
      lanes_ = kRegister;
    }
    rows_ = std::clamp(kTile / lanes_, kLeastRows, kMostRows);
    if (last_) {
      const int64_t pixels = images_ * plane_, tile = rows_ * (lanes_ / channels_);
      const int64_t per_task = std::max(kTask / channels_, (pixels + kMostTasks - 1) / kMostTasks);
      pixels_per_task_ = std::max(tile, per_task / tile * tile);
      tasks_ = (pixels + pixels_per_task_ - 1) / pixels_per_task_;
    } else {
      tasks_ = channels_;  // a task is one channel of all images
    }
  }

  int64_t channels() const { return channels_; }
  int64_t samples() const { return images_ * plane_; }
  int64_t tasks() const { return tasks_; }
  // Lanes of a row; room for them in whole registers; elements of a tile.
  int64_t lanes() const { return lanes_; }
  int64_t room() const { return (lanes_ + kRegister - 1) / kRegister * kRegister; }
  int64_t tile() const { return lanes_ * rows_; }
  // Sums of a channel there are: in NCHW one task has all of it.
  int64_t parts() const { return last_ ? tasks_ : 1; }
  int64_t part(int64_t task) const { return last_ ? task : 0; }

  // f(first element, lanes, rows) for every tile of the task.
  template <typename F>
  void tiles(int64_t task, const F& f) const {
    if (last_) {
      const int64_t first = task * pixels_per_task_, end = std::min(first + pixels_per_task_, samples());
      stretch(first * channels_, (end - first) * channels_, f);
      return;
    }
    for (int64_t image = 0; image < images_; ++image) {
      stretch((image * channels_ + task) * plane_, plane_, f);
    }
  }

  // The values of the channels, beside the lanes.
  std::vector<float> spread(const std::vector<float>& per_channel, int64_t task) const {
    std::vector<float> lanes(room(), 0.0f);
    for (int64_t i = 0; i < lanes_; ++i) {
      lanes[i] = per_channel[last_ ? i % channels_ : task];
    }
    return lanes;
  }

  // Adds sums beside the lanes to those of the channels.
  template <typename T>
  void gather(const T* lanes, int64_t task, double* per_channel) const {
    if (!last_) {
      per_channel[task] = std::accumulate(lanes, lanes + lanes_, per_channel[task]);
      return;
    }
    for (int64_t start = 0; start < lanes_; start += channels_) {
      for (int64_t c = 0; c < channels_; ++c) {
        per_channel[c] += lanes[start + c];
      }
    }
  }

  template <typename F>
  void parallel(const F& f) const {
    const int64_t per_task = tasks_ > 0 ? images_ * channels_ * plane_ / tasks_ : 1;
    const int64_t grain = std::max<int64_t>(1, kTask / 2 / std::max<int64_t>(1, per_task));
    torch::stable::parallel_for(0, tasks_, grain, f);
  }

 private:
  template <typename F>
  void stretch(int64_t at, int64_t n, const F& f) const {
    const int64_t end = at + n;
    for (; at + lanes_ <= end;) {
      const int64_t rows = std::min(rows_, (end - at) / lanes_);
      f(at, lanes_, rows);
      at += rows * lanes_;
    }
    if (at < end) {
      f(at, end - at, int64_t{1});
    }
  }

  int64_t images_, channels_, plane_;
  bool last_;
  int64_t lanes_ = 0, rows_ = 0, pixels_per_task_ = 0, tasks_ = 0;
};

}  // namespace profit::cpu
