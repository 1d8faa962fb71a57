// half and bfloat, type traits, numeric limits, as_type.
//
// No <cmath>, no <string.h>: with `using namespace metal` their global exp, abs and so on would make calls ambiguous.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <limits>
#include <type_traits>

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char schar;  // Metal's char is signed everywhere
typedef long long llong;
typedef unsigned long long ullong;

namespace metal {

struct half;
struct bfloat;

template <class To, class From>
constexpr To as_type(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  if constexpr (std::is_trivially_copyable_v<From> && std::is_trivially_copyable_v<To>) {
    return __builtin_bit_cast(To, from);
  } else {  // vectors, whose swizzles have assignments of their own
    To to;
    __builtin_memcpy(static_cast<void*>(&to), &from, sizeof to);
    return to;
  }
}

namespace detail {

constexpr uint32_t float_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
constexpr float bits_float(uint32_t x) { return __builtin_bit_cast(float, x); }

// float -> bfloat, to the nearest, ties to even.
constexpr uint16_t bfloat_bits(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);  // a quiet NaN
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

#if defined(__FLT16_MANT_DIG__) && !defined(METAL_HOST_SOFT_HALF)
constexpr uint16_t half_bits(float x) { return __builtin_bit_cast(uint16_t, static_cast<_Float16>(x)); }
constexpr float half_value(uint16_t bits) { return static_cast<float>(__builtin_bit_cast(_Float16, bits)); }
#else
// float -> half, to the nearest, ties to even, for compilers without _Float16.
constexpr uint16_t half_bits(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {  // subnormal in half: count units of 2^-24; adding 0.5 leaves them in the low bits
    const uint32_t units = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
    return uint16_t(sign | units);
  }
  const uint32_t odd = (magnitude >> 13) & 1;
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}
constexpr float half_value(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu, fraction = bits & 0x3ffu;
  if (exponent == 0x1f) return bits_float(sign | 0x7f800000u | (fraction << 13));
  if (exponent == 0) {
    const float magnitude = float(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return bits_float(sign | ((exponent + 112) << 23) | (fraction << 13));
}
#endif

template <class T>
concept Arithmetic = std::is_arithmetic_v<T>;
template <class T>
concept Integral = std::is_integral_v<T>;
template <class T>
concept Floating = std::is_floating_point_v<T>;

}  // namespace detail

// Converts from every arithmetic type by itself, as Metal's does.
struct half {
  uint16_t bits;

  half() = default;
  template <detail::Arithmetic A>
  constexpr half(A x) : bits(detail::half_bits(static_cast<float>(x))) {}
  explicit constexpr half(bfloat x);
  constexpr operator float() const { return detail::half_value(bits); }

  constexpr half& operator+=(float x) { return *this = half(float(*this) + x); }
  constexpr half& operator-=(float x) { return *this = half(float(*this) - x); }
  constexpr half& operator*=(float x) { return *this = half(float(*this) * x); }
  constexpr half& operator/=(float x) { return *this = half(float(*this) / x); }
};

// Neither float nor half becomes a bfloat without a cast (Metal Shading Language Specification, 2.1): a forgotten
// static_cast<T> is an error here too.
struct bfloat {
  uint16_t bits;

  bfloat() = default;
  template <detail::Integral A>
  constexpr bfloat(A x) : bits(detail::bfloat_bits(static_cast<float>(x))) {}
  template <detail::Floating A>
  explicit constexpr bfloat(A x) : bits(detail::bfloat_bits(static_cast<float>(x))) {}
  explicit constexpr bfloat(half x) : bits(detail::bfloat_bits(float(x))) {}
  constexpr operator float() const { return detail::bits_float(uint32_t(bits) << 16); }

  constexpr bfloat& operator+=(bfloat x) { return *this = bfloat(float(*this) + float(x)); }
  constexpr bfloat& operator-=(bfloat x) { return *this = bfloat(float(*this) - float(x)); }
  constexpr bfloat& operator*=(bfloat x) { return *this = bfloat(float(*this) * float(x)); }
  constexpr bfloat& operator/=(bfloat x) { return *this = bfloat(float(*this) / float(x)); }
};

constexpr half::half(bfloat x) : bits(detail::half_bits(float(x))) {}

// T op T and T op integer stay T; T op float is float.
#define METAL_HOST_ARITHMETIC(T, OP)                                            \
  constexpr T operator OP(T a, T b) { return T(float(a) OP float(b)); }         \
  template <detail::Integral A>                                                 \
  constexpr T operator OP(T a, A b) { return T(float(a) OP float(T(b))); }      \
  template <detail::Integral A>                                                 \
  constexpr T operator OP(A a, T b) { return T(float(T(a)) OP float(b)); }      \
  template <detail::Floating A>                                                 \
  constexpr float operator OP(T a, A b) { return float(a) OP float(b); }        \
  template <detail::Floating A>                                                 \
  constexpr float operator OP(A a, T b) { return float(a) OP float(b); }
#define METAL_HOST_COMPARISON(T, OP)                                            \
  constexpr bool operator OP(T a, T b) { return float(a) OP float(b); }         \
  template <detail::Arithmetic A>                                               \
  constexpr bool operator OP(T a, A b) { return float(a) OP float(b); }         \
  template <detail::Arithmetic A>                                               \
  constexpr bool operator OP(A a, T b) { return float(a) OP float(b); }
#define METAL_HOST_OPERATORS(T)                                                 \
  METAL_HOST_ARITHMETIC(T, +) METAL_HOST_ARITHMETIC(T, -)                       \
  METAL_HOST_ARITHMETIC(T, *) METAL_HOST_ARITHMETIC(T, /)                       \
  METAL_HOST_COMPARISON(T, <) METAL_HOST_COMPARISON(T, >)                       \
  METAL_HOST_COMPARISON(T, <=) METAL_HOST_COMPARISON(T, >=)                     \
  METAL_HOST_COMPARISON(T, ==) METAL_HOST_COMPARISON(T, !=)                     \
  constexpr T operator-(T a) { return as_type<T>(uint16_t(a.bits ^ 0x8000u)); } \
  constexpr T operator+(T a) { return a; }
METAL_HOST_OPERATORS(half)
METAL_HOST_OPERATORS(bfloat)
#undef METAL_HOST_OPERATORS
#undef METAL_HOST_COMPARISON
#undef METAL_HOST_ARITHMETIC

// The two 16-bit types do not mix.
#define METAL_HOST_NO_MIX(OP)              \
  void operator OP(half, bfloat) = delete; \
  void operator OP(bfloat, half) = delete;
METAL_HOST_NO_MIX(+) METAL_HOST_NO_MIX(-) METAL_HOST_NO_MIX(*) METAL_HOST_NO_MIX(/)
#undef METAL_HOST_NO_MIX

// --- Traits -----------------------------------------------------------------------------------------------------------

using std::bool_constant;
using std::conditional;
using std::conditional_t;
using std::enable_if;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_convertible;
using std::is_convertible_v;
using std::is_integral;
using std::is_integral_v;
using std::is_same;
using std::is_same_v;
using std::is_signed;
using std::is_signed_v;
using std::is_unsigned;
using std::is_unsigned_v;
using std::make_signed;
using std::make_signed_t;
using std::make_unsigned;
using std::make_unsigned_t;
using std::remove_cv;
using std::remove_cv_t;
using std::remove_reference;
using std::remove_reference_t;
using std::true_type;

template <class T>
struct is_floating_point
    : bool_constant<std::is_floating_point_v<T> || is_same_v<remove_cv_t<T>, half> || is_same_v<remove_cv_t<T>, bfloat>> {};
template <class T>
inline constexpr bool is_floating_point_v = is_floating_point<T>::value;
template <class T>
struct is_arithmetic : bool_constant<std::is_arithmetic_v<T> || is_floating_point_v<T>> {};
template <class T>
inline constexpr bool is_arithmetic_v = is_arithmetic<T>::value;

template <class T>
struct numeric_limits : std::numeric_limits<T> {};

namespace detail {
template <class T, uint16_t INF, uint16_t MAX, uint16_t MIN, uint16_t DENORM, uint16_t EPSILON, uint16_t NOT_A_NUMBER>
struct small_float_limits {
  static constexpr bool is_specialized = true, is_signed = true, is_integer = false, has_infinity = true;
  static constexpr T infinity() { return as_type<T>(INF); }
  static constexpr T max() { return as_type<T>(MAX); }
  static constexpr T lowest() { return as_type<T>(uint16_t(MAX | 0x8000)); }
  static constexpr T min() { return as_type<T>(MIN); }
  static constexpr T denorm_min() { return as_type<T>(DENORM); }
  static constexpr T epsilon() { return as_type<T>(EPSILON); }
  static constexpr T quiet_NaN() { return as_type<T>(NOT_A_NUMBER); }
};
}  // namespace detail
template <>
struct numeric_limits<half> : detail::small_float_limits<half, 0x7c00, 0x7bff, 0x0400, 1, 0x1400, 0x7e00> {
  static constexpr int digits = 11, max_exponent = 16, min_exponent = -13;
};
template <>
struct numeric_limits<bfloat> : detail::small_float_limits<bfloat, 0x7f80, 0x7f7f, 0x0080, 1, 0x3c00, 0x7fc0> {
  static constexpr int digits = 8, max_exponent = 128, min_exponent = -125;
};

}  // namespace metal
