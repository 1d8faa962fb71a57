// The engine: runs a compiled Metal kernel on one processor core.
//
// Every Metal thread is a fiber. Threadgroups run one after another; inside one, a fiber runs until it must wait for
// others (threadgroup_barrier, simdgroup_barrier, a SIMD-group function) or ends. Who runs next is the schedule's
// choice, so that what a kernel leaves to chance can be made to differ between runs. A thread that ends without having
// waited hands its stack straight to the next one: elementwise kernels never switch.
//
// What Metal leaves undefined is an error here: a barrier or SIMD-group function that not all threads reach, at one
// place; one after some threads have returned; memory outside of a buffer; a write to an input; a stack overflow.
#include "runtime.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "fibers.h"

namespace metal_host {
namespace {

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
  bool failed, in_kernel;
  uint32_t random_state;
} engine;

const char* base_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

std::string describe(const Site& site) {
  return std::string(site.what) + " at " + base_name(site.file) + ":" + std::to_string(site.line);
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

std::string number(uint32_t thread) { return "thread " + std::to_string(thread); }

void set_error(const std::string& reason, const Thread* thread) {
  if (engine.failed) return;
  engine.failed = true;
  std::string text = std::string("[") + engine.launch->kernel + "] " + (thread ? describe(*thread) + ": " : "") + reason;
  snprintf(engine.report->error, sizeof engine.report->error, "%s", text.c_str());
}

ThreadState& current() { return engine.threads[engine.current]; }

void to_scheduler() { context_switch(&engine.fibers[current().fiber].context, &engine.scheduler); }

// Gives up on the whole launch: the fibers that wait are never resumed.
void fail(const std::string& reason) {
  set_error(reason, &current().metal);
  to_scheduler();
  __builtin_unreachable();
}

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

// --- What kernels call ------------------------------------------------------------------------------------------------

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

// --- Threads as fibers ------------------------------------------------------------------------------------------------

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
    context_switch(&engine.scheduler, &engine.fibers[thread.fiber].context);
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

// --- Threadgroups -----------------------------------------------------------------------------------------------------

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

// --- Faults -----------------------------------------------------------------------------------------------------------

sigjmp_buf fault_escape;
const void* fault_address;
int fault_signal;

void on_fault(int signal, siginfo_t* info, void*) {
  fault_signal = signal;
  fault_address = info->si_addr;
  if (!engine.in_kernel) {  // a defect of the engine itself: let it crash
    ::signal(signal, SIG_DFL);
    return;
  }
  siglongjmp(fault_escape, 1);
}

const char* kind_name(int kind) {
  static const char* const names[] = {"input", "output", "shape or strides of", "threadgroup variable"};
  return names[kind];
}

std::string explain_region(const Region& region) {
  const int64_t offset = static_cast<const unsigned char*>(fault_address) - region.data;
  const int64_t bytes = int64_t(region.bytes);
  const std::string what = std::string(kind_name(region.kind)) + " '" + region.name + "'";
  if (offset >= 0 && offset < bytes) return "wrote to " + what + ", which is read-only";
  const std::string where = offset < 0 ? std::to_string(-offset) + " bytes before the start of "
                                       : std::to_string(offset - bytes + 1) + " bytes past the end of ";
  return "out-of-bounds access " + where + what + " (" + std::to_string(bytes) + " bytes)";
}

std::string explain_fault() {
  if (fault_signal == SIGFPE) return "integer division by zero";
  if (fault_signal == SIGILL || fault_signal == SIGTRAP)
    return "undefined behaviour: an index outside of a fixed-size array, a misaligned vector access, a shift by too "
           "many bits, or division by zero";
  for (uint32_t i = 0; i < engine.region_count; i++)
    if (region_claims(&engine.regions[i], fault_address)) return explain_region(engine.regions[i]);
  for (auto& [key, variable] : engine.variables)
    if (region_claims(&variable->region, fault_address)) return explain_region(variable->region);
  for (const Fiber& fiber : engine.fibers)
    if (fiber_guard_claims(&fiber, fault_address))
      return "local variables take more than " + std::to_string(FIBER_STACK_BYTES) + " bytes, or recursion";
  char text[64];
  snprintf(text, sizeof text, "memory fault at address %p", fault_address);
  return std::string(text) + ", which is far from every buffer";
}

// Turns processor faults inside of kernels into errors, for as long as it lives.
class FaultHandlers {
 public:
  FaultHandlers() {
    static char stack[64 * 1024];  // one launch at a time
    stack_t mine{};
    mine.ss_sp = stack;
    mine.ss_size = sizeof stack;
    sigaltstack(&mine, &old_stack_);
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < COUNT; i++) sigaction(SIGNALS[i], &action, &old_actions_[i]);
  }
  ~FaultHandlers() {
    for (int i = 0; i < COUNT; i++) sigaction(SIGNALS[i], &old_actions_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr int COUNT = 5;
  static constexpr int SIGNALS[COUNT] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
  struct sigaction old_actions_[COUNT];
  stack_t old_stack_;
};

void release_variables() {
  for (auto& [key, variable] : engine.variables) {
    region_unmap(&variable->region);
    delete variable;
  }
  engine.variables.clear();
}

}  // namespace

Services services = {threadgroup_barrier, simd_exchange, threadgroup_variable, uses_threadgroup_memory,
                     poison,              lane,          fail_from_kernel};

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
  {
    FaultHandlers handlers;
    if (sigsetjmp(fault_escape, 1) == 0) {
      engine.in_kernel = true;
      run_grid();
    } else {
      set_error(explain_fault(), &current().metal);
    }
    engine.in_kernel = false;
  }
  release_variables();
  engine.idle_fibers.resize(engine.fibers.size());  // those of threads that were given up are free again
  std::iota(engine.idle_fibers.begin(), engine.idle_fibers.end(), 0u);
  return engine.failed ? 1 : 0;
}

}  // extern "C"
