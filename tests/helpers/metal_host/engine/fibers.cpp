// Fibers: see fibers.h.
#include "fibers.h"

#include <string.h>
#include <sys/mman.h>

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

#ifdef __APPLE__
#define SYMBOL(name) "_" name
#else
#define SYMBOL(name) name
#endif

#if !defined(METAL_HOST_UCONTEXT)
extern "C" void metal_host_switch(void** save, void* load);
#if defined(__x86_64__)
// System V: rbx, rbp and r12 to r15 survive a call; the return address is on the stack already.
asm(".text\n.globl " SYMBOL("metal_host_switch") "\n" SYMBOL("metal_host_switch") ":\n" R"(
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
constexpr int SAVED_WORDS = 6;
#else
// AAPCS64: x19 to x30 and the low halves of v8 to v15 survive a call; x30 is the return address.
asm(".text\n.p2align 2\n.globl " SYMBOL("metal_host_switch") "\n" SYMBOL("metal_host_switch") ":\n" R"(
  stp x19, x20, [sp, #-160]!
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x19, x20, [sp], #160
  ret
)");
constexpr int SAVED_WORDS = 20;
constexpr int RETURN_ADDRESS_WORD = 11;
#endif
#endif

namespace metal_host {

bool fiber_create(Fiber* fiber) {
  const size_t bytes = FIBER_GUARD_BYTES + FIBER_STACK_BYTES;
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return false;
  mprotect(base, FIBER_GUARD_BYTES, PROT_NONE);
  fiber->base = static_cast<char*>(base);
  return true;
}

bool fiber_guard_claims(const Fiber* fiber, const void* address) {
  const char* byte = static_cast<const char*>(address);
  return byte >= fiber->base && byte < fiber->base + FIBER_GUARD_BYTES;
}

#ifdef METAL_HOST_UCONTEXT

void fiber_start(Fiber* fiber, void (*main)()) {
  getcontext(&fiber->context.state);
  fiber->context.state.uc_stack.ss_sp = fiber->base + FIBER_GUARD_BYTES;
  fiber->context.state.uc_stack.ss_size = FIBER_STACK_BYTES;
  fiber->context.state.uc_link = nullptr;
  makecontext(&fiber->context.state, main, 0);
}

void context_switch(Context* from, Context* to) { swapcontext(&from->state, &to->state); }

const char* fiber_implementation() { return "ucontext"; }

#else

void fiber_start(Fiber* fiber, void (*main)()) {
  // The frame that metal_host_switch would have left: zeros for every register, `main` as the return address.
  char* top = fiber->base + FIBER_GUARD_BYTES + FIBER_STACK_BYTES - 64;
  void** words = reinterpret_cast<void**>(top);
#if defined(__x86_64__)
  *--words = nullptr;  // where main's own return address would be: keeps the stack's alignment as after a call
  *--words = reinterpret_cast<void*>(main);
  words -= SAVED_WORDS;
  memset(words, 0, SAVED_WORDS * sizeof(void*));
#else
  words -= SAVED_WORDS;
  memset(words, 0, SAVED_WORDS * sizeof(void*));
  words[RETURN_ADDRESS_WORD] = reinterpret_cast<void*>(main);
#endif
  fiber->context.stack_pointer = words;
}

void context_switch(Context* from, Context* to) { metal_host_switch(&from->stack_pointer, to->stack_pointer); }

const char* fiber_implementation() {
#if defined(__x86_64__)
  return "x86-64";
#else
  return "arm64";
#endif
}

#endif

}  // namespace metal_host
