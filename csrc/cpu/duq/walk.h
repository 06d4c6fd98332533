// How tensors are walked by the loops of DuQ: as runs of memory, cut into pieces that threads share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../torch/layout.h"

namespace profit::cpu {

// Elements per piece of work. Fixed, and not derived from the number of threads, so that the sums over pieces, added in
// order, give the same bits for any number of threads.
constexpr int64_t kPiece = 16384;
// Elements per task below which handing work to another thread costs more than it brings.
constexpr int64_t kGrain = 32768;

// x as the loops can walk it: dense and, with a value per channel, each channel in one run. The second step of a
// transposed weight costs a copy; it is rare enough not to deserve a loop of its own.
inline Tensor walkable(const Tensor& x, int64_t channels) {
  Tensor dense = is_dense(x) ? x : torch::stable::clone(x);
  return channels == 1 || dim0_is_outermost(dense) ? dense : torch::stable::contiguous(dense);
}

// `result` with the strides that `like` has or, if it is not dense, that its dense copy has.
inline Tensor with_layout_of(const Tensor& like, const Tensor& result) {
  if (is_dense(like) && same_strides(like, result)) {
    return result;
  }
  Tensor out = torch::stable::empty_like(is_dense(like) ? like : torch::stable::clone(like));
  if (same_strides(out, result)) {
    return result;
  }
  torch::stable::copy_(out, result);
  return out;
}

// Part of one channel of one item.
struct Piece {
  int64_t item, channel, start, n;
};

// Calls prepare(number of pieces), then f(index, piece) for the pieces of all items, in parallel; returns them in order. An item
// has `inner` elements for each of its quantizers `k`.
template <typename Items, typename F>
std::vector<Piece> for_each_piece(const Items& items, const F& prepare, const auto& f) {
  std::vector<Piece> pieces;
  int64_t elements = 0;
  for (int64_t item = 0; item < static_cast<int64_t>(items.size()); ++item) {
    const int64_t inner = items[item].inner, channels = items[item].k.size();
    for (int64_t channel = 0; channel < channels; ++channel) {
      for (int64_t start = 0; start < inner; start += kPiece) {
        const int64_t n = std::min(kPiece, inner - start);
        pieces.push_back({item, channel, channel * inner + start, n});
        elements += n;
      }
    }
  }
  const int64_t count = pieces.size();
  prepare(count);
  const int64_t grain = std::max<int64_t>(1, count * kGrain / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      f(i, pieces[i]);
    }
  });
  return pieces;
}

}  // namespace profit::cpu
