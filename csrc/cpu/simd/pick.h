// The one switch between instruction sets.
#pragma once

#include "isa.h"

namespace profit::cpu {

// The level in use; the baseline for a quantizer that only loops that divide can serve (is_ordinary in quantizer.h).
inline Isa level_for(bool ordinary) { return ordinary ? static_cast<Isa>(isa()) : Isa::baseline; }

}  // namespace profit::cpu

// The value of a call, such as loops<S, T>(activation), of what for_each_isa.h has compiled for level_for(ordinary).
#if defined(__x86_64__)
#define PROFIT_PICK(ordinary, ...)                     \
  [&] {                                                \
    switch (::profit::cpu::level_for(ordinary)) {      \
      case ::profit::cpu::Isa::avx512:                 \
        return ::profit::cpu::avx512::__VA_ARGS__;     \
      case ::profit::cpu::Isa::avx2:                   \
        return ::profit::cpu::avx2::__VA_ARGS__;       \
      default:                                         \
        return ::profit::cpu::baseline::__VA_ARGS__;   \
    }                                                  \
  }()
#else
#define PROFIT_PICK(ordinary, ...) ((void)(ordinary), ::profit::cpu::baseline::__VA_ARGS__)
#endif
