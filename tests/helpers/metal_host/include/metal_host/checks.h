// What the compiler's undefined-behaviour checks call when they find something: an error of the engine instead of the
// sanitizer's own library. The layouts are those that g++ and clang both emit (compiler-rt, ubsan_handlers.h).
#pragma once

#include "sync.h"

namespace metal_host {

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

[[noreturn]] inline void undefined(const SourceLocation* at, const char* what, const char* before = "", long value = 0,
                                   bool with_value = false) {
  char text[200], digits[24];
  int count = 0;
  unsigned long rest = value < 0 ? 0ul - static_cast<unsigned long>(value) : static_cast<unsigned long>(value);
  do digits[count++] = char('0' + rest % 10);
  while (rest /= 10);
  if (value < 0) digits[count++] = '-';
  char* to = text;
  const char* const end = text + sizeof text - 1;
  const auto put = [&](const char* from) {
    while (*from && to < end) *to++ = *from++;
  };
  put(before);
  if (with_value)
    while (count && to < end) *to++ = digits[--count];
  put(what);
  put(" at ");
  put(at->file);
  put(":");
  for (count = 0, rest = at->line; rest || !count; rest /= 10) digits[count++] = char('0' + rest % 10);
  while (count && to < end) *to++ = digits[--count];
  *to = 0;
  services->fail(text);
  __builtin_unreachable();
}

}  // namespace metal_host

#define METAL_HOST_CHECK(NAME) extern "C" [[noreturn]] __attribute__((used, noinline)) inline void __ubsan_handle_##NAME
METAL_HOST_CHECK(out_of_bounds_abort)(void* at, unsigned long index) {
  metal_host::undefined(static_cast<metal_host::SourceLocation*>(at), " is outside of the array", "index ",
                        static_cast<int>(index), true);
}
METAL_HOST_CHECK(type_mismatch_v1_abort)(void* at, unsigned long pointer) {
  metal_host::undefined(static_cast<metal_host::SourceLocation*>(at),
                        pointer ? "an access is not aligned as its type must be" : "a null pointer is used");
}
METAL_HOST_CHECK(divrem_overflow_abort)(void* at, unsigned long, unsigned long) {
  metal_host::undefined(static_cast<metal_host::SourceLocation*>(at), "integer division by zero, or beyond the range");
}
METAL_HOST_CHECK(shift_out_of_bounds_abort)(void* at, unsigned long, unsigned long by) {
  metal_host::undefined(static_cast<metal_host::SourceLocation*>(at), " bits is undefined for the shifted type", "a shift by ",
                        static_cast<int>(by), true);
}
METAL_HOST_CHECK(missing_return)(void* at) {
  metal_host::undefined(static_cast<metal_host::SourceLocation*>(at), "a function ends without the return of its value");
}
METAL_HOST_CHECK(builtin_unreachable)(void* at) {
  metal_host::undefined(static_cast<metal_host::SourceLocation*>(at), "a place is reached that should not be");
}
#undef METAL_HOST_CHECK
