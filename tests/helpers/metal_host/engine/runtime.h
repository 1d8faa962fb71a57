// The engine's C interface: what runner.py calls. Structures are laid out alike there.
#pragma once

#include "../include/metal_host/abi.h"
#include "regions.h"

namespace metal_host {

// The order in which threads get the processor between two points where they must wait for one another.
enum Order : int32_t {
  ORDER_FORWARD = 0,          // every thread as far as its next wait, first to last
  ORDER_BACKWARD = 1,         // the same, last to first; threadgroups too
  ORDER_SHUFFLED = 2,         // the same, in a new random order each time; threadgroups too
  ORDER_GREEDY = 3,           // one SIMD group runs as far ahead of the others as barriers let it
  ORDER_GREEDY_BACKWARD = 4,  // the same, beginning with the last SIMD group; threadgroups from the last too
};

struct Launch {
  const char* kernel;
  uint32_t grid[3];
  uint32_t threadgroup[3];
  int32_t order;
  uint32_t seed;
  int32_t poison;             // byte that fills threadgroup memory before every threadgroup
  int32_t whole_threadgroups; // CUDA's way: the grid is rounded up, no threadgroup is smaller than the others
  int32_t at_end;             // threadgroup variables end (or begin) at inaccessible memory
  int32_t limit_seconds;      // of processor time
  int32_t vectors;            // the text uses vector types, so the start of an array is aligned to 16 bytes
};

struct Report {
  uint64_t threads;
  uint64_t switches;
  uint64_t barriers;        // threadgroup_barrier calls, per thread
  uint64_t simd_calls;      // SIMD-group function calls, per thread
  uint64_t threadgroup_bytes;
  char error[1024];
};

constexpr uint32_t MAX_THREADS_PER_THREADGROUP = 1024;
constexpr uint64_t MAX_THREADGROUP_BYTES = 32768;

extern Services services;

}  // namespace metal_host
