#include "kernels.h"

#include "../simd/pick.h"

#define PROFIT_LOOPS "../aiwq/loops.h"
#include "../simd/for_each_isa.h"

namespace profit::cpu {

AiwqKernels aiwq_kernels() { return PROFIT_PICK(true, kernels()); }

}  // namespace profit::cpu
