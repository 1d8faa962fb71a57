// Guarded memory: see regions.h.
#include "regions.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

namespace metal_host {

namespace {

size_t page_bytes() {
  static const size_t bytes = size_t(sysconf(_SC_PAGESIZE));
  return bytes;
}

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

// Places `region->bytes` bytes so that they end where the upper guard begins (at_end), or begin where the lower one
// ends. The address keeps its remainder `misalignment` modulo `alignment`, so a few bytes may be left between: they
// hold a canary.
bool region_map(Region* region, size_t alignment, size_t misalignment, bool at_end, int fill) {
  const size_t body = round_up(region->bytes + 2 * alignment, page_bytes());
  void* base = mmap(nullptr, body + 2 * GUARD_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return false;
  region->body = static_cast<unsigned char*>(base) + GUARD_BYTES;
  region->body_bytes = body;
  if (mprotect(region->body, body, PROT_READ | PROT_WRITE) != 0) {
    munmap(base, body + 2 * GUARD_BYTES);
    return false;
  }
  size_t offset = misalignment;
  if (at_end) {
    offset = (body - region->bytes) / alignment * alignment + misalignment;
    if (offset + region->bytes > body) offset -= alignment;
  }
  region->data = region->body + offset;
  region->canary = fill;
  memset(region->body, fill, body);
  return true;
}

void region_unmap(Region* region) {
  if (region->body) munmap(region->body - GUARD_BYTES, region->body_bytes + 2 * GUARD_BYTES);
  region->body = nullptr;
}

void region_protect(const Region* region, bool writable) {
  mprotect(region->body, region->body_bytes, writable ? PROT_READ | PROT_WRITE : PROT_READ);
}

int64_t region_damage(const Region* region) {
  const unsigned char canary = static_cast<unsigned char>(region->canary);
  const unsigned char* end = region->body + region->body_bytes;
  for (const unsigned char* byte = region->data + region->bytes; byte < end; byte++)
    if (*byte != canary) return byte - region->data;
  for (const unsigned char* byte = region->data; byte-- > region->body;)
    if (*byte != canary) return byte - region->data;
  return 0;
}

bool region_claims(const Region* region, const void* address) {
  const unsigned char* byte = static_cast<const unsigned char*>(address);
  return region->body && byte >= region->body - GUARD_BYTES && byte < region->body + region->body_bytes + GUARD_BYTES;
}

}  // namespace metal_host
