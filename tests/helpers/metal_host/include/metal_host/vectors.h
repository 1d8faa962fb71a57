// vec<T, N> with swizzles, componentwise operators, packed vectors, metal::array.
#pragma once

#include "scalars.h"

namespace metal {

template <class T, int N>
struct vec;
template <class T, int SIZE, int... I>
struct swizzle;

namespace detail {

// What a vector can be put together from: its component type and count, and how to read component i.
template <class T>
struct parts {
  static constexpr bool is_vector = false;
  static constexpr int count = 1;
  using component = T;
};
template <class T, int N>
struct parts<vec<T, N>> {
  static constexpr bool is_vector = true;
  static constexpr int count = N;
  using component = T;
};
template <class T, int SIZE, int... I>
struct parts<swizzle<T, SIZE, I...>> {
  static constexpr bool is_vector = true;
  static constexpr int count = sizeof...(I);
  using component = T;
};

template <class V>
concept Vector = parts<V>::is_vector;
template <class S>
concept Scalar = is_arithmetic_v<S>;

template <class T, int N>
constexpr const vec<T, N>& plain(const vec<T, N>& v) { return v; }
template <class T, int SIZE, int... I>
constexpr vec<T, sizeof...(I)> plain(const swizzle<T, SIZE, I...>& v) { return v; }

template <class T, class A>
constexpr void append(T*& to, const A& from) {
  if constexpr (Vector<A>) {
    const auto v = plain(from);
    for (int i = 0; i < parts<A>::count; i++) *to++ = T(v[i]);
  } else {
    *to++ = T(from);
  }
}

}  // namespace detail

// Some components of a vector, in some order; lies over the vector's own storage (v.xz = w writes into v).
template <class T, int SIZE, int... I>
struct swizzle {
  T data[SIZE];

  using V = vec<T, sizeof...(I)>;
  operator V() const {
    V result;
    int k = 0;
    ((result[k++] = data[I]), ...);
    return result;
  }
  swizzle& operator=(const V& v) {
    int k = 0;
    ((data[I] = v[k++]), ...);
    return *this;
  }
  swizzle& operator=(const swizzle& v) { return *this = V(v); }
  swizzle() = default;
  swizzle(const swizzle&) = default;
  template <class A>
  swizzle& operator+=(const A& x) { return *this = V(*this) + x; }
  template <class A>
  swizzle& operator-=(const A& x) { return *this = V(*this) - x; }
  template <class A>
  swizzle& operator*=(const A& x) { return *this = V(*this) * x; }
  template <class A>
  swizzle& operator/=(const A& x) { return *this = V(*this) / x; }
};

// x y z w; r g b a is the same.
#define METAL_HOST_SWIZZLE2(S, A, a, B, b) swizzle<T, S, A, B> a##b;
#define METAL_HOST_SWIZZLE3(S, A, a, B, b, C, c) swizzle<T, S, A, B, C> a##b##c;
#define METAL_HOST_SWIZZLE4(S, A, a, B, b, C, c, D, d) swizzle<T, S, A, B, C, D> a##b##c##d;
#define METAL_HOST_OVER2(M, ...) M(__VA_ARGS__, 0, x) M(__VA_ARGS__, 1, y)
#define METAL_HOST_OVER3(M, ...) METAL_HOST_OVER2(M, __VA_ARGS__) M(__VA_ARGS__, 2, z)
#define METAL_HOST_OVER4(M, ...) METAL_HOST_OVER3(M, __VA_ARGS__) M(__VA_ARGS__, 3, w)
// One level of nesting each, under its own name: a macro does not expand inside itself.
#define METAL_HOST_AGAIN2(M, ...) M(__VA_ARGS__, 0, x) M(__VA_ARGS__, 1, y)
#define METAL_HOST_AGAIN3(M, ...) METAL_HOST_AGAIN2(M, __VA_ARGS__) M(__VA_ARGS__, 2, z)
#define METAL_HOST_AGAIN4(M, ...) METAL_HOST_AGAIN3(M, __VA_ARGS__) M(__VA_ARGS__, 3, w)
#define METAL_HOST_THIRD2(M, ...) M(__VA_ARGS__, 0, x) M(__VA_ARGS__, 1, y)
#define METAL_HOST_THIRD3(M, ...) METAL_HOST_THIRD2(M, __VA_ARGS__) M(__VA_ARGS__, 2, z)
#define METAL_HOST_THIRD4(M, ...) METAL_HOST_THIRD3(M, __VA_ARGS__) M(__VA_ARGS__, 3, w)
#define METAL_HOST_LAST2(M, ...) M(__VA_ARGS__, 0, x) M(__VA_ARGS__, 1, y)
#define METAL_HOST_LAST3(M, ...) METAL_HOST_LAST2(M, __VA_ARGS__) M(__VA_ARGS__, 2, z)
#define METAL_HOST_LAST4(M, ...) METAL_HOST_LAST3(M, __VA_ARGS__) M(__VA_ARGS__, 3, w)
#define METAL_HOST_TWO2(...) METAL_HOST_AGAIN2(METAL_HOST_SWIZZLE2, __VA_ARGS__)
#define METAL_HOST_TWO3(...) METAL_HOST_AGAIN3(METAL_HOST_SWIZZLE2, __VA_ARGS__)
#define METAL_HOST_TWO4(...) METAL_HOST_AGAIN4(METAL_HOST_SWIZZLE2, __VA_ARGS__)
#define METAL_HOST_THREE_B2(...) METAL_HOST_THIRD2(METAL_HOST_SWIZZLE3, __VA_ARGS__)
#define METAL_HOST_THREE_B3(...) METAL_HOST_THIRD3(METAL_HOST_SWIZZLE3, __VA_ARGS__)
#define METAL_HOST_THREE_B4(...) METAL_HOST_THIRD4(METAL_HOST_SWIZZLE3, __VA_ARGS__)
#define METAL_HOST_THREE2(...) METAL_HOST_AGAIN2(METAL_HOST_THREE_B2, __VA_ARGS__)
#define METAL_HOST_THREE3(...) METAL_HOST_AGAIN3(METAL_HOST_THREE_B3, __VA_ARGS__)
#define METAL_HOST_THREE4(...) METAL_HOST_AGAIN4(METAL_HOST_THREE_B4, __VA_ARGS__)
#define METAL_HOST_FOUR_C2(...) METAL_HOST_LAST2(METAL_HOST_SWIZZLE4, __VA_ARGS__)
#define METAL_HOST_FOUR_C3(...) METAL_HOST_LAST3(METAL_HOST_SWIZZLE4, __VA_ARGS__)
#define METAL_HOST_FOUR_C4(...) METAL_HOST_LAST4(METAL_HOST_SWIZZLE4, __VA_ARGS__)
#define METAL_HOST_FOUR_B2(...) METAL_HOST_THIRD2(METAL_HOST_FOUR_C2, __VA_ARGS__)
#define METAL_HOST_FOUR_B3(...) METAL_HOST_THIRD3(METAL_HOST_FOUR_C3, __VA_ARGS__)
#define METAL_HOST_FOUR_B4(...) METAL_HOST_THIRD4(METAL_HOST_FOUR_C4, __VA_ARGS__)
#define METAL_HOST_FOUR2(...) METAL_HOST_AGAIN2(METAL_HOST_FOUR_B2, __VA_ARGS__)
#define METAL_HOST_FOUR3(...) METAL_HOST_AGAIN3(METAL_HOST_FOUR_B3, __VA_ARGS__)
#define METAL_HOST_FOUR4(...) METAL_HOST_AGAIN4(METAL_HOST_FOUR_B4, __VA_ARGS__)

// As in Metal, a vector of three takes the room of four, and a vector is aligned to its size.
#define METAL_HOST_VEC(N, SIZE, XYZW, RGBA)                                                             \
  template <class T>                                                                                    \
  struct alignas(sizeof(T) * SIZE) vec<T, N> {                                                          \
    union {                                                                                             \
      T data[SIZE];                                                                                     \
      struct { T XYZW; };                                                                               \
      struct { T RGBA; };                                                                               \
      METAL_HOST_OVER##N(METAL_HOST_TWO##N, SIZE)                                                       \
      METAL_HOST_OVER##N(METAL_HOST_THREE##N, SIZE)                                                     \
      METAL_HOST_OVER##N(METAL_HOST_FOUR##N, SIZE)                                                      \
    };                                                                                                  \
    vec() = default;                                                                                    \
    vec(const vec& v) { __builtin_memcpy(data, v.data, sizeof data); }                                         \
    vec& operator=(const vec& v) {                                                                      \
      __builtin_memcpy(data, v.data, sizeof data);                                                             \
      return *this;                                                                                     \
    }                                                                                                   \
    template <detail::Scalar S>                                                                         \
    vec(S x) {                                                                                          \
      for (int i = 0; i < N; i++) data[i] = T(x);                                                       \
    }                                                                                                   \
    template <class U>                                                                                  \
      requires(!is_same_v<U, T>)                                                                        \
    explicit vec(const vec<U, N>& v) {                                                                  \
      for (int i = 0; i < N; i++) data[i] = T(v[i]);                                                    \
    }                                                                                                   \
    template <class A, class B, class... More>                                                          \
    vec(const A& a, const B& b, const More&... more) {                                                  \
      static_assert(detail::parts<A>::count + detail::parts<B>::count +                                 \
                            (0 + ... + detail::parts<More>::count) == N,                                \
                    "as many components as the vector has");                                            \
      T* to = data;                                                                                     \
      detail::append(to, a);                                                                            \
      detail::append(to, b);                                                                            \
      (detail::append(to, more), ...);                                                                  \
    }                                                                                                   \
    T& operator[](int i) {                                                                              \
      if (i < 0 || i >= N) __builtin_trap();                                                            \
      return data[i];                                                                                   \
    }                                                                                                   \
    const T& operator[](int i) const {                                                                  \
      if (i < 0 || i >= N) __builtin_trap();                                                            \
      return data[i];                                                                                   \
    }                                                                                                   \
  };
#define METAL_HOST_NAMES(...) __VA_ARGS__
METAL_HOST_VEC(2, 2, METAL_HOST_NAMES(x, y), METAL_HOST_NAMES(r, g))
METAL_HOST_VEC(3, 4, METAL_HOST_NAMES(x, y, z), METAL_HOST_NAMES(r, g, b))
METAL_HOST_VEC(4, 4, METAL_HOST_NAMES(x, y, z, w), METAL_HOST_NAMES(r, g, b, a))

// --- Operators --------------------------------------------------------------------------------------------------------
// vector op vector of one type, vector op scalar; the scalar becomes a component.

namespace detail {

template <class V>
using plain_t = vec<typename parts<V>::component, parts<V>::count>;

template <class A, class B>
struct operands {};
template <Vector A, Vector B>
  requires is_same_v<plain_t<A>, plain_t<B>>
struct operands<A, B> {
  using type = plain_t<A>;
};
template <Vector A, Scalar B>
struct operands<A, B> {
  using type = plain_t<A>;
};
template <Scalar A, Vector B>
struct operands<A, B> {
  using type = plain_t<B>;
};
template <class A, class B>
using operands_t = typename operands<A, B>::type;

template <class T, int N, class F>
inline auto each(const vec<T, N>& a, F function) {
  vec<decltype(function(a[0])), N> result;
  for (int i = 0; i < N; i++) result[i] = function(a[i]);
  return result;
}
template <class T, int N, class F>
inline auto each(const vec<T, N>& a, const vec<T, N>& b, F function) {
  vec<decltype(function(a[0], b[0])), N> result;
  for (int i = 0; i < N; i++) result[i] = function(a[i], b[i]);
  return result;
}

}  // namespace detail

#define METAL_HOST_BINARY(OP, RESULT)                                       \
  template <class A, class B, class V = detail::operands_t<A, B>>           \
  inline auto operator OP(const A& a, const B& b) {                         \
    const V left(a), right(b);                                              \
    using T = typename detail::parts<V>::component;                         \
    return detail::each(left, right, [](T x, T y) { return RESULT; });      \
  }
#define METAL_HOST_ASSIGNING(OP)                                            \
  METAL_HOST_BINARY(OP, T(x OP y))                                          \
  template <class T, int N, class B, class V = detail::operands_t<vec<T, N>, B>> \
  inline vec<T, N>& operator OP##=(vec<T, N>& a, const B& b) { return a = a OP b; }
METAL_HOST_ASSIGNING(+) METAL_HOST_ASSIGNING(-) METAL_HOST_ASSIGNING(*) METAL_HOST_ASSIGNING(/)
METAL_HOST_ASSIGNING(%) METAL_HOST_ASSIGNING(&) METAL_HOST_ASSIGNING(|) METAL_HOST_ASSIGNING(^)
METAL_HOST_ASSIGNING(<<) METAL_HOST_ASSIGNING(>>)
METAL_HOST_BINARY(<, bool(x < y)) METAL_HOST_BINARY(>, bool(x > y)) METAL_HOST_BINARY(<=, bool(x <= y))
METAL_HOST_BINARY(>=, bool(x >= y)) METAL_HOST_BINARY(==, bool(x == y)) METAL_HOST_BINARY(!=, bool(x != y))
METAL_HOST_BINARY(&&, bool(x && y)) METAL_HOST_BINARY(||, bool(x || y))
#undef METAL_HOST_ASSIGNING
#undef METAL_HOST_BINARY

template <detail::Vector V>
inline auto operator-(const V& v) {
  using T = typename detail::parts<V>::component;
  return detail::each(detail::plain(v), [](T x) { return T(-x); });
}
template <detail::Vector V>
inline auto operator~(const V& v) {
  using T = typename detail::parts<V>::component;
  return detail::each(detail::plain(v), [](T x) { return T(~x); });
}
template <detail::Vector V>
inline auto operator!(const V& v) {
  using T = typename detail::parts<V>::component;
  return detail::each(detail::plain(v), [](T x) { return !x; });
}

template <class T, int N>
inline T dot(const vec<T, N>& a, const vec<T, N>& b) {
  T sum = T(a[0] * b[0]);
  for (int i = 1; i < N; i++) sum = T(sum + a[i] * b[i]);
  return sum;
}

// Packed vectors have the alignment of a component and convert to and from plain ones.
template <class T, int N>
struct packed_vec {
  T data[N];
  packed_vec() = default;
  packed_vec(const vec<T, N>& v) {
    for (int i = 0; i < N; i++) data[i] = v[i];
  }
  operator vec<T, N>() const {
    vec<T, N> v;
    for (int i = 0; i < N; i++) v[i] = data[i];
    return v;
  }
  T& operator[](int i) { return data[i]; }
  const T& operator[](int i) const { return data[i]; }
};

template <class T, size_t N>
struct array {
  T elements[N];
  T& operator[](size_t i) { return elements[i]; }
  const T& operator[](size_t i) const { return elements[i]; }
  constexpr size_t size() const { return N; }
};

}  // namespace metal

#define METAL_HOST_VECTOR_NAMES(NAME, T) \
  typedef metal::vec<T, 2> NAME##2;      \
  typedef metal::vec<T, 3> NAME##3;      \
  typedef metal::vec<T, 4> NAME##4;      \
  typedef metal::packed_vec<T, 2> packed_##NAME##2; \
  typedef metal::packed_vec<T, 3> packed_##NAME##3; \
  typedef metal::packed_vec<T, 4> packed_##NAME##4;
namespace metal {
METAL_HOST_VECTOR_NAMES(float, float)
METAL_HOST_VECTOR_NAMES(half, half)
METAL_HOST_VECTOR_NAMES(bfloat, bfloat)
METAL_HOST_VECTOR_NAMES(bool, bool)
METAL_HOST_VECTOR_NAMES(char, signed char)
METAL_HOST_VECTOR_NAMES(uchar, uchar)
METAL_HOST_VECTOR_NAMES(short, short)
METAL_HOST_VECTOR_NAMES(ushort, ushort)
METAL_HOST_VECTOR_NAMES(int, int)
METAL_HOST_VECTOR_NAMES(uint, uint)
METAL_HOST_VECTOR_NAMES(long, long)
METAL_HOST_VECTOR_NAMES(ulong, ulong)
}  // namespace metal
#undef METAL_HOST_VECTOR_NAMES
