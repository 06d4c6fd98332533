// Memory layouts an element-wise kernel can walk as one flat array.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace profit {

using torch::stable::Tensor;

// True if the elements fill one block of memory without gaps or overlap, in any order of dimensions
// (contiguous, channels_last, transposed).
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) {
    return true;
  }
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size), sizes of 1 do not matter
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) != 1) {
      dims.emplace_back(t.stride(d), t.size(d));
    }
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) {
      return false;
    }
    expected *= size;
  }
  return true;
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) {
      return false;
    }
  }
  return true;
}

// True if, in a dense tensor, the elements of one index of dimension 0 lie together in memory.
inline bool dim0_is_outermost(const Tensor& t) {
  return t.dim() == 0 || t.size(0) <= 1 || t.stride(0) * t.size(0) == t.numel();
}

}  // namespace profit
