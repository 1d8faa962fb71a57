// <metal_math>, <metal_common>, <metal_integer>, <metal_relational>, <metal_geometric>.
//
// The plain, fast:: and precise:: forms are all computed by the host's float library, which is at least as accurate as
// a GPU's. Overloads are those of Metal: a call with arguments of different types is ambiguous here as it is there.
#pragma once

#include "vectors.h"

// How MLX's bf16_math.h tells its three families apart when it calls __metal_exp(x, family).
#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 0

namespace metal {
namespace detail {
constexpr float PI = 3.14159265358979323846f;

inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float exp10(float x) { return __builtin_powf(10.0f, x); }
inline float cospi(float x) { return float(__builtin_cos(double(x) * 3.14159265358979323846)); }
inline float sinpi(float x) { return float(__builtin_sin(double(x) * 3.14159265358979323846)); }
inline float tanpi(float x) { return float(__builtin_tan(double(x) * 3.14159265358979323846)); }
inline float fract(float x) {  // always below 1, also for tiny negative x
  const float part = x - __builtin_floorf(x);
  return part < 1.0f ? part : 0x1.fffffep-1f;
}
inline float divide(float x, float y) { return x / y; }
inline float powr(float x, float y) { return x < 0 ? __builtin_nanf("") : __builtin_powf(x, y); }
inline float median3(float x, float y, float z) {
  return __builtin_fmaxf(__builtin_fminf(x, y), __builtin_fminf(__builtin_fmaxf(x, y), z));
}
inline float max3(float x, float y, float z) { return __builtin_fmaxf(x, __builtin_fmaxf(y, z)); }
inline float min3(float x, float y, float z) { return __builtin_fminf(x, __builtin_fminf(y, z)); }
}  // namespace detail

// Functions of one, two and three numbers: for float, half, their vectors, and under the name that MLX's header calls.
#define METAL_HOST_MATH1_FORMS(NAME, CALL)                                                   \
  inline float NAME(float x) { return CALL(x); }                                             \
  inline half NAME(half x) { return half(CALL(float(x))); }                                  \
  template <class T, int N>                                                                  \
  inline vec<T, N> NAME(const vec<T, N>& x) {                                                \
    return detail::each(x, [](T a) { return T(CALL(float(a))); });                           \
  }
#define METAL_HOST_MATH2_FORMS(NAME, CALL)                                                   \
  inline float NAME(float x, float y) { return CALL(x, y); }                                 \
  inline half NAME(half x, half y) { return half(CALL(float(x), float(y))); }                \
  template <class T, int N>                                                                  \
  inline vec<T, N> NAME(const vec<T, N>& x, const vec<T, N>& y) {                            \
    return detail::each(x, y, [](T a, T b) { return T(CALL(float(a), float(b))); });         \
  }
#define METAL_HOST_MATH3_FORMS(NAME, CALL)                                                   \
  inline float NAME(float x, float y, float z) { return CALL(x, y, z); }                     \
  inline half NAME(half x, half y, half z) { return half(CALL(float(x), float(y), float(z))); } \
  template <class T, int N>                                                                  \
  inline vec<T, N> NAME(const vec<T, N>& x, const vec<T, N>& y, const vec<T, N>& z) {        \
    vec<T, N> result;                                                                        \
    for (int i = 0; i < N; i++) result[i] = T(CALL(float(x[i]), float(y[i]), float(z[i])));  \
    return result;                                                                           \
  }
#define METAL_HOST_MATH(FORMS, NAME, CALL)                                                   \
  FORMS(NAME, CALL)                                                                          \
  namespace fast { FORMS(NAME, CALL) }                                                       \
  namespace precise { FORMS(NAME, CALL) }
#define METAL_HOST_MATH1(NAME, CALL)                                                         \
  METAL_HOST_MATH(METAL_HOST_MATH1_FORMS, NAME, CALL)                                        \
  template <class... Family>                                                                 \
  inline float __metal_##NAME(float x, Family...) { return CALL(x); }
#define METAL_HOST_MATH2(NAME, CALL)                                                         \
  METAL_HOST_MATH(METAL_HOST_MATH2_FORMS, NAME, CALL)                                        \
  template <class... Family>                                                                 \
  inline float __metal_##NAME(float x, float y, Family...) { return CALL(x, y); }
#define METAL_HOST_MATH3(NAME, CALL)                                                         \
  METAL_HOST_MATH(METAL_HOST_MATH3_FORMS, NAME, CALL)                                        \
  template <class... Family>                                                                 \
  inline float __metal_##NAME(float x, float y, float z, Family...) { return CALL(x, y, z); }

METAL_HOST_MATH1(acos, __builtin_acosf)
METAL_HOST_MATH1(acosh, __builtin_acoshf)
METAL_HOST_MATH1(asin, __builtin_asinf)
METAL_HOST_MATH1(asinh, __builtin_asinhf)
METAL_HOST_MATH1(atan, __builtin_atanf)
METAL_HOST_MATH1(atanh, __builtin_atanhf)
METAL_HOST_MATH1(ceil, __builtin_ceilf)
METAL_HOST_MATH1(cos, __builtin_cosf)
METAL_HOST_MATH1(cosh, __builtin_coshf)
METAL_HOST_MATH1(cospi, detail::cospi)
METAL_HOST_MATH1(exp, __builtin_expf)
METAL_HOST_MATH1(exp10, detail::exp10)
METAL_HOST_MATH1(exp2, __builtin_exp2f)
METAL_HOST_MATH1(fabs, __builtin_fabsf)
METAL_HOST_MATH1(floor, __builtin_floorf)
METAL_HOST_MATH1(fract, detail::fract)
METAL_HOST_MATH1(log, __builtin_logf)
METAL_HOST_MATH1(log10, __builtin_log10f)
METAL_HOST_MATH1(log2, __builtin_log2f)
METAL_HOST_MATH1(rint, __builtin_rintf)
METAL_HOST_MATH1(round, __builtin_roundf)
METAL_HOST_MATH1(rsqrt, detail::rsqrt)
METAL_HOST_MATH1(sin, __builtin_sinf)
METAL_HOST_MATH1(sinh, __builtin_sinhf)
METAL_HOST_MATH1(sinpi, detail::sinpi)
METAL_HOST_MATH1(sqrt, __builtin_sqrtf)
METAL_HOST_MATH1(tan, __builtin_tanf)
METAL_HOST_MATH1(tanh, __builtin_tanhf)
METAL_HOST_MATH1(tanpi, detail::tanpi)
METAL_HOST_MATH1(trunc, __builtin_truncf)

METAL_HOST_MATH2(atan2, __builtin_atan2f)
METAL_HOST_MATH2(copysign, __builtin_copysignf)
METAL_HOST_MATH2(divide, detail::divide)
METAL_HOST_MATH2(fdim, __builtin_fdimf)
METAL_HOST_MATH2(fmax, __builtin_fmaxf)
METAL_HOST_MATH2(fmin, __builtin_fminf)
METAL_HOST_MATH2(fmod, __builtin_fmodf)
METAL_HOST_MATH2(nextafter, __builtin_nextafterf)
METAL_HOST_MATH2(pow, __builtin_powf)
METAL_HOST_MATH2(powr, detail::powr)

METAL_HOST_MATH3(fma, __builtin_fmaf)
METAL_HOST_MATH3(fmax3, detail::max3)
METAL_HOST_MATH3(fmedian3, detail::median3)
METAL_HOST_MATH3(fmin3, detail::min3)

#undef METAL_HOST_MATH3
#undef METAL_HOST_MATH2
#undef METAL_HOST_MATH1
#undef METAL_HOST_MATH
#undef METAL_HOST_MATH3_FORMS
#undef METAL_HOST_MATH2_FORMS
#undef METAL_HOST_MATH1_FORMS

inline float sincos(float x, float& cosine) {
  cosine = __builtin_cosf(x);
  return __builtin_sinf(x);
}
inline float modf(float x, float& whole) { return __builtin_modff(x, &whole); }
inline float ldexp(float x, int k) { return __builtin_ldexpf(x, k); }
inline half ldexp(half x, int k) { return half(__builtin_ldexpf(float(x), k)); }
inline float frexp(float x, int& exponent) { return __builtin_frexpf(x, &exponent); }
inline int ilogb(float x) { return __builtin_ilogbf(x); }
template <class... Family>
inline float __metal_ldexp(float x, int k, Family...) { return __builtin_ldexpf(x, k); }
inline float __metal_frexp(float x, int* exponent) { return __builtin_frexpf(x, exponent); }
inline float __metal_modf(float x, float* whole) { return __builtin_modff(x, whole); }
inline int __metal_ilogb(float x) { return __builtin_ilogbf(x); }
template <class... Family>
inline float __metal_sincos(float x, float* cosine, Family...) {
  *cosine = __builtin_cosf(x);
  return __builtin_sinf(x);
}

// --- abs, max, min, clamp, mix ... ------------------------------------------------------------------------------------

#define METAL_HOST_INTEGER_COMMON(T)                                                             \
  inline T max(T a, T b) { return a < b ? b : a; }                                               \
  inline T min(T a, T b) { return b < a ? b : a; }                                               \
  inline T max3(T a, T b, T c) { return max(a, max(b, c)); }                                     \
  inline T min3(T a, T b, T c) { return min(a, min(b, c)); }                                     \
  inline T median3(T a, T b, T c) { return max(min(a, b), min(max(a, b), c)); }                  \
  inline T clamp(T x, T low, T high) { return min(max(x, low), high); }                          \
  inline T abs(T x) { return x < T(0) ? T(-x) : x; }                                             \
  inline T absdiff(T a, T b) { return a < b ? T(b - a) : T(a - b); }                             \
  inline T popcount(T x) { return T(__builtin_popcountll(std::make_unsigned_t<T>(x))); }         \
  inline T ctz(T x) { return x ? T(__builtin_ctzll(std::make_unsigned_t<T>(x))) : T(8 * sizeof(T)); } \
  inline T clz(T x) {                                                                            \
    return x ? T(__builtin_clzll(std::make_unsigned_t<T>(x)) - (64 - 8 * int(sizeof(T)))) : T(8 * sizeof(T)); \
  }                                                                                              \
  inline T reverse_bits(T x) {                                                                   \
    T result = 0;                                                                                \
    for (unsigned i = 0; i < 8 * sizeof(T); i++) result = T(result | T(((x >> i) & 1) << (8 * sizeof(T) - 1 - i))); \
    return result;                                                                               \
  }                                                                                              \
  inline T rotate(T x, T by) {                                                                   \
    using U = std::make_unsigned_t<T>;                                                           \
    const unsigned width = 8 * sizeof(T), k = unsigned(U(by)) % width;                           \
    return k ? T(U(U(x) << k) | U(U(x) >> (width - k))) : x;                                     \
  }
METAL_HOST_INTEGER_COMMON(schar)
METAL_HOST_INTEGER_COMMON(uchar)
METAL_HOST_INTEGER_COMMON(short)
METAL_HOST_INTEGER_COMMON(ushort)
METAL_HOST_INTEGER_COMMON(int)
METAL_HOST_INTEGER_COMMON(uint)
METAL_HOST_INTEGER_COMMON(long)
METAL_HOST_INTEGER_COMMON(ulong)
METAL_HOST_INTEGER_COMMON(llong)
METAL_HOST_INTEGER_COMMON(ullong)
#undef METAL_HOST_INTEGER_COMMON

inline int mulhi(int a, int b) { return int((int64_t(a) * b) >> 32); }
inline uint mulhi(uint a, uint b) { return uint((uint64_t(a) * b) >> 32); }
inline int mul24(int a, int b) { return ((a << 8) >> 8) * ((b << 8) >> 8); }
inline uint mul24(uint a, uint b) { return (a & 0xffffffu) * (b & 0xffffffu); }
inline int mad24(int a, int b, int c) { return mul24(a, b) + c; }
inline uint mad24(uint a, uint b, uint c) { return mul24(a, b) + c; }
inline uint extract_bits(uint x, uint offset, uint bits) {
  return bits == 0 ? 0 : (x >> offset) & (bits >= 32 ? ~0u : (1u << bits) - 1);
}

#define METAL_HOST_FLOAT_COMMON(T)                                                               \
  inline T max(T a, T b) { return T(__builtin_fmaxf(float(a), float(b))); }                      \
  inline T min(T a, T b) { return T(__builtin_fminf(float(a), float(b))); }                      \
  inline T max3(T a, T b, T c) { return max(a, max(b, c)); }                                     \
  inline T min3(T a, T b, T c) { return min(a, min(b, c)); }                                     \
  inline T median3(T a, T b, T c) { return max(min(a, b), min(max(a, b), c)); }                  \
  inline T clamp(T x, T low, T high) { return min(max(x, low), high); }                          \
  inline T abs(T x) { return T(__builtin_fabsf(float(x))); }                                     \
  inline T mix(T a, T b, T t) { return T(float(a) + (float(b) - float(a)) * float(t)); }         \
  inline T saturate(T x) { return clamp(x, T(0.0f), T(1.0f)); }                                  \
  inline T sign(T x) { return float(x) > 0 ? T(1) : float(x) < 0 ? T(-1) : T(0); }               \
  inline T step(T edge, T x) { return float(x) < float(edge) ? T(0) : T(1); }                    \
  inline T smoothstep(T low, T high, T x) {                                                      \
    const float t = __builtin_fminf(__builtin_fmaxf((float(x) - float(low)) / (float(high) - float(low)), 0.0f), 1.0f); \
    return T(t * t * (3.0f - 2.0f * t));                                                         \
  }
METAL_HOST_FLOAT_COMMON(float)
METAL_HOST_FLOAT_COMMON(half)
#undef METAL_HOST_FLOAT_COMMON

#define METAL_HOST_VECTOR_COMMON(NAME)                                                           \
  template <class T, int N>                                                                      \
  inline vec<T, N> NAME(const vec<T, N>& a, const vec<T, N>& b) {                                \
    return detail::each(a, b, [](T x, T y) { return NAME(x, y); });                              \
  }
METAL_HOST_VECTOR_COMMON(max)
METAL_HOST_VECTOR_COMMON(min)
#undef METAL_HOST_VECTOR_COMMON
template <class T, int N>
inline vec<T, N> abs(const vec<T, N>& a) {
  return detail::each(a, [](T x) { return abs(x); });
}
template <class T, int N>
inline vec<T, N> clamp(const vec<T, N>& x, const vec<T, N>& low, const vec<T, N>& high) {
  return min(max(x, low), high);
}
template <class T, int N>
inline vec<T, N> clamp(const vec<T, N>& x, T low, T high) {
  return clamp(x, vec<T, N>(low), vec<T, N>(high));
}

// fast::max and the like differ from the plain ones only in what they do with NaN, which is left open.
namespace fast {
inline float max(float a, float b) { return metal::max(a, b); }
inline float min(float a, float b) { return metal::min(a, b); }
inline float clamp(float x, float low, float high) { return metal::clamp(x, low, high); }
inline float abs(float x) { return metal::abs(x); }
}  // namespace fast
namespace precise {
inline float max(float a, float b) { return metal::max(a, b); }
inline float min(float a, float b) { return metal::min(a, b); }
inline float clamp(float x, float low, float high) { return metal::clamp(x, low, high); }
inline float abs(float x) { return metal::abs(x); }
}  // namespace precise

// --- Relations --------------------------------------------------------------------------------------------------------

inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isnormal(float x) { return __builtin_isnormal(x); }
inline bool signbit(float x) { return __builtin_signbit(x); }
template <class T>
inline T select(T if_false, T if_true, bool condition) { return condition ? if_true : if_false; }
template <class T, int N>
inline vec<T, N> select(const vec<T, N>& if_false, const vec<T, N>& if_true, const vec<bool, N>& condition) {
  vec<T, N> result;
  for (int i = 0; i < N; i++) result[i] = condition[i] ? if_true[i] : if_false[i];
  return result;
}
inline bool any(bool x) { return x; }
inline bool all(bool x) { return x; }
template <int N>
inline bool any(const vec<bool, N>& v) {
  bool result = false;
  for (int i = 0; i < N; i++) result |= v[i];
  return result;
}
template <int N>
inline bool all(const vec<bool, N>& v) {
  bool result = true;
  for (int i = 0; i < N; i++) result &= v[i];
  return result;
}

// --- Geometry ---------------------------------------------------------------------------------------------------------

template <class T, int N>
inline T length_squared(const vec<T, N>& v) { return dot(v, v); }
template <class T, int N>
inline T length(const vec<T, N>& v) { return sqrt(dot(v, v)); }
template <class T, int N>
inline T distance(const vec<T, N>& a, const vec<T, N>& b) { return length(a - b); }
template <class T, int N>
inline vec<T, N> normalize(const vec<T, N>& v) { return v * rsqrt(dot(v, v)); }
template <class T>
inline vec<T, 3> cross(const vec<T, 3>& a, const vec<T, 3>& b) {
  return vec<T, 3>(a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]);
}

}  // namespace metal

#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define HUGE_VALF (__builtin_inff())
#define MAXFLOAT 3.402823466e+38f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define HALF_MAX (metal::numeric_limits<metal::half>::max())
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_1_PI_F 0.31830988618379067154f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
