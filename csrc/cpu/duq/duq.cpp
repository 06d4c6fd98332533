// DuQ on the CPU: checks, layouts, work division and the reductions for a and c. The arithmetic is in duq/loops.h.
// One tensor is a list of one: a whole net's weights go through the same code in one parallel loop.
#include "duq.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>

#include "../torch/check.h"
#include "../torch/parameters.h"
#include "kernels.h"
#include "walk.h"

namespace profit::cpu {

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

struct Settings {
  bool is_signed;
  double offset;
  Activation activation;
};
constexpr Settings kWeight = {true, 0.0, Activation::none};

void check(const Tensor& x, const Tensor& a, const Tensor* c, int64_t bits, Activation activation) {
  const auto type = x.scalar_type();
  PROFIT_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
          type == ScalarType::Double,
      "duq: x must be float32, bfloat16, float16 or float64");
  PROFIT_CHECK(2 <= bits && bits <= 8, "duq: bits must be 2 to 8, got ", bits);
  const auto act = static_cast<int64_t>(activation);
  PROFIT_CHECK(0 <= act && act <= 3, "duq: unknown activation ", act);
  for (const Tensor* p : {&a, c}) {
    if (p == nullptr) {
      continue;
    }
    PROFIT_CHECK(p->is_cpu(), "duq: a and c must be on the CPU, where x is");
    PROFIT_CHECK(
        p->numel() == 1 || (x.dim() > 0 && p->numel() == x.size(0)),
        "duq: a and c must hold one value, or one per index of dimension 0 of x; got ", p->numel());
  }
}

// A or C. In double they come ready made, where no wider type is left to make their last bits the same (ops/duq/cpp.py).
template <typename T>
std::vector<T> intervals(const Tensor& parameter) {
  std::vector<T> result = values<T>(parameter);
  if constexpr (std::is_same_v<T, float>) {
    std::transform(result.begin(), result.end(), result.begin(), softplus);
  }
  return result;
}

// A quantizer per channel; without c (codes do not depend on it) the scale is 1.
template <typename T>
std::vector<Quantizer<T>> quantizers(const Tensor& a, const Tensor* c, int64_t bits, const Settings& settings) {
  const std::vector<T> A = intervals<T>(a), C = c == nullptr ? std::vector<T>{T(1)} : intervals<T>(*c);
  const size_t count = A.empty() || C.empty() ? 0 : std::max(A.size(), C.size());  // 0: x has no channels
  std::vector<Quantizer<T>> result;
  result.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    result.emplace_back(
        A[A.size() > 1 ? i : 0], C[C.size() > 1 ? i : 0], bits, settings.is_signed, settings.offset);
  }
  return result;
}

template <typename T>
bool all_ordinary(const std::vector<Quantizer<T>>& k) {
  return std::all_of(k.begin(), k.end(), [](const Quantizer<T>& q) { return q.is_ordinary(); });
}

// One tensor on its way through a loop: read from `x` (and `grad`), written to `out`.
template <typename S, typename T>
struct Item {
  std::vector<Quantizer<T>> k;
  Loops<T> loops;
  Tensor x, grad, out;
  const S *in, *upstream = nullptr;
  S* to;
  int64_t inner;

  Item(const Tensor& raw_x, const Tensor& a, const Tensor& c, int64_t bits, const Settings& settings)
      : k(quantizers<T>(a, &c, bits, settings)),
        loops(loops_for<S, T>(settings.activation, all_ordinary(k))),
        x(walkable(raw_x, k.size())),
        out(torch::stable::empty_like(x)),
        in(static_cast<const S*>(x.const_data_ptr())),
        to(static_cast<S*>(out.mutable_data_ptr())),
        inner(k.empty() ? 0 : x.numel() / static_cast<int64_t>(k.size())) {}

  void set_grad(const Tensor& raw_grad) {
    grad = raw_grad;
    if (!same_strides(grad, x)) {
      grad = torch::stable::empty_like(x);
      torch::stable::copy_(grad, raw_grad);
    }
    upstream = static_cast<const S*>(grad.const_data_ptr());
  }
};

template <typename S, typename T>
std::vector<Tensor> forward(
    const std::vector<Tensor>& x, const std::vector<Tensor>& a, const std::vector<Tensor>& c,
    const std::vector<int64_t>& bits, const Settings& settings) {
  std::vector<Item<S, T>> items;
  items.reserve(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    items.emplace_back(x[i], a[i], c[i], bits[i], settings);
  }
  for_each_piece(items, [](int64_t) {}, [&](int64_t, const Piece& p) {
    const auto& item = items[p.item];
    item.loops.forward(item.in + p.start, item.to + p.start, p.n, item.k[p.channel]);
  });
  std::vector<Tensor> result;
  for (size_t i = 0; i < x.size(); ++i) {
    result.push_back(with_layout_of(x[i], items[i].out));
  }
  return result;
}

// The gradients of all x, of all a, of all c.
template <typename S, typename T>
std::vector<Tensor> backward(
    const std::vector<Tensor>& grads, const std::vector<Tensor>& x, const std::vector<Tensor>& a,
    const std::vector<Tensor>& c, const std::vector<int64_t>& bits, const Settings& settings) {
  std::vector<Item<S, T>> items;
  std::vector<std::vector<double>> dA, dC;
  items.reserve(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    items.emplace_back(x[i], a[i], c[i], bits[i], settings);
    items.back().set_grad(grads[i]);
    dA.emplace_back(items.back().k.size(), 0.0);
    dC.emplace_back(items.back().k.size(), 0.0);
  }
  std::vector<Sums> partial;
  const auto pieces = for_each_piece(items, [&](int64_t n) { partial.resize(n); }, [&](int64_t i, const Piece& p) {
    const auto& item = items[p.item];
    item.loops.backward(
        item.upstream + p.start, item.in + p.start, item.to + p.start, p.n, item.k[p.channel], partial[i]);
  });
  for (size_t i = 0; i < pieces.size(); ++i) {
    const Piece& p = pieces[i];
    dA[p.item][p.channel] -= partial[i].a;
    dC[p.item][p.channel] += partial[i].c / items[p.item].k[p.channel].s;
  }
  std::vector<Tensor> result;
  for (size_t i = 0; i < x.size(); ++i) {
    result.push_back(with_layout_of(x[i], items[i].out));
  }
  for (size_t i = 0; i < x.size(); ++i) {
    result.push_back(parameter_grad<T>(a[i], dA[i]));
  }
  for (size_t i = 0; i < x.size(); ++i) {
    result.push_back(parameter_grad<T>(c[i], dC[i]));
  }
  return result;
}

// f<S, T>() for the storage type S and compute type T of x.
template <typename F>
auto dispatch(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return f.template operator()<BFloat16, float>();
    case ScalarType::Half:
      return f.template operator()<Half, float>();
    case ScalarType::Double:
      return f.template operator()<double, double>();
    default:
      return f.template operator()<float, float>();
  }
}

void check_grad(const Tensor& grad, const Tensor& x) {
  PROFIT_CHECK(grad.is_cpu() && grad.scalar_type() == x.scalar_type(), "duq: grad must have the dtype of x");
  bool same = grad.dim() == x.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) {
    same = grad.size(d) == x.size(d);
  }
  PROFIT_CHECK(same, "duq: grad must have the shape of x");
}

void check_weights(
    const std::vector<Tensor>& weights, const std::vector<Tensor>& a, const std::vector<Tensor>& c,
    const std::vector<int64_t>& bits) {
  PROFIT_CHECK(
      a.size() == weights.size() && c.size() == weights.size() && bits.size() == weights.size(),
      "duq: weights, a, c and bits must have one length");
  for (size_t i = 0; i < weights.size(); ++i) {
    PROFIT_CHECK(
        weights[i].is_cpu() && weights[i].scalar_type() == weights[0].scalar_type(),
        "duq: the weights must be on the CPU and of one dtype");
    check(weights[i], a[i], &c[i], bits[i], Activation::none);
  }
}

}  // namespace

Tensor duq_forward(Tensor x, Tensor a, Tensor c, int64_t bits, bool is_signed, double offset, int64_t activation) {
  const Settings settings = {is_signed, offset, static_cast<Activation>(activation)};
  check(x, a, &c, bits, settings.activation);
  return dispatch(x, [&]<typename S, typename T>() { return forward<S, T>({x}, {a}, {c}, {bits}, settings)[0]; });
}

std::tuple<Tensor, Tensor, Tensor> duq_backward(
    Tensor grad, Tensor x, Tensor a, Tensor c, int64_t bits, bool is_signed, double offset, int64_t activation) {
  const Settings settings = {is_signed, offset, static_cast<Activation>(activation)};
  check(x, a, &c, bits, settings.activation);
  check_grad(grad, x);
  const auto found =
      dispatch(x, [&]<typename S, typename T>() { return backward<S, T>({grad}, {x}, {a}, {c}, {bits}, settings); });
  return {found[0], found[1], found[2]};
}

std::vector<Tensor> duq_weights_forward(
    std::vector<Tensor> weights, std::vector<Tensor> a, std::vector<Tensor> c, std::vector<int64_t> bits) {
  check_weights(weights, a, c, bits);
  if (weights.empty()) {
    return {};
  }
  return dispatch(weights[0], [&]<typename S, typename T>() { return forward<S, T>(weights, a, c, bits, kWeight); });
}

std::vector<Tensor> duq_weights_backward(
    std::vector<Tensor> grads, std::vector<Tensor> weights, std::vector<Tensor> a, std::vector<Tensor> c,
    std::vector<int64_t> bits) {
  check_weights(weights, a, c, bits);
  PROFIT_CHECK(grads.size() == weights.size(), "duq: grads and weights must have one length");
  for (size_t i = 0; i < weights.size(); ++i) {
    check_grad(grads[i], weights[i]);
  }
  if (weights.empty()) {
    return {};
  }
  return dispatch(
      weights[0], [&]<typename S, typename T>() { return backward<S, T>(grads, weights, a, c, bits, kWeight); });
}

bool duq_codes(
    Tensor x, Tensor a, int64_t bits, bool is_signed, double offset, int64_t activation, Tensor codes) {
  const Settings settings = {is_signed, offset, static_cast<Activation>(activation)};
  check(x, a, nullptr, bits, settings.activation);
  PROFIT_CHECK(
      codes.is_cpu() && codes.scalar_type() == (is_signed ? ScalarType::Char : ScalarType::Byte) &&
          codes.dim() == x.dim() && codes.numel() == x.numel() && is_dense(x) && same_strides(x, codes) &&
          (a.numel() == 1 || dim0_is_outermost(x)),
      "duq: codes must be int8 (signed) or uint8, laid out as a dense x");
  return dispatch(x, [&]<typename S, typename T>() {
    struct Run {
      std::vector<Quantizer<T>> k;
      int64_t inner;
    };
    const std::vector<Run> run = {{quantizers<T>(a, nullptr, bits, settings), x.numel() / std::max<int64_t>(1, a.numel())}};
    const auto loops = loops_for<S, T>(settings.activation, all_ordinary(run[0].k));
    const S* in = static_cast<const S*>(x.const_data_ptr());
    int8_t* to = static_cast<int8_t*>(codes.mutable_data_ptr());
    std::atomic<bool> nan{false};
    for_each_piece(run, [](int64_t) {}, [&](int64_t, const Piece& p) {
      if (loops.codes(in + p.start, to + p.start, p.n, run[0].k[p.channel])) {
        nan = true;
      }
    });
    return nan.load();
  });
}

}  // namespace profit::cpu
