// Metal's keywords. A CPU has one address space, so here they mean nothing; lint.py is what checks them. Declarations of
// threadgroup variables do mean something: translate.py has rewritten them before the compiler sees this.
#pragma once

using namespace metal;

#define device
#define constant
#define thread
#define threadgroup
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))
#define __METAL__ 1
#define __METAL_VERSION__ 310
#define MLX_METAL_JIT 1
