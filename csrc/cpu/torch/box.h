// Functions as the dispatcher calls them. A parameter may be a struct, which TORCH_BOX does not know: it takes as many arguments
// of the schema as it has fields, in the order of its static function `fields` (values.h).
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "check.h"

namespace profit::cpu {

template <typename T>
concept HasFields = requires { T::fields(); };

template <typename Struct, typename Field>
Field type_of(Field Struct::*);

// How many arguments a parameter takes.
template <typename T>
constexpr uint64_t arity() {
  if constexpr (HasFields<T>) {
    return std::apply([](auto... field) { return (arity<decltype(type_of(field))>() + ... + 0); }, T::fields());
  } else {
    return 1;
  }
}

template <typename T>
T take(StableIValue*& next) {
  if constexpr (HasFields<T>) {
    // Braces: evaluated from left to right.
    return std::apply([&](auto... field) { return T{take<decltype(type_of(field))>(next)...}; }, T::fields());
  } else {
    return torch::stable::detail::to<T>(*next++);
  }
}

template <typename T>
struct Results {
  static constexpr uint64_t count = 1;
  static void put(StableIValue* stack, const T& result) { *stack = torch::stable::detail::from<T>(result); }
};

template <typename... T>
struct Results<std::tuple<T...>> {
  static constexpr uint64_t count = sizeof...(T);
  static void put(StableIValue* stack, const std::tuple<T...>& results) {
    std::apply([&](const T&... result) { ((*stack++ = torch::stable::detail::from<T>(result)), ...); }, results);
  }
};

template <auto function>
struct Boxed;

template <typename R, typename... P, R (*function)(P...)>
struct Boxed<function> {
  static void call(StableIValue* stack, uint64_t arguments, uint64_t results) {
    constexpr uint64_t expected = (arity<std::decay_t<P>>() + ... + 0);
    PROFIT_CHECK(
        arguments == expected && results == Results<R>::count, "a schema has ", arguments, " arguments and ", results,
        " results, its kernel ", expected, " and ", Results<R>::count);
    [[maybe_unused]] StableIValue* next = stack;  // unused without parameters
    std::tuple<std::decay_t<P>...> values{take<std::decay_t<P>>(next)...};
    Results<R>::put(stack, std::apply(function, std::move(values)));
  }
};

}  // namespace profit::cpu

#define PROFIT_BOX(function) (&::profit::cpu::Boxed<&(function)>::call)
