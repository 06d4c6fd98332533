#include "isa.h"

#include <algorithm>
#include <atomic>

namespace profit::cpu {

int64_t supported_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return static_cast<int64_t>(Isa::avx512);
  }
  if (avx2) {
    return static_cast<int64_t>(Isa::avx2);
  }
#endif
  return static_cast<int64_t>(Isa::baseline);
}

namespace {
std::atomic<int64_t>& current() {
  static std::atomic<int64_t> level{supported_isa()};
  return level;
}
}  // namespace

int64_t isa() { return current().load(std::memory_order_relaxed); }

bool has_byte_products() {
#if defined(__x86_64__)
  static const bool supported = __builtin_cpu_supports("avx512vnni");
  return supported && static_cast<Isa>(isa()) == Isa::avx512;
#else
  return false;
#endif
}

int64_t limit_isa(int64_t level) {
  const int64_t highest = supported_isa();
  const int64_t chosen = level < 0 ? highest : std::min(level, highest);
  current().store(chosen, std::memory_order_relaxed);
  return chosen;
}

}  // namespace profit::cpu
