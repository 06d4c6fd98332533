// Schemas and kernels of the CPU library. The library has no Python module of its own: loading the file registers the
// operators (torch.ops.load_library), so one binary serves every CPython and every torch from 2.11 on.
#include <torch/csrc/stable/library.h>

#include "../aiwq/aiwq.h"
#include "../conv/depthwise.h"
#include "../conv/pointwise.h"
#include "../duq/duq.h"
#include "../norm/input.h"
#include "../simd/isa.h"
#include "box.h"

// A layer's values (values.h), in one order everywhere: norm, quantizer, weight, bias, convolution.
#define NORM "Tensor? mean, Tensor? invstd, Tensor? gamma, Tensor? beta"
#define QUANTIZER "Tensor? a, Tensor? c, int? bits, bool is_signed, float offset, int activation"
#define CONVOLUTION "int[] stride, int[] padding, int[] dilation, int groups, float pad_value"
#define LAYER NORM ", " QUANTIZER ", Tensor weight, Tensor? bias, " CONVOLUTION

STABLE_TORCH_LIBRARY(profit_cpu, m) {
  m.def(
      "duq_forward(Tensor x, Tensor a, Tensor c, int bits, bool is_signed, float offset, int activation) -> Tensor");
  m.def(
      "duq_backward(Tensor grad, Tensor x, Tensor a, Tensor c, int bits, bool is_signed, float offset, int activation)"
      " -> (Tensor gx, Tensor ga, Tensor gc)");
  m.def("duq_weights_forward(Tensor[] weights, Tensor[] a, Tensor[] c, int[] bits) -> Tensor[]");
  m.def(
      "duq_weights_backward(Tensor[] grads, Tensor[] weights, Tensor[] a, Tensor[] c, int[] bits) -> Tensor[]");
  m.def(
      "duq_codes(Tensor x, Tensor a, int bits, bool is_signed, float offset, int activation, Tensor(a!) codes) -> bool");
  m.def("block_moments(Tensor x, float eps) -> (Tensor mean, Tensor var, Tensor invstd)");
  m.def("block_input(Tensor x, " NORM ", " QUANTIZER ") -> Tensor");
  m.def(
      "block_input_backward(Tensor grad, Tensor(a!) gx, Tensor x, " NORM ", " QUANTIZER ", bool of_batch)"
      " -> (Tensor? g_gamma, Tensor? g_beta, Tensor? ga, Tensor? gc)");
  m.def("block_depthwise(Tensor x, " LAYER ") -> Tensor");
  m.def(
      "block_depthwise_backward(Tensor grad, Tensor x, " LAYER ", bool of_batch, bool need_weight)"
      " -> (Tensor gx, Tensor? g_gamma, Tensor? g_beta, Tensor? ga, Tensor? gc, Tensor? gw, Tensor? gb)");
  m.def(
      "block_pointwise(Tensor(a!) y, Tensor x, " NORM ", " QUANTIZER ", Tensor weight, Tensor? bias, Tensor c_w, int weight_bits)"
      " -> bool");
  m.def("aiwq_kl(Tensor y_new, Tensor y_old, float eps) -> Tensor");
  m.def("aiwq_moments(Tensor y) -> Tensor");
  m.def("aiwq_depthwise(Tensor x, Tensor y_new, " LAYER ", float eps) -> Tensor");
  m.def("aiwq_update(Tensor x, Tensor y_new, " LAYER ", float eps, Tensor weight_new) -> Tensor?");
  m.def("isa() -> int");
  m.def("limit_isa(int level) -> int");
  m.def("has_byte_products() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(profit_cpu, CPU, m) {
  m.impl("block_moments", PROFIT_BOX(profit::cpu::block_moments));
  m.impl("block_depthwise", PROFIT_BOX(profit::cpu::block_depthwise));
  m.impl("block_pointwise", PROFIT_BOX(profit::cpu::block_pointwise));
  m.impl("block_depthwise_backward", PROFIT_BOX(profit::cpu::block_depthwise_backward));
  m.impl("block_input", PROFIT_BOX(profit::cpu::block_input));
  m.impl("block_input_backward", PROFIT_BOX(profit::cpu::block_input_backward));
  m.impl("duq_forward", PROFIT_BOX(profit::cpu::duq_forward));
  m.impl("duq_backward", PROFIT_BOX(profit::cpu::duq_backward));
  m.impl("duq_weights_forward", PROFIT_BOX(profit::cpu::duq_weights_forward));
  m.impl("duq_weights_backward", PROFIT_BOX(profit::cpu::duq_weights_backward));
  m.impl("duq_codes", PROFIT_BOX(profit::cpu::duq_codes));
  m.impl("aiwq_kl", PROFIT_BOX(profit::cpu::aiwq_kl));
  m.impl("aiwq_moments", PROFIT_BOX(profit::cpu::aiwq_moments));
  m.impl("aiwq_update", PROFIT_BOX(profit::cpu::aiwq_update));
  m.impl("aiwq_depthwise", PROFIT_BOX(profit::cpu::aiwq_depthwise));
}

STABLE_TORCH_LIBRARY_IMPL(profit_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", PROFIT_BOX(profit::cpu::isa));
  m.impl("limit_isa", PROFIT_BOX(profit::cpu::limit_isa));
  m.impl("has_byte_products", PROFIT_BOX(profit::cpu::has_byte_products));
}
