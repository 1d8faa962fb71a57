// What a compiled kernel and the engine that runs it agree on. Both sides include this file, nothing else.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace metal_host {

constexpr uint32_t SIMD_WIDTH = 32;
constexpr size_t SIMD_SLOT_BYTES = 64;  // the widest value a SIMD-group function exchanges: sixteen floats

// One Metal thread, as its [[attributes]] describe it.
struct Thread {
  uint32_t thread_position_in_grid[3];
  uint32_t thread_position_in_threadgroup[3];
  uint32_t threadgroup_position_in_grid[3];
  uint32_t threads_per_threadgroup[3];           // of this threadgroup, which may be a smaller one at the grid's edge
  uint32_t dispatch_threads_per_threadgroup[3];  // as launched
  uint32_t threads_per_grid[3];
  uint32_t threadgroups_per_grid[3];
  uint32_t thread_index_in_threadgroup;
  uint32_t thread_index_in_simdgroup;
  uint32_t simdgroup_index_in_threadgroup;
  uint32_t simdgroups_per_threadgroup;
  uint32_t dispatch_simdgroups_per_threadgroup;
};

// Where in a source text a synchronising call stands, so that errors can name it.
struct Site {
  const char* what;  // e.g. "simd_sum"
  const char* file;
  int line;
};

// What the lanes of one SIMD group handed to a SIMD-group function. Valid until the lane's next such call.
struct SimdView {
  uint32_t lanes;  // bit i: lane i exists (the last SIMD group of a threadgroup may be short)
  alignas(16) unsigned char slot[SIMD_WIDTH][SIMD_SLOT_BYTES];
};

// The services of the engine. A kernel library gets them through `metal_host_bind`.
struct Services {
  void (*threadgroup_barrier)(const Site* site);
  const SimdView* (*simd_exchange)(const Site* site, const void* value, size_t size, uint32_t* lane);
  void* (*threadgroup_variable)(const char* name, size_t size, size_t alignment);
  bool (*uses_threadgroup_memory)();
  int (*poison)();
  uint32_t (*lane)();
  void (*fail)(const char* reason);
};

typedef void (*Entry)(void* const* buffers, const Thread* thread);

}  // namespace metal_host
