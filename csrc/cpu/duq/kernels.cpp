#include "kernels.h"

#include "../simd/pick.h"

#define PROFIT_LOOPS "../duq/loops.h"
#include "../simd/for_each_isa.h"

namespace profit::cpu {

template <typename S, typename T>
Loops<T> loops_for(Activation activation, bool ordinary) {
  return PROFIT_PICK(ordinary, loops<S, T>(activation));
}

template Loops<float> loops_for<float, float>(Activation, bool);
template Loops<float> loops_for<BFloat16, float>(Activation, bool);
template Loops<float> loops_for<Half, float>(Activation, bool);
template Loops<double> loops_for<double, double>(Activation, bool);

}  // namespace profit::cpu
