#include "kernels.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../simd/isa.h"

namespace profit::cpu {

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

#define PROFIT_LOOPS "../norm/loops.h"
#include "../simd/for_each_isa.h"

}  // namespace

BlockKernels block_kernels(ScalarType type, bool quantized, Activation activation, const Quantizer<float>& quantizer) {
#if defined(__x86_64__)
  if (!quantized || quantizer.is_ordinary()) {
    switch (static_cast<Isa>(isa())) {
      case Isa::avx512:
        return avx512::kernels(type, quantized, activation);
      case Isa::avx2:
        return avx2::kernels(type, quantized, activation);
      case Isa::baseline:
        break;
    }
  }
#endif
  return baseline::kernels(type, quantized, activation);
}

}  // namespace profit::cpu
