// The check of an argument: its message names the operator, and no file of the machine that built the library.
#pragma once

#include <sstream>
#include <stdexcept>

namespace profit {

template <typename... Args>
[[noreturn]] void refuse(const Args&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace profit

#define PROFIT_CHECK(condition, ...) \
  do {                               \
    if (!(condition)) {              \
      ::profit::refuse(__VA_ARGS__); \
    }                                \
  } while (false)
