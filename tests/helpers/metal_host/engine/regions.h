// Memory that a kernel may touch, each piece between inaccessible pages.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace metal_host {

enum RegionKind : int32_t { REGION_INPUT = 0, REGION_OUTPUT = 1, REGION_METADATA = 2, REGION_THREADGROUP = 3 };

// Laid out alike in runner.py (class Region).
struct Region {
  const char* name;
  unsigned char* data;  // the first byte the kernel may touch
  uint64_t bytes;
  unsigned char* body;  // the accessible pages that hold `data`
  uint64_t body_bytes;
  int32_t kind;
  int32_t canary;  // what the bytes of the body outside of data are filled with
};

// Bytes of inaccessible address space before and after every region: an index that is wrong by up to four million
// floats still faults. It costs address space, not memory.
constexpr size_t GUARD_BYTES = size_t(16) << 20;

bool region_map(Region* region, size_t alignment, size_t misalignment, bool at_end, int fill);
void region_unmap(Region* region);
void region_protect(const Region* region, bool writable);

// Offset from `data` of a byte outside of it that has changed; 0 (never outside) if none has.
int64_t region_damage(const Region* region);

// Whether `address` lies in the region's pages or in the guards around them.
bool region_claims(const Region* region, const void* address);

}  // namespace metal_host
