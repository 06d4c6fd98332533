// How a block's input side walks a tensor: in runs whose elements stand beside per-channel constants, divided into tasks by the
// shape alone, so that sums over tasks, added in order, have the same bits for any number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace profit::cpu {

using torch::stable::Tensor;

// Elements of a run: its constants and sums stay in the first-level cache, and short rows are taken several at a time.
constexpr int64_t kRun = 512;
// Elements of a task, and how many tasks there are at most.
constexpr int64_t kTask = 65536;
constexpr int64_t kMostTasks = 64;

class Walk {
 public:
  explicit Walk(const Tensor& x)
      : images_(x.size(0)), channels_(x.size(1)), plane_(x.size(2) * x.size(3)), last_(!x.is_contiguous()) {
    if (last_ || plane_ == 1) {
      // Rows of one pixel, all channels; some rows make a run.
      last_ = true;
      repeat_ = std::max<int64_t>(1, kRun / std::max<int64_t>(1, channels_));
      const int64_t rows = images_ * plane_;
      const int64_t per_task = std::max(kTask / std::max<int64_t>(1, channels_), (rows + kMostTasks - 1) / kMostTasks);
      rows_per_task_ = std::max(repeat_, per_task / repeat_ * repeat_);
      tasks_ = channels_ > 0 ? (rows + rows_per_task_ - 1) / rows_per_task_ : 0;
    } else {
      tasks_ = channels_;  // a task is one channel of all images
    }
  }

  int64_t channels() const { return channels_; }
  int64_t samples() const { return images_ * plane_; }
  int64_t tasks() const { return tasks_; }
  // Room for a run in whole registers, of the widest.
  int64_t room() const { return (lanes() + 15) / 16 * 16; }
  // Elements of a run.
  int64_t lanes() const { return last_ ? repeat_ * channels_ : std::min(kRun, plane_); }
  // How many sums of a channel there are: in NCHW one task has all of it.
  int64_t parts() const { return last_ ? tasks_ : 1; }
  int64_t part(int64_t task) const { return last_ ? task : 0; }

  // f(first element, elements) for every run of the task.
  template <typename F>
  void runs(int64_t task, const F& f) const {
    if (last_) {
      const int64_t end = std::min((task + 1) * rows_per_task_, samples());
      for (int64_t row = task * rows_per_task_; row < end; row += repeat_) {
        f(row * channels_, std::min(repeat_, end - row) * channels_);
      }
      return;
    }
    for (int64_t image = 0; image < images_; ++image) {
      const int64_t start = (image * channels_ + task) * plane_;
      for (int64_t at = 0; at < plane_; at += kRun) {
        f(start + at, std::min(kRun, plane_ - at));
      }
    }
  }

  // The values of the channels, beside the elements of a run.
  void spread(const std::vector<float>& per_channel, int64_t task, float* lanes) const {
    for (int64_t i = 0; i < this->lanes(); ++i) {
      lanes[i] = per_channel[last_ ? i % channels_ : task];
    }
  }

  // Adds sums beside the elements of a run to those of the channels.
  template <typename T>
  void gather(const T* lanes, int64_t task, double* per_channel) const {
    for (int64_t i = 0; i < this->lanes(); ++i) {
      per_channel[last_ ? i % channels_ : task] += lanes[i];
    }
  }

  template <typename F>
  void parallel(const F& f) const {
    const int64_t per_task = tasks_ > 0 ? images_ * channels_ * plane_ / tasks_ : 1;
    const int64_t grain = std::max<int64_t>(1, kTask / 2 / std::max<int64_t>(1, per_task));
    torch::stable::parallel_for(0, tasks_, grain, f);
  }

 private:
  int64_t images_, channels_, plane_;
  bool last_;
  int64_t repeat_ = 1, rows_per_task_ = 1, tasks_ = 0;
};

}  // namespace profit::cpu
