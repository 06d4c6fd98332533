#include "kernels.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../simd/isa.h"

namespace profit::cpu {

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

#define PROFIT_LOOPS "../conv/loops.h"
#include "../simd/for_each_isa.h"

}  // namespace

RowKernels row_kernels(
    ScalarType type, const Wanted& wanted, Activation activation, const Quantizer<float>& quantizer, const Taps& taps) {
#if defined(__x86_64__)
  if (!wanted.quantized || quantizer.is_ordinary()) {
    switch (static_cast<Isa>(isa())) {
      case Isa::avx512:
        return avx512::kernels(type, wanted, activation, taps);
      case Isa::avx2:
        return avx2::kernels(type, wanted, activation, taps);
      case Isa::baseline:
        break;
    }
  }
#endif
  return baseline::kernels(type, wanted, activation, taps);
}

}  // namespace profit::cpu
