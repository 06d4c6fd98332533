#include "kernels.h"

#include "../simd/pick.h"

#define PROFIT_LOOPS "../conv/loops.h"
#include "../simd/for_each_isa.h"

namespace profit::cpu {

RowKernels row_kernels(
    ScalarType type, const Wanted& wanted, Activation activation, const Quantizer<float>& quantizer, const Taps& taps) {
  return PROFIT_PICK(!wanted.quantized || quantizer.is_ordinary(), kernels(type, wanted, activation, taps));
}

}  // namespace profit::cpu
