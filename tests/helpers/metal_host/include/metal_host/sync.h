// Barriers, memory flags, threadgroup variables; the kernel library's link to the engine.
#pragma once

#include "abi.h"
#include "vectors.h"

namespace metal_host {

inline const Services* services = nullptr;  // set by metal_host_bind, which the kernel library exports

// A threadgroup variable: translate.py turns `threadgroup float tile[32];` into a reference to one of these, keyed by
// name and place of the declaration.
template <class T>
inline T& threadgroup_variable(const char* key) {
  return *static_cast<T*>(services->threadgroup_variable(key, sizeof(T), alignof(T)));
}

}  // namespace metal_host

namespace metal {

enum class mem_flags : uint32_t {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16,
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint32_t(a) | uint32_t(b)); }

enum memory_order { memory_order_relaxed };
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };

inline void threadgroup_barrier(mem_flags flags, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const metal_host::Site site{"threadgroup_barrier", file, line};
  if (flags == mem_flags::mem_none && metal_host::services->uses_threadgroup_memory())
    metal_host::services->fail("threadgroup_barrier(mem_none) orders no memory, yet the kernel has threadgroup variables");
  metal_host::services->threadgroup_barrier(&site);
}

inline void simdgroup_barrier(mem_flags, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const metal_host::Site site{"simdgroup_barrier", file, line};
  const int nothing = 0;
  uint32_t lane;
  metal_host::services->simd_exchange(&site, &nothing, sizeof nothing, &lane);
}

inline void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) {}

}  // namespace metal
