#include "kernels.h"

#include "../simd/pick.h"

#define PROFIT_LOOPS "../norm/loops.h"
#include "../simd/for_each_isa.h"

namespace profit::cpu {

BlockKernels block_kernels(ScalarType type, bool quantized, Activation activation, const Quantizer<float>& quantizer) {
  return PROFIT_PICK(!quantized || quantizer.is_ordinary(), kernels(type, quantized, activation));
}

}  // namespace profit::cpu
