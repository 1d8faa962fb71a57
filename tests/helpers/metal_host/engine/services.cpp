// What kernels call: barriers, exchanges between lanes, threadgroup memory. See abi.h.
#include <stdio.h>
#include <string.h>

#include <algorithm>

#include "state.h"

namespace metal_host {

Engine engine;

namespace {

const char* base_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

bool same(const Site& a, const Site& b) {
  return a.line == b.line && strcmp(a.what, b.what) == 0 && strcmp(a.file, b.file) == 0;
}

std::string describe(const Thread& thread) {
  char text[160];
  const uint32_t *grid = thread.thread_position_in_grid, *group = thread.threadgroup_position_in_grid;
  snprintf(text, sizeof text, "thread (%u, %u, %u), number %u of threadgroup (%u, %u, %u)", grid[0], grid[1], grid[2],
           thread.thread_index_in_threadgroup, group[0], group[1], group[2]);
  return text;
}

}  // namespace

std::string describe(const Site& site) {
  return std::string(site.what) + " at " + base_name(site.file) + ":" + std::to_string(site.line);
}

std::string number(uint32_t thread) { return "thread " + std::to_string(thread); }

void set_error(const std::string& reason, const Thread* thread) {
  if (engine.failed) return;
  engine.failed = true;
  std::string text = std::string("[") + engine.launch->kernel + "] " + (thread ? describe(*thread) + ": " : "") + reason;
  snprintf(engine.report->error, sizeof engine.report->error, "%s", text.c_str());
}

void to_scheduler() { context_switch(&engine.fibers[current().fiber].context, &engine.scheduler); }

void fail(const std::string& reason) {
  set_error(reason, &current().metal);
  to_scheduler();
  __builtin_unreachable();
}

namespace {

void threadgroup_barrier(const Site* site) {
  ThreadState& thread = current();
  SimdGroup& simd = engine.simdgroups[thread.metal.simdgroup_index_in_threadgroup];
  engine.report->barriers++;
  if (engine.ended) fail(describe(*site) + " can no longer be reached by all threads: some have returned");
  if (simd.arrived)
    fail(describe(*site) + " reached while other lanes of the SIMD group wait in " + describe(simd.site));
  if (engine.at_barrier == 0) {
    engine.barrier_site = *site;
    engine.barrier_thread = engine.current;
  } else if (!same(engine.barrier_site, *site)) {
    fail("waits at " + describe(*site) + " while " + number(engine.barrier_thread) + " waits at " +
         describe(engine.barrier_site));
  }
  engine.at_barrier++;
  thread.state = State::at_barrier;
  to_scheduler();
}

const SimdView* simd_exchange(const Site* site, const void* value, size_t size, uint32_t* lane) {
  ThreadState& thread = current();
  SimdGroup& simd = engine.simdgroups[thread.metal.simdgroup_index_in_threadgroup];
  *lane = thread.metal.thread_index_in_simdgroup;
  engine.report->simd_calls++;
  if (simd.ended) fail(describe(*site) + " can no longer be reached by the whole SIMD group: some lanes have returned");
  if (simd.arrived == 0) {
    simd.site = *site;
    simd.size = size;
  } else if (!same(simd.site, *site) || simd.size != size) {
    fail("is in " + describe(*site) + " while other lanes of the SIMD group are in " + describe(simd.site));
  }
  SimdView& table = simd.tables[simd.filling];
  memcpy(table.slot[*lane], value, size);
  simd.arrived |= 1u << *lane;
  if (simd.arrived != simd.lanes) {
    thread.state = State::at_simd;
      to_scheduler();
    return &table;
  }
  const uint32_t first = thread.metal.simdgroup_index_in_threadgroup * SIMD_WIDTH;
  for (uint32_t other = 0; other < SIMD_WIDTH; other++)
    if (simd.lanes >> other & 1) engine.threads[first + other].state = State::ready;
  table.lanes = simd.lanes;
  simd.arrived = 0;
  simd.filling ^= 1;
  return &table;
}

// Threadgroup memory has guards of its own for every variable: running from one array into the next is an error too.
void* threadgroup_variable(const char* name, size_t size, size_t alignment) {
  ThreadgroupVariable*& variable = engine.variables[name];
  if (!variable) {
    variable = new ThreadgroupVariable{};
    variable->name = name;
    variable->name.resize(variable->name.find('#'));  // the rest of the key tells declarations of one name apart
    Region& region = variable->region;
    region.name = variable->name.c_str();
    region.bytes = size;
    region.kind = REGION_THREADGROUP;
    engine.report->threadgroup_bytes += size;
    if (engine.report->threadgroup_bytes > MAX_THREADGROUP_BYTES)
      fail("threadgroup variables take " + std::to_string(engine.report->threadgroup_bytes) + " bytes; Metal has " +
           std::to_string(MAX_THREADGROUP_BYTES) + " ('" + variable->name + "' is the first not to fit)");
    if (engine.launch->vectors) alignment = std::max(alignment, size_t(16));
    if (!region_map(&region, alignment, 0, engine.launch->at_end, engine.launch->poison))
      fail("no memory for threadgroup variable '" + variable->name + "'");
  }
  return variable->region.data;
}

bool uses_threadgroup_memory() { return !engine.variables.empty(); }

int poison() { return engine.launch->poison; }

uint32_t lane() { return current().metal.thread_index_in_simdgroup; }

void fail_from_kernel(const char* reason) { fail(reason); }

}  // namespace

Services services = {threadgroup_barrier, simd_exchange, threadgroup_variable, uses_threadgroup_memory,
                     poison,              lane,          fail_from_kernel};

}  // namespace metal_host
