// Processor faults inside of kernels, as errors that say what was touched.
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <sys/time.h>

#include "state.h"

namespace metal_host {
namespace {

sigjmp_buf fault_escape;
const void* fault_address;
int fault_signal;
pthread_t launching_thread;

void on_fault(int signal, siginfo_t* info, void*) {
  const bool mine = pthread_equal(pthread_self(), launching_thread);
  if (mine && engine.in_kernel) {
    fault_signal = signal;
    fault_address = info->si_addr;
    siglongjmp(fault_escape, 1);
  }
  if (signal != SIGVTALRM) {
    ::signal(signal, SIG_DFL);  // a defect of the engine itself, or of another thread: let it crash
  } else if (!mine) {
    pthread_kill(launching_thread, signal);  // timers interrupt any thread of the process
  }  // else the timer will come again
}

const char* kind_name(int kind) {
  static const char* const names[] = {"input", "output", "shape or strides", "threadgroup variable"};
  return names[kind];
}

std::string explain_region(const Region& region) {
  const int64_t offset = static_cast<const unsigned char*>(fault_address) - region.data;
  const int64_t bytes = int64_t(region.bytes);
  const std::string what = std::string(kind_name(region.kind)) + " '" + region.name + "'";
  if (offset >= 0 && offset < bytes) return "wrote to " + what + ", which is read-only";
  return "out-of-bounds access to byte " + std::to_string(offset) + " of " + what + ", which has " +
         std::to_string(bytes);
}

std::string explain_fault() {
  if (fault_signal == SIGVTALRM)
    return "the launch has taken " + std::to_string(engine.launch->limit_seconds) +
           " seconds of processor time: an endless loop?";
  if (fault_signal == SIGFPE) return "integer division by zero";
  if (fault_signal == SIGILL || fault_signal == SIGTRAP) return "an index outside of a vector, or a trap of the compiler's";
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
    launching_thread = pthread_self();
    static char stack[64 * 1024];  // one launch at a time
    stack_t mine{};
    mine.ss_sp = stack;
    mine.ss_size = sizeof stack;
    sigaltstack(&mine, &old_stack_);
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < COUNT; i++) sigaction(SIGNALS[i], &action, &old_actions_[i]);
    const itimerval limit{{1, 0}, {engine.launch->limit_seconds, 0}};
    setitimer(ITIMER_VIRTUAL, &limit, &old_timer_);
  }
  ~FaultHandlers() {
    setitimer(ITIMER_VIRTUAL, &old_timer_, nullptr);
    for (int i = 0; i < COUNT; i++) sigaction(SIGNALS[i], &old_actions_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr int COUNT = 6;
  static constexpr int SIGNALS[COUNT] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE, SIGVTALRM};
  struct sigaction old_actions_[COUNT];
  stack_t old_stack_;
  itimerval old_timer_;
};

}  // namespace

void run_grid_guarded() {
  FaultHandlers handlers;
  if (sigsetjmp(fault_escape, 1) == 0) {
    run_grid();
  } else {
    set_error(explain_fault(), &current().metal);
  }
  engine.in_kernel = false;
}

}  // namespace metal_host
