// Metal's vocabulary for clang -fsyntax-only: declarations alone, with address spaces that clang tells apart.
//
// A pointer or reference without an address space means `thread`, as most of a kernel's locals are. Scalars must be
// built-in types, because a class could not be read from or written to another address space; so bfloat is clang's
// __fp16 here, a 16-bit float unlike half. What is implicit between the float types is for the host runner to check.
#pragma once

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

typedef _Float16 half;
typedef __fp16 bfloat;
typedef half float16_t;
typedef bfloat bfloat16_t;

#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))  // nobody writes to it
#define threadgroup __attribute__((address_space(3)))
#define thread
#define kernel
#define METAL_FUNC inline
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define FLT_MAX 3.402823466e+38f
#define M_PI_F 3.14159265358979323846f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f

namespace metal {

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
#define LINT_VECTORS(NAME, T)                           \
  typedef T NAME##2 __attribute__((ext_vector_type(2))); \
  typedef T NAME##3 __attribute__((ext_vector_type(3))); \
  typedef T NAME##4 __attribute__((ext_vector_type(4)));
LINT_VECTORS(float, float)
LINT_VECTORS(half, half)
LINT_VECTORS(bfloat, bfloat)
LINT_VECTORS(char, signed char)
LINT_VECTORS(uchar, uchar)
LINT_VECTORS(short, short)
LINT_VECTORS(ushort, ushort)
LINT_VECTORS(int, int)
LINT_VECTORS(uint, uint)
LINT_VECTORS(long, long)
LINT_VECTORS(ulong, ulong)
#undef LINT_VECTORS

template <class V, class... Parts>
V make_vector(Parts...);  // lint.py spells float4(a, b) so

// --- Types and their limits -------------------------------------------------------------------------------------------

template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F>
struct conditional {
  typedef T type;
};
template <class T, class F>
struct conditional<false, T, F> {
  typedef F type;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;
template <class A, class B>
inline constexpr bool is_same_v = __is_same(A, B);
template <class T>
inline constexpr bool is_integral_v = __is_integral(T);
template <class T>
inline constexpr bool is_floating_point_v = __is_floating_point(T);
template <class T>
struct numeric_limits {
  static constexpr T infinity() { return T(__builtin_inff()); }
  static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }
  static constexpr T max() { return T(0); }
  static constexpr T min() { return T(0); }
  static constexpr T lowest() { return T(0); }
  static constexpr T epsilon() { return T(0); }
};
template <class To, class From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  return __builtin_bit_cast(To, from);
}

// --- Functions of numbers ---------------------------------------------------------------------------------------------
// For float and half, and their vectors. bfloat's are those that MLX adds: they take and give bfloat.

#define LINT_ONE(NAME)                                                                                    \
  float NAME(float);                                                                                      \
  half NAME(half);                                                                                        \
  bfloat NAME(bfloat);                                                                                    \
  float2 NAME(float2);                                                                                    \
  float3 NAME(float3);                                                                                    \
  float4 NAME(float4);                                                                                    \
  half2 NAME(half2);                                                                                      \
  half4 NAME(half4);
#define LINT_TWO(NAME)                                                                                    \
  float NAME(float, float);                                                                               \
  half NAME(half, half);                                                                                  \
  bfloat NAME(bfloat, bfloat);                                                                            \
  float2 NAME(float2, float2);                                                                            \
  float4 NAME(float4, float4);                                                                            \
  half4 NAME(half4, half4);
#define LINT_THREE(NAME)                                                                                  \
  float NAME(float, float, float);                                                                        \
  half NAME(half, half, half);                                                                            \
  bfloat NAME(bfloat, bfloat, bfloat);                                                                    \
  float4 NAME(float4, float4, float4);
#define LINT_MATH                                                                                         \
  LINT_ONE(acos) LINT_ONE(acosh) LINT_ONE(asin) LINT_ONE(asinh) LINT_ONE(atan) LINT_ONE(atanh)            \
  LINT_ONE(ceil) LINT_ONE(cos) LINT_ONE(cosh) LINT_ONE(cospi) LINT_ONE(exp) LINT_ONE(exp10)               \
  LINT_ONE(exp2) LINT_ONE(fabs) LINT_ONE(floor) LINT_ONE(fract) LINT_ONE(log) LINT_ONE(log10)             \
  LINT_ONE(log2) LINT_ONE(rint) LINT_ONE(round) LINT_ONE(rsqrt) LINT_ONE(sin) LINT_ONE(sinh)              \
  LINT_ONE(sinpi) LINT_ONE(sqrt) LINT_ONE(tan) LINT_ONE(tanh) LINT_ONE(tanpi) LINT_ONE(trunc)             \
  LINT_TWO(atan2) LINT_TWO(copysign) LINT_TWO(fdim) LINT_TWO(fmax) LINT_TWO(fmin) LINT_TWO(fmod)          \
  LINT_TWO(pow) LINT_TWO(powr) LINT_TWO(divide) LINT_THREE(fma)
LINT_MATH
namespace fast {
LINT_MATH
}
namespace precise {
LINT_MATH
}
LINT_ONE(abs)
LINT_ONE(sign)
LINT_ONE(saturate)
LINT_TWO(max)
LINT_TWO(min)
LINT_TWO(step)
LINT_THREE(clamp)
LINT_THREE(mix)
LINT_THREE(smoothstep)
LINT_THREE(max3)
LINT_THREE(min3)
LINT_THREE(median3)
#define LINT_INTEGER(T)                                                                                   \
  T max(T, T);                                                                                            \
  T min(T, T);                                                                                            \
  T clamp(T, T, T);                                                                                       \
  T abs(T);                                                                                               \
  T absdiff(T, T);                                                                                        \
  T max3(T, T, T);                                                                                        \
  T min3(T, T, T);                                                                                        \
  T popcount(T);                                                                                          \
  T clz(T);                                                                                               \
  T ctz(T);                                                                                               \
  T mulhi(T, T);                                                                                          \
  T rotate(T, T);                                                                                         \
  T reverse_bits(T);
LINT_INTEGER(signed char)
LINT_INTEGER(uchar)
LINT_INTEGER(short)
LINT_INTEGER(ushort)
LINT_INTEGER(int)
LINT_INTEGER(uint)
LINT_INTEGER(long)
LINT_INTEGER(ulong)
#undef LINT_INTEGER
bool isnan(float);
bool isinf(float);
bool isfinite(float);
bool signbit(float);
float ldexp(float, int);
float frexp(float, int&);
float modf(float, float&);
float sincos(float, float&);
float dot(float2, float2);
float dot(float3, float3);
float dot(float4, float4);
half dot(half4, half4);
template <class T>
T select(T, T, bool);

// --- Synchronisation --------------------------------------------------------------------------------------------------

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
enum memory_order { memory_order_relaxed };

template <class T>
struct atomic {
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<ulong> atomic_ulong;
#define LINT_ATOMIC(SPACE)                                                                                \
  template <class T>                                                                                      \
  T atomic_load_explicit(const volatile SPACE atomic<T>*, memory_order);                                  \
  template <class T, class U>                                                                             \
  void atomic_store_explicit(volatile SPACE atomic<T>*, U, memory_order);                                 \
  template <class T, class U>                                                                             \
  T atomic_exchange_explicit(volatile SPACE atomic<T>*, U, memory_order);                                 \
  template <class T, class U>                                                                             \
  bool atomic_compare_exchange_weak_explicit(volatile SPACE atomic<T>*, T*, U, memory_order, memory_order); \
  template <class T, class U>                                                                             \
  T atomic_fetch_add_explicit(volatile SPACE atomic<T>*, U, memory_order);                                \
  template <class T, class U>                                                                             \
  T atomic_fetch_sub_explicit(volatile SPACE atomic<T>*, U, memory_order);                                \
  template <class T, class U>                                                                             \
  T atomic_fetch_max_explicit(volatile SPACE atomic<T>*, U, memory_order);                                \
  template <class T, class U>                                                                             \
  T atomic_fetch_min_explicit(volatile SPACE atomic<T>*, U, memory_order);                                \
  template <class T, class U>                                                                             \
  T atomic_fetch_and_explicit(volatile SPACE atomic<T>*, U, memory_order);                                \
  template <class T, class U>                                                                             \
  T atomic_fetch_or_explicit(volatile SPACE atomic<T>*, U, memory_order);                                 \
  template <class T, class U>                                                                             \
  T atomic_fetch_xor_explicit(volatile SPACE atomic<T>*, U, memory_order);
LINT_ATOMIC(device)
LINT_ATOMIC(threadgroup)
#undef LINT_ATOMIC

// --- SIMD groups ------------------------------------------------------------------------------------------------------

#define LINT_REDUCTION(NAME)                                                                              \
  LINT_ONE(NAME)                                                                                          \
  int NAME(int);                                                                                          \
  uint NAME(uint);                                                                                        \
  short NAME(short);                                                                                      \
  ushort NAME(ushort);                                                                                    \
  signed char NAME(signed char);                                                                          \
  uchar NAME(uchar);
LINT_REDUCTION(simd_sum)
LINT_REDUCTION(simd_product)
LINT_REDUCTION(simd_max)
LINT_REDUCTION(simd_min)
LINT_REDUCTION(simd_prefix_exclusive_sum)
LINT_REDUCTION(simd_prefix_inclusive_sum)
LINT_REDUCTION(simd_prefix_exclusive_product)
LINT_REDUCTION(simd_prefix_inclusive_product)
LINT_REDUCTION(quad_sum)
LINT_REDUCTION(quad_max)
LINT_REDUCTION(quad_min)
#undef LINT_REDUCTION
int simd_and(int);
uint simd_and(uint);
int simd_or(int);
uint simd_or(uint);
int simd_xor(int);
uint simd_xor(uint);
bool simd_all(bool);
bool simd_any(bool);
bool simd_is_first();
struct simd_vote {
  typedef ulong vote_t;
  explicit operator vote_t() const;
  bool all() const;
  bool any() const;
};
simd_vote simd_ballot(bool);
template <class T>
T simd_broadcast_first(T);
#define LINT_SHUFFLE(NAME) \
  template <class T>       \
  T NAME(T, ushort);
LINT_SHUFFLE(simd_shuffle)
LINT_SHUFFLE(simd_shuffle_xor)
LINT_SHUFFLE(simd_shuffle_up)
LINT_SHUFFLE(simd_shuffle_down)
LINT_SHUFFLE(simd_shuffle_rotate_up)
LINT_SHUFFLE(simd_shuffle_rotate_down)
LINT_SHUFFLE(simd_broadcast)
LINT_SHUFFLE(quad_broadcast)
LINT_SHUFFLE(quad_shuffle)
LINT_SHUFFLE(quad_shuffle_xor)
LINT_SHUFFLE(quad_shuffle_up)
LINT_SHUFFLE(quad_shuffle_down)
#undef LINT_SHUFFLE
template <class T>
T simd_shuffle_and_fill_up(T, T, ushort, ushort = 32);
template <class T>
T simd_shuffle_and_fill_down(T, T, ushort, ushort = 32);

template <class T, int ROWS, int COLUMNS>
struct simdgroup_matrix {
  static_assert(ROWS == 8 && COLUMNS == 8, "Metal has 8x8 only");
  simdgroup_matrix();
  explicit simdgroup_matrix(T diagonal);
  vec<T, 2>& thread_elements();
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <class T, int R, int C>
simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T);
template <class T, int R, int C>
simdgroup_matrix<T, R, C> make_diagonal_simdgroup_matrix(T);
// Metal loads and stores fragments in device and threadgroup memory only.
#define LINT_FRAGMENT(SPACE)                                                                              \
  template <class T>                                                                                      \
  void simdgroup_load(simdgroup_matrix<T, 8, 8>&, const SPACE T*, ulong = 8, ulong2 = 0, bool = false);   \
  template <class T>                                                                                      \
  void simdgroup_store(simdgroup_matrix<T, 8, 8>, SPACE T*, ulong = 8, ulong2 = 0, bool = false);
LINT_FRAGMENT(device)
LINT_FRAGMENT(threadgroup)
#undef LINT_FRAGMENT
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>, simdgroup_matrix<B, 8, 8>,
                                   simdgroup_matrix<C, 8, 8>);
template <class D, class A, class B>
void simdgroup_multiply(simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>, simdgroup_matrix<B, 8, 8>);

#undef LINT_MATH
#undef LINT_THREE
#undef LINT_TWO
#undef LINT_ONE

}  // namespace metal

using namespace metal;

// --- Of MLX's utils.h, what kernels may use ---------------------------------------------------------------------------

template <class U>
struct Limits {
  static constexpr constant U max = U(0);
  static constexpr constant U min = U(0);
  static constexpr constant U finite_max = U(0);
  static constexpr constant U finite_min = U(0);
};
template <class T, class U>
inline T ceildiv(T n, U m) {
  return (n + m - 1) / m;
}
template <class Index = int64_t>
Index elem_to_loc(Index, constant const int*, constant const int64_t*, int);
template <class Index = int64_t>
Index elem_to_loc(uint3, constant const int*, constant const int64_t*, int);
float log1p(float);
