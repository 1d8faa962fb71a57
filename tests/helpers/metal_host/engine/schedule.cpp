// Runs a compiled Metal kernel on one processor core.
//
// Every Metal thread is a fiber. Threadgroups run one after another; inside one, a fiber runs until it must wait for
// others (threadgroup_barrier, simdgroup_barrier, a SIMD-group function) or ends. Who runs next is the schedule's
// choice, so that what a kernel leaves to chance can be made to differ between runs. A thread that ends without having
// waited hands its stack straight to the next one: elementwise kernels never switch.
//
// What Metal leaves undefined is an error here: a barrier or SIMD-group function that not all threads reach, at one
// place; one after some threads have returned; memory outside of a buffer; a write to an input; a stack overflow.
#include <string.h>

#include <algorithm>
#include <numeric>

#include "state.h"

namespace metal_host {
namespace {

uint32_t random_number() {  // xorshift32
  uint32_t& x = engine.random_state;
  x ^= x << 13;
  x ^= x >> 17;
  x ^= x << 5;
  return x;
}

template <class T>
void shuffle(std::vector<T>& items) {
  for (size_t i = items.size(); i > 1; i--) std::swap(items[i - 1], items[random_number() % i]);
}

// --- Threads as fibers ----------------------------------------------------------------------------------------------

void end_thread() {
  ThreadState& thread = current();
  SimdGroup& simd = engine.simdgroups[thread.metal.simdgroup_index_in_threadgroup];
  thread.state = State::done;
  engine.ended++;
  simd.ended |= 1u << thread.metal.thread_index_in_simdgroup;
  if (simd.arrived) fail("returns while other lanes of the SIMD group wait in " + describe(simd.site));
  if (engine.at_barrier)
    fail("returns while " + number(engine.barrier_thread) + " waits at " + describe(engine.barrier_site));
}

// Runs threads, one after another, on the fiber that it was started on.
void fiber_main() {
  const uint32_t fiber = current().fiber;
  for (;;) {
    engine.entry(engine.buffers, &current().metal);
    end_thread();
    if (engine.pass_next < engine.pass.size() && engine.threads[engine.pass[engine.pass_next]].state == State::fresh) {
      engine.current = engine.pass[engine.pass_next++];
      current().fiber = fiber;
      current().state = State::ready;
      continue;
    }
    engine.idle_fibers.push_back(fiber);
    to_scheduler();  // for good: the next thread to get this fiber starts it anew
  }
}

bool give_fiber(ThreadState& thread) {
  if (engine.idle_fibers.empty()) {
    Fiber fiber{};
    if (!fiber_create(&fiber)) {
      set_error("no memory for another stack", nullptr);
      return false;
    }
    engine.fibers.push_back(fiber);
    engine.idle_fibers.push_back(uint32_t(engine.fibers.size() - 1));
  }
  thread.fiber = engine.idle_fibers.back();
  engine.idle_fibers.pop_back();
  fiber_start(&engine.fibers[thread.fiber], fiber_main);
  thread.state = State::ready;
  return true;
}

// Runs every thread of the pass that can run until it has to wait. False if none could.
bool run_pass() {
  bool progress = false;
  engine.pass_next = 0;
  while (engine.pass_next < engine.pass.size() && !engine.failed) {
    const uint32_t next = engine.pass[engine.pass_next++];
    ThreadState& thread = engine.threads[next];
    if (thread.state == State::fresh && !give_fiber(thread)) return false;
    if (thread.state != State::ready) continue;
    progress = true;
    engine.current = next;
    engine.report->switches++;
    engine.in_kernel = true;
    context_switch(&engine.scheduler, &engine.fibers[thread.fiber].context);
    engine.in_kernel = false;
  }
  return progress;
}

bool run_all_threads() {
  const int order = engine.launch->order;
  const uint32_t count = engine.thread_count;
  if (order == ORDER_GREEDY || order == ORDER_GREEDY_BACKWARD) {
    bool progress = false;
    const uint32_t groups = uint32_t(engine.simdgroups.size());
    for (uint32_t step = 0; step < groups && !engine.failed; step++) {
      const uint32_t group = order == ORDER_GREEDY ? step : groups - 1 - step;
      const uint32_t first = group * SIMD_WIDTH;
      engine.pass.resize(std::min(SIMD_WIDTH, count - first));
      std::iota(engine.pass.begin(), engine.pass.end(), first);
      while (run_pass()) progress = true;
    }
    return progress;
  }
  engine.pass.resize(count);
  std::iota(engine.pass.begin(), engine.pass.end(), 0u);
  if (order == ORDER_BACKWARD) std::reverse(engine.pass.begin(), engine.pass.end());
  if (order == ORDER_SHUFFLED) shuffle(engine.pass);
  return run_pass();
}

// --- Threadgroups ---------------------------------------------------------------------------------------------------

uint32_t ceil_div(uint32_t value, uint32_t by) { return (value + by - 1) / by; }

void prepare_threadgroup(uint64_t index) {
  const Launch& launch = *engine.launch;
  Thread shared{};
  uint64_t rest = index;
  for (int axis = 0; axis < 3; axis++) {
    const uint32_t nominal = launch.whole_threadgroups ? launch.threadgroup[axis]
                                                       : std::min(launch.threadgroup[axis], launch.grid[axis]);
    const uint32_t groups = ceil_div(launch.grid[axis], nominal);
    const uint32_t extent = launch.whole_threadgroups ? groups * nominal : launch.grid[axis];
    const uint32_t position = uint32_t(rest % groups);
    rest /= groups;
    shared.threadgroup_position_in_grid[axis] = position;
    shared.dispatch_threads_per_threadgroup[axis] = nominal;
    shared.threads_per_threadgroup[axis] = std::min(nominal, extent - position * nominal);
    shared.threads_per_grid[axis] = extent;
    shared.threadgroups_per_grid[axis] = groups;
  }
  const uint32_t* size = shared.threads_per_threadgroup;
  const uint32_t* nominal = shared.dispatch_threads_per_threadgroup;
  const uint32_t count = size[0] * size[1] * size[2];
  shared.simdgroups_per_threadgroup = ceil_div(count, SIMD_WIDTH);
  shared.dispatch_simdgroups_per_threadgroup = ceil_div(nominal[0] * nominal[1] * nominal[2], SIMD_WIDTH);

  engine.thread_count = count;
  engine.at_barrier = engine.ended = 0;
  engine.threads.resize(count);
  for (uint32_t i = 0; i < count; i++) {
    ThreadState& thread = engine.threads[i];
    thread.state = State::fresh;
    thread.metal = shared;
    const uint32_t position[3] = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
    for (int axis = 0; axis < 3; axis++) {
      thread.metal.thread_position_in_threadgroup[axis] = position[axis];
      thread.metal.thread_position_in_grid[axis] =
          shared.threadgroup_position_in_grid[axis] * nominal[axis] + position[axis];
    }
    thread.metal.thread_index_in_threadgroup = i;
    thread.metal.thread_index_in_simdgroup = i % SIMD_WIDTH;
    thread.metal.simdgroup_index_in_threadgroup = i / SIMD_WIDTH;
  }
  engine.simdgroups.resize(shared.simdgroups_per_threadgroup);
  for (uint32_t g = 0; g < engine.simdgroups.size(); g++) {
    SimdGroup& simd = engine.simdgroups[g];
    const uint32_t lanes = std::min(SIMD_WIDTH, count - g * SIMD_WIDTH);
    simd.lanes = lanes == SIMD_WIDTH ? ~0u : (1u << lanes) - 1;
    simd.arrived = simd.ended = 0;
    simd.filling = 0;
  }
  for (auto& [key, variable] : engine.variables)
    memset(variable->region.data, launch.poison, variable->region.bytes);
  engine.report->threads += count;
}

void check_threadgroup_memory() {
  for (auto& [key, variable] : engine.variables)
    if (const int64_t offset = region_damage(&variable->region))
      set_error("wrote to byte " + std::to_string(offset) + " of threadgroup variable '" + variable->name +
                    "', which has " + std::to_string(variable->region.bytes),
                nullptr);
}

void run_threadgroup() {
  while (engine.ended < engine.thread_count && !engine.failed) {
    const bool progress = run_all_threads();
    if (engine.failed) return;
    if (engine.at_barrier == engine.thread_count) {
      for (ThreadState& thread : engine.threads) thread.state = State::ready;
      engine.at_barrier = 0;
    } else if (!progress) {
      set_error("deadlock: some threads wait for others that cannot come", &engine.threads[0].metal);
    }
  }
  if (!engine.failed) check_threadgroup_memory();
}

}  // namespace

void run_grid() {
  const Launch& launch = *engine.launch;
  uint64_t count = 1, threads = 1;
  for (int axis = 0; axis < 3; axis++) {
    if (launch.grid[axis] == 0 || launch.threadgroup[axis] == 0) {
      set_error("grid and threadgroup must be at least 1 along every axis", nullptr);
      return;
    }
    const uint32_t nominal = launch.whole_threadgroups ? launch.threadgroup[axis]
                                                       : std::min(launch.threadgroup[axis], launch.grid[axis]);
    count *= ceil_div(launch.grid[axis], nominal);
    threads *= launch.threadgroup[axis];
  }
  if (threads > MAX_THREADS_PER_THREADGROUP) {
    set_error("threadgroup has " + std::to_string(threads) + " threads; Metal allows " +
                  std::to_string(MAX_THREADS_PER_THREADGROUP),
              nullptr);
    return;
  }
  std::vector<uint64_t> order(count);
  std::iota(order.begin(), order.end(), uint64_t(0));
  engine.random_state = launch.seed * 2654435761u + 12345u;
  if (launch.order == ORDER_BACKWARD || launch.order == ORDER_GREEDY_BACKWARD) std::reverse(order.begin(), order.end());
  if (launch.order == ORDER_SHUFFLED) shuffle(order);
  for (uint64_t index : order) {
    prepare_threadgroup(index);
    run_threadgroup();
    if (engine.failed) return;
  }
}

}  // namespace metal_host
