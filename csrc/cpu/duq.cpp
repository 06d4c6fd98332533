// DuQ on the CPU: checks, layouts, work division and the reductions for a and c. The arithmetic is in duq_loops.h.
#include "duq.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../common/layout.h"
#include "isa.h"
#include "parameters.h"

namespace profit::cpu {

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// A, C: clipping interval and output scale; d: offset; lo: lower end of the clip; s: number of steps.
template <typename T>
struct Constants {
  T A, C, d, lo, s;
};

struct Sums {
  double a = 0;  // sum of g * (C/A) * u over the elements inside: -dL/dA
  double c = 0;  // sum of g * code: s * dL/dC
};

template <typename T>
struct Loops {
  void (*forward)(const void* x, void* y, int64_t n, const Constants<T>& k);
  void (*backward)(const void* grad, const void* x, void* gx, int64_t n, const Constants<T>& k, Sums& sums);
};

#define PROFIT_LOOPS "duq_loops.h"
#include "for_each_isa.h"

template <typename S, typename T>
Loops<T> loops_for(Activation activation) {
#if defined(__x86_64__)
  switch (static_cast<Isa>(isa())) {
    case Isa::avx512:
      return avx512::loops<S, T>(activation);
    case Isa::avx2:
      return avx2::loops<S, T>(activation);
    case Isa::baseline:
      break;
  }
#endif
  return baseline::loops<S, T>(activation);
}

// Elements per piece of work. Fixed, and not derived from the number of threads, so that the sums over pieces, added in
// order, give the same bits for any number of threads.
constexpr int64_t kPiece = 16384;
// Elements per task below which handing work to another thread costs more than it brings.
constexpr int64_t kGrain = 32768;

// The tensor as `channels` runs of `inner` elements, each run cut into pieces.
struct Plan {
  int64_t channels, inner, pieces_per_channel;

  Plan(int64_t channels, int64_t numel)
      : channels(channels),
        inner(channels > 0 ? numel / channels : 0),
        pieces_per_channel((inner + kPiece - 1) / kPiece) {}

  int64_t pieces() const { return channels * pieces_per_channel; }

  template <typename F>
  void for_each_piece(const F& f) const {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, std::min(inner, kPiece)));
    torch::stable::parallel_for(0, pieces(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t channel = piece / pieces_per_channel;
        const int64_t start = (piece % pieces_per_channel) * kPiece;
        f(piece, channel, channel * inner + start, std::min(kPiece, inner - start));
      }
    });
  }
};

void check(const Tensor& x, const Tensor& a, const Tensor& c, int64_t bits, int64_t activation) {
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
          type == ScalarType::Double,
      "duq: x must be float32, bfloat16, float16 or float64");
  STD_TORCH_CHECK(2 <= bits && bits <= 8, "duq: bits must be 2 to 8, got ", bits);
  STD_TORCH_CHECK(0 <= activation && activation <= 3, "duq: unknown activation ", activation);
  for (const Tensor* p : {&a, &c}) {
    STD_TORCH_CHECK(p->is_cpu(), "duq: a and c must be on the CPU, where x is");
    STD_TORCH_CHECK(
        p->numel() == 1 || (x.dim() > 0 && p->numel() == x.size(0)),
        "duq: a and c must hold one value, or one per index of dimension 0 of x; got ", p->numel());
  }
}

template <typename T>
std::vector<Constants<T>> constants(
    const std::vector<T>& a, const std::vector<T>& c, int64_t bits, bool is_signed, double offset) {
  const int64_t s = steps(bits, is_signed);
  std::vector<Constants<T>> result(std::max(a.size(), c.size()));
  for (size_t i = 0; i < result.size(); ++i) {
    result[i] = {
        softplus(a[a.size() > 1 ? i : 0]), softplus(c[c.size() > 1 ? i : 0]), static_cast<T>(offset),
        is_signed ? T(-1) : T(0), static_cast<T>(s)};
  }
  return result;
}

// x as the loops can walk it: dense and, with a value per channel, each channel in one run. The second step of a
// transposed weight costs a copy; it is rare enough not to deserve a loop of its own.
Tensor walkable(const Tensor& x, int64_t channels) {
  Tensor dense = is_dense(x) ? x : torch::stable::clone(x);
  return channels == 1 || dim0_is_outermost(dense) ? dense : torch::stable::contiguous(dense);
}

// `result` with the strides that `like` has or, if it is not dense, that its dense copy has.
Tensor with_layout_of(const Tensor& like, const Tensor& result) {
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

template <typename S, typename T>
Tensor forward(
    const Tensor& x, const Tensor& a, const Tensor& c, int64_t bits, bool is_signed, double offset,
    Activation activation) {
  const auto k = constants(values<T>(a), values<T>(c), bits, is_signed, offset);
  const Tensor from = walkable(x, k.size());
  Tensor y = torch::stable::empty_like(from);
  const auto loops = loops_for<S, T>(activation);
  const S* in = static_cast<const S*>(from.const_data_ptr());
  S* out = static_cast<S*>(y.mutable_data_ptr());
  Plan(k.size(), from.numel()).for_each_piece([&](int64_t, int64_t channel, int64_t start, int64_t n) {
    loops.forward(in + start, out + start, n, k[channel]);
  });
  return with_layout_of(x, y);
}

template <typename S, typename T>
std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& x, const Tensor& a, const Tensor& c, int64_t bits, bool is_signed, double offset,
    Activation activation) {
  const auto k = constants(values<T>(a), values<T>(c), bits, is_signed, offset);
  const int64_t channels = k.size();
  const Tensor from = walkable(x, channels);
  Tensor upstream = grad;
  if (!same_strides(grad, from)) {
    upstream = torch::stable::empty_like(from);
    torch::stable::copy_(upstream, grad);
  }
  Tensor gx = torch::stable::empty_like(from);
  const auto loops = loops_for<S, T>(activation);
  const S* g = static_cast<const S*>(upstream.const_data_ptr());
  const S* in = static_cast<const S*>(from.const_data_ptr());
  S* out = static_cast<S*>(gx.mutable_data_ptr());

  const Plan plan(channels, from.numel());
  std::vector<Sums> partial(plan.pieces());
  plan.for_each_piece([&](int64_t piece, int64_t channel, int64_t start, int64_t n) {
    loops.backward(g + start, in + start, out + start, n, k[channel], partial[piece]);
  });

  std::vector<double> dA(channels, 0.0), dC(channels, 0.0);
  for (int64_t piece = 0; piece < plan.pieces(); ++piece) {
    const int64_t channel = piece / plan.pieces_per_channel;
    dA[channel] -= partial[piece].a;
    dC[channel] += partial[piece].c / k[channel].s;
  }
  return {with_layout_of(x, gx), parameter_grad<T>(a, dA), parameter_grad<T>(c, dC)};
}

}  // namespace

Tensor duq_forward(
    Tensor x, Tensor a, Tensor c, int64_t bits, bool is_signed, double offset, int64_t activation) {
  check(x, a, c, bits, activation);
  const auto act = static_cast<Activation>(activation);
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return forward<BFloat16, float>(x, a, c, bits, is_signed, offset, act);
    case ScalarType::Half:
      return forward<Half, float>(x, a, c, bits, is_signed, offset, act);
    case ScalarType::Double:
      return forward<double, double>(x, a, c, bits, is_signed, offset, act);
    default:
      return forward<float, float>(x, a, c, bits, is_signed, offset, act);
  }
}

std::tuple<Tensor, Tensor, Tensor> duq_backward(
    Tensor grad, Tensor x, Tensor a, Tensor c, int64_t bits, bool is_signed, double offset, int64_t activation) {
  check(x, a, c, bits, activation);
  STD_TORCH_CHECK(grad.is_cpu() && grad.scalar_type() == x.scalar_type(), "duq: grad must have the dtype of x");
  STD_TORCH_CHECK(grad.dim() == x.dim(), "duq: grad must have the shape of x");
  for (int64_t d = 0; d < x.dim(); ++d) {
    STD_TORCH_CHECK(grad.size(d) == x.size(d), "duq: grad must have the shape of x");
  }
  const auto act = static_cast<Activation>(activation);
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return backward<BFloat16, float>(grad, x, a, c, bits, is_signed, offset, act);
    case ScalarType::Half:
      return backward<Half, float>(grad, x, a, c, bits, is_signed, offset, act);
    case ScalarType::Double:
      return backward<double, double>(grad, x, a, c, bits, is_signed, offset, act);
    default:
      return backward<float, float>(grad, x, a, c, bits, is_signed, offset, act);
  }
}

}  // namespace profit::cpu
