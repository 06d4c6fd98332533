// Which instruction set the CPU kernels use. Each hot loop is compiled once per level and the level is chosen at run
// time, so one binary runs everywhere and no build machine decides for the user.
#pragma once

#include <cstdint>

namespace profit::cpu {

enum class Isa : int64_t { baseline = 0, avx2 = 1, avx512 = 2 };

// Highest level this processor supports.
int64_t supported_isa();

// The level in use.
int64_t isa();

// Whether products of bytes may be summed in registers at the level in use (AVX-512 VNNI).
bool has_byte_products();

// Never go above `level`; returns the level then in use. A negative level lifts the limit.
int64_t limit_isa(int64_t level);

}  // namespace profit::cpu
