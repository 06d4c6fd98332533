// The hot loops of DuQ as a table of functions, one per instruction set, dtype and activation.
#pragma once

#include <cstdint>

#include "quantizer.h"

namespace profit::cpu {

struct Sums {
  double a = 0;  // sum of g * (C/A) * u over the elements inside: -dL/dA
  double c = 0;  // sum of g * code: s * dL/dC
};

// What each does stands at its definition in duq/loops.h; x, y, grad, gx are of the storage type.
template <typename T>
struct Loops {
  void (*forward)(const void* x, void* y, int64_t n, const Quantizer<T>& k);
  void (*backward)(const void* grad, const void* x, void* gx, int64_t n, const Quantizer<T>& k, Sums& sums);
  bool (*codes)(const void* x, void* codes, int64_t n, const Quantizer<T>& k);
};

// The table for storage type S and compute type T at the instruction set in use; `ordinary`: all quantizers are.
// <float, float>, <BFloat16, float>, <Half, float> and <double, double>.
template <typename S, typename T>
Loops<T> loops_for(Activation activation, bool ordinary);

}  // namespace profit::cpu
