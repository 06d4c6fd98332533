// Includes the file named by PROFIT_LOOPS once per instruction set: hence no include guard. Inside it
//   PROFIT_ISA      is the namespace,
//   PROFIT_TARGET   the attribute of a function that is called through a pointer,
//   PROFIT_INLINE   that of one that is inlined into such functions,
//   PROFIT_LANES    the number of floats in a register.
// A loops file opens an unnamed namespace in profit::cpu::PROFIT_ISA: another may have functions of the same names.
#include "prelude.h"

#define PROFIT_ISA baseline
#define PROFIT_TARGET
#define PROFIT_INLINE inline __attribute__((always_inline))
#define PROFIT_LANES 4
#include PROFIT_LOOPS
#undef PROFIT_ISA
#undef PROFIT_TARGET
#undef PROFIT_INLINE
#undef PROFIT_LANES

#if defined(__x86_64__)
#define PROFIT_ISA avx2
#define PROFIT_TARGET __attribute__((target("avx2,fma,f16c")))
#define PROFIT_INLINE inline __attribute__((always_inline, target("avx2,fma,f16c")))
#define PROFIT_LANES 8
#include PROFIT_LOOPS
#undef PROFIT_ISA
#undef PROFIT_TARGET
#undef PROFIT_INLINE
#undef PROFIT_LANES

#if defined(__clang__)
#define PROFIT_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#else
// gcc otherwise stays at 256 bits.
#define PROFIT_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512"
#endif
#define PROFIT_ISA avx512
#define PROFIT_TARGET __attribute__((target(PROFIT_AVX512)))
#define PROFIT_INLINE inline __attribute__((always_inline, target(PROFIT_AVX512)))
#define PROFIT_LANES 16
#include PROFIT_LOOPS
#undef PROFIT_ISA
#undef PROFIT_TARGET
#undef PROFIT_INLINE
#undef PROFIT_LANES
#undef PROFIT_AVX512
#endif

#undef PROFIT_LOOPS
