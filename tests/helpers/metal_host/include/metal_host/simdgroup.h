// SIMD-group functions: reductions, scans, shuffles, votes; quad-group functions.
//
// Every function is one exchange through the engine: each lane hands over its value, waits for the others, and works
// out its own result from all of them. `file` and `line` tell the engine which call in the text it is.
#pragma once

#include "math.h"
#include "sync.h"

namespace metal {

namespace detail {

// What all lanes handed to one call.
template <class T>
struct Exchange {
  const metal_host::SimdView* view;
  uint32_t lane;

  Exchange(const char* what, const T& value, const char* file, int line) {
    static_assert(sizeof(T) <= metal_host::SIMD_SLOT_BYTES);
    const metal_host::Site site{what, file, line};
    view = metal_host::services->simd_exchange(&site, &value, sizeof(T), &lane);
  }
  bool has(int from) const {
    return from >= 0 && from < int(metal_host::SIMD_WIDTH) && (view->lanes >> from & 1);
  }
  T operator[](int from) const {
    T value;
    __builtin_memcpy(static_cast<void*>(&value), view->slot[from], sizeof(T));
    return value;
  }
  // What a shuffle reads: undefined where there is no such lane, so here poison, which runs that differ in it expose.
  T shuffled(int from) const {
    if (has(from)) return (*this)[from];
    T value;
    __builtin_memset(static_cast<void*>(&value), metal_host::services->poison(), sizeof(T));
    return value;
  }
};

}  // namespace detail

#define METAL_HOST_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define METAL_HOST_NUMBERS(M, ...)                                                                             \
  M(__VA_ARGS__, float) M(__VA_ARGS__, half) M(__VA_ARGS__, int) M(__VA_ARGS__, uint) M(__VA_ARGS__, short)    \
  M(__VA_ARGS__, ushort) M(__VA_ARGS__, schar) M(__VA_ARGS__, uchar)
#define METAL_HOST_INTEGERS(M, ...)                                                                            \
  M(__VA_ARGS__, int) M(__VA_ARGS__, uint) M(__VA_ARGS__, short) M(__VA_ARGS__, ushort)                        \
  M(__VA_ARGS__, schar) M(__VA_ARGS__, uchar)

// --- Reductions -------------------------------------------------------------------------------------------------------

#define METAL_HOST_REDUCTION_BODY(NAME, COMBINED)                                                              \
  namespace detail {                                                                                           \
  template <class T>                                                                                           \
  inline T NAME##_of(T value, const char* file, int line) {                                                    \
    const Exchange<T> all(#NAME, value, file, line);                                                           \
    T a{};                                                                                                     \
    bool first = true;                                                                                         \
    for (uint32_t from = 0; from < metal_host::SIMD_WIDTH; from++) {                                           \
      if (!all.has(int(from))) continue;                                                                       \
      const T b = all[int(from)];                                                                              \
      a = first ? b : T(COMBINED);                                                                             \
      first = false;                                                                                           \
    }                                                                                                          \
    return a;                                                                                                  \
  }                                                                                                            \
  }
#define METAL_HOST_OVERLOAD(NAME, T)                                                                           \
  inline T NAME(T value, METAL_HOST_PLACE) { return detail::NAME##_of(value, file, line); }
#define METAL_HOST_OF_VECTOR(NAME)                                                                             \
  template <class T, int N>                                                                                    \
  inline vec<T, N> NAME(const vec<T, N>& value, METAL_HOST_PLACE) {                                            \
    vec<T, N> result;                                                                                          \
    for (int i = 0; i < N; i++) result[i] = NAME(value[i], file, line);                                        \
    return result;                                                                                             \
  }
#define METAL_HOST_REDUCTION(NAME, COMBINED)                                                                   \
  METAL_HOST_REDUCTION_BODY(NAME, COMBINED)                                                                    \
  inline float __metal_##NAME(float value, METAL_HOST_PLACE) { return detail::NAME##_of(value, file, line); }  \
  METAL_HOST_NUMBERS(METAL_HOST_OVERLOAD, NAME)                                                                \
  METAL_HOST_OF_VECTOR(NAME)
#define METAL_HOST_BIT_REDUCTION(NAME, COMBINED)                                                               \
  METAL_HOST_REDUCTION_BODY(NAME, COMBINED)                                                                    \
  METAL_HOST_INTEGERS(METAL_HOST_OVERLOAD, NAME)
METAL_HOST_REDUCTION(simd_sum, a + b)
METAL_HOST_REDUCTION(simd_product, a* b)
METAL_HOST_REDUCTION(simd_max, a < b ? b : a)
METAL_HOST_REDUCTION(simd_min, b < a ? b : a)
METAL_HOST_BIT_REDUCTION(simd_and, a& b)
METAL_HOST_BIT_REDUCTION(simd_or, a | b)
METAL_HOST_BIT_REDUCTION(simd_xor, a ^ b)
inline float __metal_simd_xor(float value, METAL_HOST_PLACE) {
  return float(detail::simd_xor_of(uint(value), file, line));
}

// --- Scans ------------------------------------------------------------------------------------------------------------

#define METAL_HOST_SCAN(NAME, START, OP, INCLUSIVE)                                                            \
  namespace detail {                                                                                           \
  template <class T>                                                                                           \
  inline T NAME##_of(T value, const char* file, int line) {                                                    \
    const Exchange<T> all(#NAME, value, file, line);                                                           \
    T result = T(START);                                                                                       \
    for (int from = 0; from < int(all.lane) + INCLUSIVE; from++)                                               \
      if (all.has(from)) result = T(result OP all[from]);                                                      \
    return result;                                                                                             \
  }                                                                                                            \
  }                                                                                                            \
  inline float __metal_##NAME(float value, METAL_HOST_PLACE) { return detail::NAME##_of(value, file, line); }  \
  METAL_HOST_NUMBERS(METAL_HOST_OVERLOAD, NAME)
METAL_HOST_SCAN(simd_prefix_exclusive_sum, 0, +, 0)
METAL_HOST_SCAN(simd_prefix_inclusive_sum, 0, +, 1)
METAL_HOST_SCAN(simd_prefix_exclusive_product, 1, *, 0)
METAL_HOST_SCAN(simd_prefix_inclusive_product, 1, *, 1)

// --- Shuffles ---------------------------------------------------------------------------------------------------------

// `from` is the lane to read, in terms of the own `lane` and the argument `k`.
#define METAL_HOST_SHUFFLE(NAME, FROM)                                                                         \
  template <class T>                                                                                           \
  inline T __metal_##NAME(T value, ushort k, METAL_HOST_PLACE) {                                               \
    const detail::Exchange<T> all(#NAME, value, file, line);                                                   \
    const int lane = int(all.lane);                                                                            \
    (void)lane;                                                                                                \
    return all.shuffled(FROM);                                                                                 \
  }                                                                                                            \
  template <class T>                                                                                           \
  inline T NAME(T value, ushort k, METAL_HOST_PLACE) { return __metal_##NAME(value, k, file, line); }
METAL_HOST_SHUFFLE(simd_shuffle, int(k))
METAL_HOST_SHUFFLE(simd_shuffle_xor, lane ^ int(k))
METAL_HOST_SHUFFLE(simd_broadcast, int(k))
METAL_HOST_SHUFFLE(simd_shuffle_rotate_down, (lane + int(k)) & 31)
METAL_HOST_SHUFFLE(simd_shuffle_rotate_up, (lane - int(k)) & 31)
METAL_HOST_SHUFFLE(simd_shuffle_down, lane + int(k) > 31 ? lane : lane + int(k))  // the last k lanes keep theirs
METAL_HOST_SHUFFLE(simd_shuffle_up, lane - int(k) < 0 ? lane : lane - int(k))     // the first k lanes keep theirs
METAL_HOST_SHUFFLE(quad_broadcast, (lane & ~3) + int(k))
METAL_HOST_SHUFFLE(quad_shuffle, (lane & ~3) + int(k))
METAL_HOST_SHUFFLE(quad_shuffle_xor, (lane & ~3) + ((lane ^ int(k)) & 3))
METAL_HOST_SHUFFLE(quad_shuffle_down, (lane & 3) + int(k) > 3 ? lane : lane + int(k))
METAL_HOST_SHUFFLE(quad_shuffle_up, (lane & 3) - int(k) < 0 ? lane : lane - int(k))

inline ushort __metal_get_simdgroup_size(ushort) { return ushort(metal_host::SIMD_WIDTH); }

// Lanes work in blocks of `modulo`; what would come from outside of the own block comes from `filling` instead.
#define METAL_HOST_SHUFFLE_AND_FILL(NAME, SIGN)                                                                \
  template <class T>                                                                                           \
  inline T __metal_##NAME(T value, T filling, ushort delta, ushort modulo, METAL_HOST_PLACE) {                 \
    const detail::Exchange<vec_pair<T>> all(#NAME, {value, filling}, file, line);                              \
    const int width = int(modulo), block = int(all.lane) / width * width;                                      \
    const int from = int(all.lane) - block SIGN int(delta);                                                    \
    if (from >= 0 && from < width) return all.shuffled(block + from).value;                                    \
    return all.shuffled(block + (from + width) % width).filling;                                               \
  }                                                                                                            \
  template <class T>                                                                                           \
  inline T NAME(T value, T filling, ushort delta, ushort modulo = 32, METAL_HOST_PLACE) {                      \
    return __metal_##NAME(value, filling, delta, modulo, file, line);                                          \
  }
template <class T>
struct vec_pair {
  T value, filling;
};
METAL_HOST_SHUFFLE_AND_FILL(simd_shuffle_and_fill_down, +)
METAL_HOST_SHUFFLE_AND_FILL(simd_shuffle_and_fill_up, -)

template <class T>
inline T simd_broadcast_first(T value, METAL_HOST_PLACE) {
  const detail::Exchange<T> all("simd_broadcast_first", value, file, line);
  return all[__builtin_ctz(all.view->lanes)];
}
inline bool simd_is_first(METAL_HOST_PLACE) {
  const detail::Exchange<int> all("simd_is_first", 0, file, line);
  return int(all.lane) == __builtin_ctz(all.view->lanes);
}

// --- Votes ------------------------------------------------------------------------------------------------------------

struct simd_vote {
  typedef uint64_t vote_t;
  vote_t votes;
  explicit constexpr simd_vote(vote_t v = 0) : votes(v) {}
  explicit constexpr operator vote_t() const { return votes; }
  constexpr bool all() const { return votes == 0xffffffffu; }
  constexpr bool any() const { return votes != 0; }
};
namespace detail {
inline uint64_t votes(const char* what, bool yes, const char* file, int line) {
  const Exchange<bool> all(what, yes, file, line);
  uint64_t result = 0;
  for (uint32_t from = 0; from < metal_host::SIMD_WIDTH; from++)
    if (all.has(int(from)) && all[int(from)]) result |= uint64_t(1) << from;
  return result;
}
}  // namespace detail
inline simd_vote simd_ballot(bool yes, METAL_HOST_PLACE) { return simd_vote(detail::votes("simd_ballot", yes, file, line)); }
inline bool simd_any(bool yes, METAL_HOST_PLACE) { return detail::votes("simd_any", yes, file, line) != 0; }
inline bool simd_all(bool yes, METAL_HOST_PLACE) { return detail::votes("simd_all", !yes, file, line) == 0; }
inline simd_vote simd_active_threads_mask(METAL_HOST_PLACE) {
  return simd_vote(detail::votes("simd_active_threads_mask", true, file, line));
}

// --- Quad groups: four neighbouring lanes -----------------------------------------------------------------------------

#define METAL_HOST_QUAD_REDUCTION(NAME, COMBINED)                                                              \
  namespace detail {                                                                                           \
  template <class T>                                                                                           \
  inline T NAME##_of(T value, const char* file, int line) {                                                    \
    const Exchange<T> all(#NAME, value, file, line);                                                           \
    const int first = int(all.lane) & ~3;                                                                      \
    T a = all.shuffled(first);                                                                                 \
    for (int i = 1; i < 4; i++)                                                                                \
      if (all.has(first + i)) {                                                                                \
        const T b = all[first + i];                                                                            \
        a = T(COMBINED);                                                                                       \
      }                                                                                                        \
    return a;                                                                                                  \
  }                                                                                                            \
  }                                                                                                            \
  METAL_HOST_NUMBERS(METAL_HOST_OVERLOAD, NAME)
METAL_HOST_QUAD_REDUCTION(quad_sum, a + b)
METAL_HOST_QUAD_REDUCTION(quad_product, a* b)
METAL_HOST_QUAD_REDUCTION(quad_max, a < b ? b : a)
METAL_HOST_QUAD_REDUCTION(quad_min, b < a ? b : a)

#undef METAL_HOST_QUAD_REDUCTION
#undef METAL_HOST_SHUFFLE_AND_FILL
#undef METAL_HOST_SHUFFLE
#undef METAL_HOST_SCAN
#undef METAL_HOST_BIT_REDUCTION
#undef METAL_HOST_REDUCTION
#undef METAL_HOST_OF_VECTOR
#undef METAL_HOST_OVERLOAD
#undef METAL_HOST_REDUCTION_BODY
#undef METAL_HOST_INTEGERS
#undef METAL_HOST_NUMBERS

}  // namespace metal
