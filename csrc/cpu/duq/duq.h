// DuQ, the activation and weight quantizer, forward and backward (docs/maths.md, section 1).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace profit::cpu {

using torch::stable::Tensor;

// x: any shape and strides, float32 / bfloat16 / float16 / float64. a, c: the raw parameters, one value or one per index
// of dimension 0 of x, taken as float32; with a float64 x, in all functions here, the float64 A and C that they stand for.
// Returns y like x: dtype, memory format.
Tensor duq_forward(
    Tensor x, Tensor a, Tensor c, int64_t bits, bool is_signed, double offset, int64_t activation);

// grad: shape and dtype of x, any strides (expanded too). Returns dL/dx like x, and dL/da, dL/dc like a, c.
std::tuple<Tensor, Tensor, Tensor> duq_backward(
    Tensor grad, Tensor x, Tensor a, Tensor c, int64_t bits, bool is_signed, double offset, int64_t activation);

// The same for the weights of a net, signed, in one parallel loop. weights: of one dtype; a, c, bits: one entry each.
std::vector<Tensor> duq_weights_forward(
    std::vector<Tensor> weights, std::vector<Tensor> a, std::vector<Tensor> c, std::vector<int64_t> bits);

// Returns all dL/dw, then all dL/da, then all dL/dc.
std::vector<Tensor> duq_weights_backward(
    std::vector<Tensor> grads, std::vector<Tensor> weights, std::vector<Tensor> a, std::vector<Tensor> c,
    std::vector<int64_t> bits);

// Fills `codes`, int8 (signed) or uint8 of the shape and strides of x, which must be dense and, with an interval per channel,
// have dimension 0 outermost. Returns whether the input or its interval holds NaN, which has no code.
bool duq_codes(Tensor x, Tensor a, int64_t bits, bool is_signed, double offset, int64_t activation, Tensor codes);

}  // namespace profit::cpu
