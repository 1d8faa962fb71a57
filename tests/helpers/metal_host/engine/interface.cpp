// The engine's C interface; runner.py's side of it is engine_library.py.
#include <string.h>

#include <numeric>

#include "state.h"

namespace metal_host {
namespace {

void release_variables() {
  for (auto& [key, variable] : engine.variables) {
    region_unmap(&variable->region);
    delete variable;
  }
  engine.variables.clear();
}

}  // namespace
}  // namespace metal_host

using namespace metal_host;

extern "C" {

const Services* metal_host_services() { return &services; }
const char* metal_host_fibers() { return fiber_implementation(); }

int metal_host_region_map(Region* region, size_t alignment, size_t misalignment, int at_end, int fill) {
  return region_map(region, alignment, misalignment, at_end != 0, fill);
}
void metal_host_region_unmap(Region* region) { region_unmap(region); }
void metal_host_region_protect(Region* region) { region_protect(region, false); }
int64_t metal_host_region_damage(Region* region) { return region_damage(region); }

// Returns 0, or 1 with report->error saying why not.
int metal_host_launch(Entry entry, void* const* buffers, const Region* regions, uint32_t region_count,
                      const Launch* launch, Report* report) {
  memset(report, 0, sizeof *report);
  engine.launch = launch;
  engine.report = report;
  engine.entry = entry;
  engine.buffers = buffers;
  engine.regions = regions;
  engine.region_count = region_count;
  engine.failed = false;
  run_grid_guarded();
  release_variables();
  engine.idle_fibers.resize(engine.fibers.size());  // those of threads that were given up are free again
  std::iota(engine.idle_fibers.begin(), engine.idle_fibers.end(), 0u);
  return engine.failed ? 1 : 0;
}

}  // extern "C"
