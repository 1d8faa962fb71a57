// Enough of CUDA for one thread of a CPU to run a kernel's text: blocks one after another, each thread a ucontext.
//
// It shows that the converted text computes the right thing: ids, shared memory, barriers, shuffles, tensor cores. It
// says nothing about speed, and finds no races: threads run in order from one wait to the next.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __constant__ static
#define __forceinline__ inline
#define __grid_constant__
#define __shared__ static

struct uint3 { unsigned x, y, z; };
struct ulong2 { unsigned long x, y; };
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

// --- Numbers -------------------------------------------------------------------------------------------------------

struct __half {
  _Float16 value;
  __half() = default;
  __half(float x) : value(x) {}
  operator float() const { return value; }
};
inline __half __float2half(float x) { return __half(x); }
inline float __half2float(__half x) { return x; }

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    bits = x != x ? 0x7fc0 : (word + 0x7fff + (word >> 16 & 1)) >> 16;
  }
  operator float() const {
    const uint32_t word = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &word, 4);
    return x;
  }
};
inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }

inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { return __uint_as_float(unsigned(x)); }
inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <class T> T atomicAdd(T* p, T x) { const T old = *p; *p = old + x; return old; }
template <class T> T atomicMin(T* p, T x) { const T old = *p; *p = x < old ? x : old; return old; }
template <class T> T atomicMax(T* p, T x) { const T old = *p; *p = old < x ? x : old; return old; }
template <class T> T atomicAnd(T* p, T x) { const T old = *p; *p = old & x; return old; }
template <class T> T atomicOr(T* p, T x) { const T old = *p; *p = old | x; return old; }
template <class T> T atomicXor(T* p, T x) { const T old = *p; *p = old ^ x; return old; }
template <class T> T atomicExch(T* p, T x) { const T old = *p; *p = x; return old; }

// --- Threads -------------------------------------------------------------------------------------------------------

namespace host {

struct Meeting {
  unsigned expected = 0, arrived = 0, round = 0;
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  uint3 index;
  bool done;
};
struct Warp {
  Meeting meeting;
  uint32_t words[32][4];
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Meeting block;
inline ucontext_t scheduler;
inline unsigned current;
inline uint3 grid, threads, place;
inline void (*body)();

inline void pause() { swapcontext(&fibers[current].context, &scheduler); }

// Waits until all that are expected have come. A kernel in which one never comes hangs a GPU; here it ends the process.
inline void meet(Meeting& meeting) {
  const unsigned round = meeting.round;
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    meeting.round++;
  }
  for (int turns = 0; meeting.round == round; turns++) {
    if (turns > 1000000) {
      fprintf(stderr, "a barrier was not reached by all threads\n");
      abort();
    }
    pause();
  }
}

// Shows the lane's words to the other lanes of its warp; `look` reads them while all are there.
template <int Count, class Look>
auto exchange(const uint32_t (&words)[Count], Look look) {
  Warp& warp = warps[current / 32];
  memcpy(warp.words[current % 32], words, sizeof words);
  meet(warp.meeting);
  const auto seen = look(warp.words);
  meet(warp.meeting);
  return seen;
}

inline void start() {
  body();
  fibers[current].done = true;
  pause();
}

inline void run_block() {
  const unsigned count = threads.x * threads.y * threads.z;
  if (count % 32) {
    fprintf(stderr, "%u threads are no whole warps\n", count);
    abort();
  }
  fibers.resize(count);
  warps.assign(count / 32, Warp{});
  for (Warp& warp : warps) warp.meeting.expected = 32;
  block = Meeting{count};
  for (unsigned i = 0; i < count; i++) {
    Fiber& fiber = fibers[i];
    fiber.stack.resize(128 * 1024);
    fiber.index = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
  }
  for (bool busy = true; busy;) {
    busy = false;
    for (current = 0; current < count; current++)
      if (!fibers[current].done) {
        busy = true;
        swapcontext(&scheduler, &fibers[current].context);
      }
  }
}

inline void run(const unsigned* size, const unsigned* group, void (*function)()) {
  threads = {group[0], group[1], group[2]};
  grid = {(size[0] + group[0] - 1) / group[0], (size[1] + group[1] - 1) / group[1], (size[2] + group[2] - 1) / group[2]};
  body = function;
  for (place.z = 0; place.z < grid.z; place.z++)
    for (place.y = 0; place.y < grid.y; place.y++)
      for (place.x = 0; place.x < grid.x; place.x++) run_block();
}

}  // namespace host

#define threadIdx (host::fibers[host::current].index)
#define blockIdx (host::place)
#define blockDim (host::threads)
#define gridDim (host::grid)

inline void __syncthreads() { host::meet(host::block); }
inline void __syncwarp(unsigned) { host::meet(host::warps[host::current / 32].meeting); }

template <class T>
T shuffle_from(T value, int lane) {
  uint32_t words[1];
  memcpy(words, &value, 4);
  const uint32_t word = host::exchange(words, [&](auto& all) { return all[lane & 31][0]; });
  memcpy(&value, &word, 4);
  return value;
}
template <class T> T __shfl_sync(unsigned, T value, int lane) { return shuffle_from(value, lane); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) { return shuffle_from(value, host::current ^ mask); }
template <class T> T __shfl_up_sync(unsigned, T value, int delta) {
  const int lane = host::current & 31;
  return shuffle_from(value, lane < delta ? lane : lane - delta);
}
template <class T> T __shfl_down_sync(unsigned, T value, int delta) {
  const int lane = host::current & 31;
  return shuffle_from(value, lane + delta > 31 ? lane : lane + delta);
}
inline bool __any_sync(unsigned, bool x) {
  return host::exchange<1>({x}, [](auto& all) { bool any = false; for (auto& w : all) any |= w[0]; return any; });
}
inline bool __all_sync(unsigned, bool x) {
  return host::exchange<1>({x}, [](auto& all) { bool every = true; for (auto& w : all) every &= w[0]; return every; });
}

// As the PTX manual lays out mma.m16n8k8 with tf32.
#define METAL_HAS_MMA_TF32
namespace metal {
inline void mma_tf32(float& d0, float& d1, float a0, float a1, float b0, float b1) {
  const uint32_t words[4] = {__float_as_uint(a0), __float_as_uint(a1), __float_as_uint(b0), __float_as_uint(b1)};
  for (uint32_t word : words)
    if (word & 0x1fff) {
      fprintf(stderr, "a factor has more bits than a tensor core takes\n");
      abort();
    }
  const int group = host::current % 32 / 4, own = host::current % 4;
  struct Sums { double first, second; };
  const Sums sums = host::exchange(words, [&](auto& all) {
    Sums s = {0, 0};
    for (int k = 0; k < 8; k++) {
      const double a = __uint_as_float(all[group * 4 + k % 4][k / 4]);
      s.first += a * __uint_as_float(all[own * 2 * 4 + k % 4][2 + k / 4]);
      s.second += a * __uint_as_float(all[(own * 2 + 1) * 4 + k % 4][2 + k / 4]);
    }
    return s;
  });
  d0 = float(d0 + sums.first);
  d1 = float(d1 + sums.second);
}
}  // namespace metal

namespace mlx::core::cu {
template <class T>
struct Numbers {
  T number[10];
  const T& operator[](int i) const { return number[i]; }
  const T* data() const { return number; }
};
using Shape = Numbers<int32_t>;
using Strides = Numbers<int64_t>;
}  // namespace mlx::core::cu
namespace cooperative_groups {}
