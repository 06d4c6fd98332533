// The moving parts of a task: rows of the quantized input (forward), rows of the upstream gradient and the one row that is kept
// with what its gradient needs (backward).
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../norm/front.h"
#include "plan.h"

namespace profit::cpu {

// v as a tensor of the type would hold it, whose kernels these are.
inline float rounded(float v, const RowKernels& kernels) {
  float lanes[kGroup];
  std::fill_n(lanes, kGroup, v);
  kernels.round({lanes, kGroup, kGroup}, 1, 1);
  return lanes[0];
}

// The constants of a BatchNorm beside the lanes of every block of channels.
struct PackedFront {
  std::vector<float> alpha, shift, mean;
  int64_t width;

  PackedFront(const Front& front, const Plan& plan, int64_t multiplier) : width(plan.width()) {
    if (!front.present) {
      return;
    }
    for (auto* v : {&alpha, &shift, &mean}) {
      v->assign(plan.blocks * width, 0.0f);
    }
    for (int64_t c = 0; c < plan.channels; ++c) {
      const int64_t at = (c / plan.lanes) * width + c % plan.lanes;
      alpha[at] = front.alpha[c / multiplier];
      shift[at] = front.shift[c / multiplier];
      mean[at] = front.mean[c / multiplier];
    }
  }

  FrontLanes lanes(int64_t block) const {
    return alpha.empty() ? FrontLanes{} : FrontLanes{&alpha[block * width], &shift[block * width], &mean[block * width]};
  }
};

// A ring of padded rows of the quantized input, as many as the kernel is high; each is computed once per task.
class QuantizedRows {
 public:
  static int64_t ring(const Geometry& g) { return (g.kh - 1) * g.dilation_h + 1; }
  static int64_t row_floats(const Geometry& g, const Plan& plan) { return plan.groups * g.padded_width() * kGroup; }
  static int64_t floats(const Geometry& g, const Plan& plan) {
    return ring(g) * row_floats(g, plan) + Scratch::rounded(plan.groups * g.width * kGroup);
  }

  QuantizedRows(
      const Geometry& g, const Plan& plan, const RowKernels& kernels, const Quantizer<float>& quantizer,
      const PackedFront& front, const TensorRows& in, float pad_value, Scratch& scratch)
      : g_(g), kernels_(kernels), quantizer_(quantizer), front_(front), in_(in), pad_value_(pad_value) {
    for (int64_t slot = 0; slot < ring(g); ++slot) {
      slots_.push_back(scratch.take(row_floats(g, plan)));
      std::fill_n(slots_.back(), row_floats(g, plan), pad_value);
    }
    loaded_ = scratch.take(plan.groups * g.width * kGroup);
    window_.resize(g.kh);
  }

  void start(const Plan::Task& task, int64_t image) {
    task_ = task;
    image_ = image;
    held_.assign(slots_.size(), -1);
  }

  // The kh rows that start at row `padded` of the padded input.
  const float* const* window(int64_t padded) {
    for (int64_t ky = 0; ky < g_.kh; ++ky) {
      const int64_t row = padded + ky * g_.dilation_h, slot = row % static_cast<int64_t>(slots_.size());
      if (held_[slot] != row) {
        fill(slots_[slot], row - g_.top);
        held_[slot] = row;
      }
      window_[ky] = slots_[slot];
    }
    return window_.data();
  }

  int64_t group_stride() const { return g_.padded_width() * kGroup; }

  // Round once more, to the dtype the convolution is computed in.
  void round_with(void (*round)(Lanes, int64_t, int64_t)) { round_again_ = round; }

 private:
  void fill(float* slot, int64_t row) {
    const Lanes q{slot + g_.left * kGroup, group_stride(), kGroup};
    if (row < 0 || row >= g_.height) {
      for (int64_t m = 0; m < task_.groups; ++m) {
        std::fill_n(q.at(m, 0), g_.width * kGroup, pad_value_);
      }
      return;
    }
    const char* from = in_.at(image_, task_.first_channel / g_.multiplier, row);
    ConstLanes x{reinterpret_cast<const float*>(from), kGroup, in_.w, in_.h};
    if (!in_.in_place(task_, g_.multiplier)) {
      kernels_.load(from, in_.strides(), loaded_, g_.width, task_.channels, task_.groups, g_.multiplier);
      x = {loaded_, g_.width * kGroup, kGroup};
    }
    kernels_.quantize(x, q, g_.width, task_.groups, quantizer_, front_.lanes(task_.block));
    if (!in_.is_float) {
      kernels_.round(q, g_.width, task_.groups);
    }
    if (round_again_ != nullptr) {
      round_again_(q, g_.width, task_.groups);
    }
  }

  const Geometry& g_;
  const RowKernels& kernels_;
  const Quantizer<float>& quantizer_;
  const PackedFront& front_;
  const TensorRows& in_;
  const float pad_value_;
  std::vector<float*> slots_;
  std::vector<const float*> window_;
  std::vector<int64_t> held_;  // which row each slot holds
  float* loaded_;
  void (*round_again_)(Lanes, int64_t, int64_t) = nullptr;
  Plan::Task task_{};
  int64_t image_ = 0;
};

// A ring of rows of the upstream gradient with the sum of each over its columns.
class GradientRows {
 public:
  static int64_t ring(const Geometry& g) { return (g.kh - 1) * g.dilation_h / g.stride_h + 1; }
  static int64_t row_floats(const Geometry& g, const Plan& plan) { return plan.groups * g.out_width * kGroup; }
  static int64_t floats(const Geometry& g, const Plan& plan) {
    return ring(g) * (row_floats(g, plan) + plan.width());
  }

  GradientRows(const Geometry& g, const Plan& plan, const RowKernels& kernels, const TensorRows& grad, Scratch& scratch)
      : g_(g), kernels_(kernels), grad_(grad) {
    for (int64_t slot = 0; slot < ring(g); ++slot) {
      slots_.push_back(scratch.take(row_floats(g, plan)));
      sums_.push_back(scratch.take(plan.width()));
    }
  }

  void start(const Plan::Task& task, int64_t image) {
    task_ = task;
    image_ = image;
    held_.assign(slots_.size(), -1);
  }

  const float* row(int64_t y) { return slots_[hold(y)]; }
  const float* sums(int64_t y) { return sums_[hold(y)]; }

 private:
  int64_t hold(int64_t y) {
    const int64_t slot = y % static_cast<int64_t>(slots_.size());
    if (held_[slot] != y) {
      kernels_.load(
          grad_.at(image_, task_.first_channel, y), grad_.strides(), slots_[slot], g_.out_width, task_.channels,
          task_.groups, 1);
      kernels_.sum(slots_[slot], sums_[slot], g_.out_width, task_.groups);
      held_[slot] = y;
    }
    return slot;
  }

  const Geometry& g_;
  const RowKernels& kernels_;
  const TensorRows& grad_;
  std::vector<float*> slots_, sums_;
  std::vector<int64_t> held_;
  Plan::Task task_{};
  int64_t image_ = 0;
};

// One row of the input, quantized, with u, act' and the gradient that gathers for it.
class KeptRow {
 public:
  static constexpr int64_t kSums = 4;  // of what finish_row adds up
  static int64_t floats(const Geometry& g, const Plan& plan) {
    const int64_t lanes = plan.width();
    return 2 * g.padded_width() * lanes + 3 * g.width * lanes + kSums * lanes;
  }

  KeptRow(
      const Geometry& g, const Plan& plan, const RowKernels& kernels, const Quantizer<float>& quantizer,
      const PackedFront& front, const TensorRows& in, const TensorRows& out, float pad_value, Scratch& scratch)
      : g_(g), kernels_(kernels), quantizer_(quantizer), front_(front), in_(in), out_(out) {
    const int64_t padded = g.padded_width() * plan.width(), plain = g.width * plan.width();
    q_ = scratch.take(padded);
    gq_ = scratch.take(padded);
    u_ = scratch.take(plain);
    slope_ = scratch.take(plain);
    buffer_ = scratch.take(plain);
    row_sums_ = scratch.take(kSums * plan.width());
    sums_.resize(kSums * plan.width());
    std::fill_n(q_, padded, pad_value);
  }

  void start_task(const Plan::Task& task) {
    task_ = task;
    std::fill(sums_.begin(), sums_.end(), 0.0);
  }

  void load(int64_t image, int64_t y) {
    const char* from = in_.at(image, task_.first_channel / g_.multiplier, y);
    x_ = {reinterpret_cast<const float*>(from), kGroup, in_.w, in_.h};
    if (!in_.in_place(task_, g_.multiplier)) {
      kernels_.load(from, in_.strides(), buffer_, g_.width, task_.channels, task_.groups, g_.multiplier);
      x_ = {buffer_, g_.width * kGroup, kGroup};
    }
    const Lanes q{q_ + g_.left * kGroup, group_stride(), kGroup};
    kernels_.quantize_keeping(x_, q, u_, slope_, g_.width, task_.groups, quantizer_, front_.lanes(task_.block));
    if (!in_.is_float) {
      kernels_.round(q, g_.width, task_.groups);
    }
    std::fill_n(gq_, g_.padded_width() * task_.groups * kGroup, 0.0f);
  }

  // Writes the gradient of the row and adds to the sums of the intervals and of the BatchNorm.
  void finish(int64_t image, int64_t y) {
    char* to = out_.at(image, task_.first_channel / g_.multiplier, y);
    const bool in_place = out_.in_place(task_, g_.multiplier);
    const ConstLanes gq{gq_ + g_.left * kGroup, group_stride(), kGroup};
    const Lanes gx = in_place ? Lanes{reinterpret_cast<float*>(to), kGroup, out_.w, out_.h}
                              : Lanes{buffer_, g_.width * kGroup, kGroup};
    kernels_.finish(
        gq, x_, u_, slope_, gx, g_.width, task_.groups, quantizer_, front_.lanes(task_.block), row_sums_, sums_.data());
    if (!in_place) {
      kernels_.store(buffer_, to, out_.strides(), g_.width, task_.channels, task_.groups, g_.multiplier);
    }
  }

  // The sums of the task over its lanes.
  void sums(double& a, double& c) const {
    const int64_t lanes = task_.groups * kGroup;
    for (int64_t j = 0; j < lanes; ++j) {
      a += sums_[j];
      c += sums_[lanes + j];
    }
  }
  // Those of dL/dv and of dL/dv * (x - mean), lane by lane.
  const double* sums_g() const { return sums_.data() + 2 * task_.groups * kGroup; }
  const double* sums_gx() const { return sums_.data() + 3 * task_.groups * kGroup; }

  const float* q() const { return q_; }
  float* gq() { return gq_; }
  int64_t group_stride() const { return g_.padded_width() * kGroup; }

 private:
  const Geometry& g_;
  const RowKernels& kernels_;
  const Quantizer<float>& quantizer_;
  const PackedFront& front_;
  const TensorRows &in_, &out_;
  ConstLanes x_{};
  float *q_, *gq_, *u_, *slope_, *buffer_, *row_sums_;
  std::vector<double> sums_;  // [kSums][lane]
  Plan::Task task_{};
};

}  // namespace profit::cpu
