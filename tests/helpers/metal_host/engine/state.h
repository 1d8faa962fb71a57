// What the engine knows while a kernel runs; shared by its parts.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "fibers.h"
#include "runtime.h"

namespace metal_host {

enum class State : uint8_t { fresh, ready, at_barrier, at_simd, done };

struct ThreadState {
  Thread metal;
  State state;
  uint32_t fiber;
};

// Lanes hand over their values in one of two tables; a full table is read while the other one fills. A third is not
// needed: nobody can complete the next exchange before every lane has finished reading the last.
struct SimdGroup {
  SimdView tables[2];
  int filling;
  uint32_t lanes, arrived, ended;
  Site site;  // of the call that the arrived lanes wait in
  size_t size;
};

struct ThreadgroupVariable {
  Region region;
  std::string name;
};

struct Engine {
  const Launch* launch;
  Report* report;
  Entry entry;
  void* const* buffers;
  const Region* regions;
  uint32_t region_count;

  std::vector<ThreadState> threads;
  std::vector<SimdGroup> simdgroups;
  std::vector<Fiber> fibers;
  std::vector<uint32_t> idle_fibers;
  std::vector<uint32_t> pass;  // the threads to run, in order, until each has to wait
  size_t pass_next;
  std::map<std::string, ThreadgroupVariable*> variables;

  uint32_t thread_count, at_barrier, ended;
  Site barrier_site;  // of the first thread that waits
  uint32_t barrier_thread;
  uint32_t current;
  Context scheduler;
  bool failed;
  volatile bool in_kernel;  // a fiber has the processor
  uint32_t random_state;
};

extern Engine engine;

inline ThreadState& current() { return engine.threads[engine.current]; }

// Notes an error, the first one only; a thread makes it name the thread.
void set_error(const std::string& reason, const Thread* thread);

// Gives up on the launch from inside of a kernel: control goes to the scheduler, and the fibers that wait are never
// resumed.
[[noreturn]] void fail(const std::string& reason);

// Leaves the current thread until the scheduler resumes it.
void to_scheduler();

std::string describe(const Site& site);
std::string number(uint32_t thread);  // in its threadgroup

// schedule.cpp: runs all threads of the grid, until the first error.
void run_grid();

// faults.cpp: runs the grid with processor faults turned into errors.
void run_grid_guarded();

}  // namespace metal_host
