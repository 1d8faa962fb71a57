// <metal_atomic>. All threads share one processor core and are switched only where they wait, so plain reads and writes
// are atomic here; that a kernel uses them where it must is a matter of the lint's types.
#pragma once

#include "sync.h"

namespace metal {

template <class T>
struct atomic {
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;
typedef atomic<ulong> atomic_ulong;

#define METAL_HOST_FETCH(NAME, RESULT)                                                       \
  template <class T, class U>                                                                \
  inline T atomic_fetch_##NAME##_explicit(atomic<T>* object, U operand, memory_order) {      \
    const T old = object->value, by = T(operand);                                            \
    object->value = T(RESULT);                                                               \
    return old;                                                                              \
  }
METAL_HOST_FETCH(add, old + by)
METAL_HOST_FETCH(sub, old - by)
METAL_HOST_FETCH(max, old < by ? by : old)
METAL_HOST_FETCH(min, by < old ? by : old)
METAL_HOST_FETCH(and, old & by)
METAL_HOST_FETCH(or, old | by)
METAL_HOST_FETCH(xor, old ^ by)
#undef METAL_HOST_FETCH

template <class T>
inline T atomic_load_explicit(const atomic<T>* object, memory_order) { return object->value; }
template <class T, class U>
inline void atomic_store_explicit(atomic<T>* object, U desired, memory_order) { object->value = T(desired); }
template <class T, class U>
inline T atomic_exchange_explicit(atomic<T>* object, U desired, memory_order) {
  const T old = object->value;
  object->value = T(desired);
  return old;
}
template <class T, class U>
inline bool atomic_compare_exchange_weak_explicit(atomic<T>* object, T* expected, U desired, memory_order, memory_order) {
  if (__builtin_memcmp(&object->value, expected, sizeof(T)) == 0) {
    object->value = T(desired);
    return true;
  }
  *expected = object->value;
  return false;
}

}  // namespace metal
