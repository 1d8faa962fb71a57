// Fibers: stacks that can be switched between without the operating system. One fiber runs one Metal thread at a time.
//
// Two implementations: a few instructions on x86-64 and arm64, and <ucontext.h> everywhere else, or here too when
// METAL_HOST_UCONTEXT is defined.
#pragma once

#include <stddef.h>

#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(METAL_HOST_UCONTEXT)
#define METAL_HOST_UCONTEXT 1
#endif

#ifdef METAL_HOST_UCONTEXT
#include <ucontext.h>
#endif

namespace metal_host {

// A place to go back to: a stack pointer below which the callee-saved registers lie.
struct Context {
#ifdef METAL_HOST_UCONTEXT
  ucontext_t state;
#else
  void* stack_pointer;
#endif
};

struct Fiber {
  Context context;
  char* base;  // of the mapping; its first pages are a guard
};

constexpr size_t FIBER_STACK_BYTES = 128 * 1024;
constexpr size_t FIBER_GUARD_BYTES = 64 * 1024;  // a multiple of every page size in use

bool fiber_create(Fiber* fiber);
void fiber_start(Fiber* fiber, void (*main)());  // the next switch to it begins `main`, which must never return
void context_switch(Context* from, Context* to);
bool fiber_guard_claims(const Fiber* fiber, const void* address);
const char* fiber_implementation();

}  // namespace metal_host
