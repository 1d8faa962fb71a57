// The vocabulary of Metal's bodies in CUDA, put in front of a kernel by src/qwen4b_asr/kernels/_cuda.py.
//
// A SIMD group is a warp: 32 lanes, and all of them take part in every operation here, so the mask is always full.
// Compiles with NVRTC as C++17; cuda_fp16.h and cuda_bf16.h are already there. Vector types have no arithmetic.

#define METAL_FUNC __device__ __forceinline__

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __half float16_t;
typedef __nv_bfloat16 bfloat;
typedef __nv_bfloat16 bfloat16_t;

#ifndef INFINITY
#define INFINITY (__int_as_float(0x7f800000))
#endif
#ifndef NAN
#define NAN (__int_as_float(0x7fffffff))
#endif
#ifndef M_PI_F
#define M_PI_F 3.14159265358979323846f
#endif

namespace metal {

// --- Bits ----------------------------------------------------------------------------------------------------------

template <typename To, typename From>
METAL_FUNC To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

METAL_FUNC int popcount(int x) { return __popc(x); }
METAL_FUNC uint popcount(uint x) { return __popc(x); }
METAL_FUNC int clz(int x) { return __clz(x); }
METAL_FUNC uint clz(uint x) { return __clz(x); }
METAL_FUNC uint ctz(uint x) { return x ? __ffs(x) - 1 : 32; }

// --- Barriers ------------------------------------------------------------------------------------------------------

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
METAL_FUNC mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
METAL_FUNC void threadgroup_barrier(mem_flags) { __syncthreads(); }
METAL_FUNC void simdgroup_barrier(mem_flags) { __syncwarp(0xffffffffu); }

// --- Mathematics: half and bfloat go through float -----------------------------------------------------------------

#define METAL_UNARY(name, function)                                                             \
  METAL_FUNC float name(float x) { return function(x); }                                        \
  METAL_FUNC __half name(__half x) { return __float2half(function(__half2float(x))); }          \
  METAL_FUNC bfloat name(bfloat x) { return __float2bfloat16(function(__bfloat162float(x))); }

METAL_UNARY(exp, expf)
METAL_UNARY(exp2, exp2f)
METAL_UNARY(exp10, exp10f)
METAL_UNARY(log, logf)
METAL_UNARY(log2, log2f)
METAL_UNARY(log10, log10f)
METAL_UNARY(sqrt, sqrtf)
METAL_UNARY(rsqrt, rsqrtf)
METAL_UNARY(sin, sinf)
METAL_UNARY(cos, cosf)
METAL_UNARY(tan, tanf)
METAL_UNARY(sinh, sinhf)
METAL_UNARY(cosh, coshf)
METAL_UNARY(tanh, tanhf)
METAL_UNARY(asin, asinf)
METAL_UNARY(acos, acosf)
METAL_UNARY(atan, atanf)
METAL_UNARY(fabs, fabsf)
METAL_UNARY(abs, fabsf)
METAL_UNARY(floor, floorf)
METAL_UNARY(ceil, ceilf)
METAL_UNARY(round, roundf)
METAL_UNARY(rint, rintf)
METAL_UNARY(trunc, truncf)
METAL_FUNC int abs(int x) { return x < 0 ? -x : x; }

namespace precise {
using metal::cos;
using metal::exp;
using metal::exp2;
using metal::log;
using metal::log2;
using metal::rsqrt;
using metal::sin;
using metal::sqrt;
using metal::tanh;
}  // namespace precise

namespace fast {
METAL_UNARY(exp, __expf)
METAL_UNARY(exp2, exp2f)
METAL_UNARY(log, __logf)
METAL_UNARY(log2, __log2f)
METAL_UNARY(sin, __sinf)
METAL_UNARY(cos, __cosf)
using metal::rsqrt;
using metal::sqrt;
using metal::tanh;
}  // namespace fast

// Of a number and a NaN, fmin and fmax give the number, as Metal's do.
#define METAL_BINARY(name, function)                                                                            \
  METAL_FUNC float name(float a, float b) { return function(a, b); }                                            \
  METAL_FUNC __half name(__half a, __half b) { return __float2half(function(__half2float(a), __half2float(b))); } \
  METAL_FUNC bfloat name(bfloat a, bfloat b) {                                                                  \
    return __float2bfloat16(function(__bfloat162float(a), __bfloat162float(b)));                                \
  }

METAL_BINARY(fmin, fminf)
METAL_BINARY(fmax, fmaxf)
METAL_BINARY(pow, powf)
METAL_BINARY(fmod, fmodf)
METAL_BINARY(atan2, atan2f)
METAL_BINARY(min, fminf)
METAL_BINARY(max, fmaxf)

#define METAL_INTEGER_ORDER(type)                                    \
  METAL_FUNC type min(type a, type b) { return b < a ? b : a; }      \
  METAL_FUNC type max(type a, type b) { return a < b ? b : a; }

METAL_INTEGER_ORDER(char)
METAL_INTEGER_ORDER(uchar)
METAL_INTEGER_ORDER(short)
METAL_INTEGER_ORDER(ushort)
METAL_INTEGER_ORDER(int)
METAL_INTEGER_ORDER(uint)
METAL_INTEGER_ORDER(long)
METAL_INTEGER_ORDER(ulong)

template <typename T>
METAL_FUNC T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}

METAL_FUNC float fma(float a, float b, float c) { return fmaf(a, b, c); }

template <typename T>
METAL_FUNC T select(T no, T yes, bool condition) {
  return condition ? yes : no;
}

template <typename T>
METAL_FUNC bool isnan(T x) {
  return float(x) != float(x);
}
template <typename T>
METAL_FUNC bool isinf(T x) {
  return fabsf(float(x)) == INFINITY;
}
template <typename T>
METAL_FUNC bool isfinite(T x) {
  return fabsf(float(x)) < INFINITY;
}

// --- SIMD groups ---------------------------------------------------------------------------------------------------

// Warp shuffles know 32-bit words; this moves a value of any size by them.
template <typename T, typename Move>
METAL_FUNC T move_words(T value, Move move) {
  constexpr int words = (sizeof(T) + 3) / 4;
  uint word[words] = {};
  memcpy(word, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < words; i++) {
    word[i] = move(word[i]);
  }
  memcpy(&value, word, sizeof(T));
  return value;
}

template <typename T>
METAL_FUNC T simd_shuffle(T value, ushort lane) {
  return move_words(value, [=](uint word) { return __shfl_sync(0xffffffffu, word, lane); });
}
template <typename T>
METAL_FUNC T simd_shuffle_xor(T value, ushort mask) {
  return move_words(value, [=](uint word) { return __shfl_xor_sync(0xffffffffu, word, mask); });
}
template <typename T>
METAL_FUNC T simd_shuffle_up(T value, ushort delta) {
  return move_words(value, [=](uint word) { return __shfl_up_sync(0xffffffffu, word, delta); });
}
template <typename T>
METAL_FUNC T simd_shuffle_down(T value, ushort delta) {
  return move_words(value, [=](uint word) { return __shfl_down_sync(0xffffffffu, word, delta); });
}
template <typename T>
METAL_FUNC T simd_broadcast(T value, ushort lane) {
  return simd_shuffle(value, lane);
}
template <typename T>
METAL_FUNC T simd_broadcast_first(T value) {
  return simd_shuffle(value, 0);
}

// A butterfly: every lane ends with the same bits.
#define METAL_REDUCTION(name, expression)          \
  template <typename T>                            \
  METAL_FUNC T name(T a) {                         \
    for (ushort mask = 16; mask != 0; mask >>= 1) { \
      const T b = simd_shuffle_xor(a, mask);       \
      a = expression;                              \
    }                                              \
    return a;                                      \
  }

METAL_REDUCTION(simd_sum, T(a + b))
METAL_REDUCTION(simd_product, T(a* b))
METAL_REDUCTION(simd_min, min(a, b))
METAL_REDUCTION(simd_max, max(a, b))
METAL_REDUCTION(simd_and, T(a& b))
METAL_REDUCTION(simd_or, T(a | b))
METAL_REDUCTION(simd_xor, T(a ^ b))

METAL_FUNC uint lane_index() {
  return ((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x) & 31u;
}

template <typename T>
METAL_FUNC T simd_prefix_inclusive_sum(T value) {
  for (ushort delta = 1; delta < 32; delta <<= 1) {
    const T before = simd_shuffle_up(value, delta);
    value = lane_index() >= delta ? T(value + before) : value;
  }
  return value;
}
template <typename T>
METAL_FUNC T simd_prefix_exclusive_sum(T value) {
  const T before = simd_shuffle_up(simd_prefix_inclusive_sum(value), 1);
  return lane_index() == 0 ? T(0) : before;
}

METAL_FUNC bool simd_all(bool condition) { return __all_sync(0xffffffffu, condition); }
METAL_FUNC bool simd_any(bool condition) { return __any_sync(0xffffffffu, condition); }
METAL_FUNC bool simd_is_first() { return lane_index() == 0; }

// --- 8 x 8 matrices ------------------------------------------------------------------------------------------------

// Where a lane's two neighbouring elements lie, as Apple's GPUs have it: lane bits 4, 2, 1 are the row, 3 and 0 the
// pair of columns.
METAL_FUNC int matrix_row(int lane) { return (lane & 16) / 4 + (lane / 2) % 4; }
METAL_FUNC int matrix_column(int lane) { return (lane & 8) / 2 + (lane % 2) * 2; }
METAL_FUNC int matrix_lane(int row, int column) {
  return (row & 4) * 4 + (row & 3) * 2 + (column & 4) * 2 + (column & 2) / 2;
}

template <typename T>
struct alignas(2 * sizeof(T)) matrix_elements {
  T own[2];
  METAL_FUNC T& operator[](int i) { return own[i]; }
  METAL_FUNC const T& operator[](int i) const { return own[i]; }
};

// Column and row of the first element; a single number stands for both.
struct matrix_origin {
  ulong column, row;
  METAL_FUNC matrix_origin(ulong both = 0) : column(both), row(both) {}
  METAL_FUNC matrix_origin(ulong2 place) : column(place.x), row(place.y) {}
};

template <typename T, int Rows, int Columns>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "there are only 8 x 8 matrices");
  matrix_elements<T> elements;

  METAL_FUNC simdgroup_matrix() {}
  // As in Metal, a number is put on the diagonal.
  METAL_FUNC explicit simdgroup_matrix(T diagonal) {
    const int lane = lane_index();
    for (int i = 0; i < 2; i++) {
      elements[i] = matrix_row(lane) == matrix_column(lane) + i ? diagonal : T(0.0f);
    }
  }
  METAL_FUNC matrix_elements<T>& thread_elements() { return elements; }
  METAL_FUNC const matrix_elements<T>& thread_elements() const { return elements; }
};

template <typename T, int Rows, int Columns>
METAL_FUNC simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Rows, Columns> matrix;
  matrix.elements[0] = value;
  matrix.elements[1] = value;
  return matrix;
}

template <typename T>
METAL_FUNC size_t matrix_place(int lane, int i, ulong stride, matrix_origin origin, bool transpose) {
  const int row = matrix_row(lane), column = matrix_column(lane) + i;
  return (origin.row + (transpose ? column : row)) * stride + origin.column + (transpose ? row : column);
}

template <typename T>
METAL_FUNC void simdgroup_load(
    simdgroup_matrix<T, 8, 8>& matrix, const T* from, ulong stride = 8, matrix_origin origin = 0,
    bool transpose = false) {
  for (int i = 0; i < 2; i++) {
    matrix.elements[i] = from[matrix_place<T>(lane_index(), i, stride, origin, transpose)];
  }
}

template <typename T>
METAL_FUNC void simdgroup_store(
    simdgroup_matrix<T, 8, 8> matrix, T* to, ulong stride = 8, matrix_origin origin = 0, bool transpose = false) {
  for (int i = 0; i < 2; i++) {
    to[matrix_place<T>(lane_index(), i, stride, origin, transpose)] = matrix.elements[i];
  }
}

// Both elements that another lane holds, as floats; two of 16 bits travel in one word.
template <typename T>
METAL_FUNC void fetch_elements(const matrix_elements<T>& from, int lane, float& first, float& second) {
  if constexpr (sizeof(T) == 2) {
    uint word;
    memcpy(&word, from.own, sizeof(word));
    word = __shfl_sync(0xffffffffu, word, lane);
    T own[2];
    memcpy(own, &word, sizeof(word));
    first = float(own[0]);
    second = float(own[1]);
  } else {
    first = __shfl_sync(0xffffffffu, float(from.own[0]), lane);
    second = __shfl_sync(0xffffffffu, float(from.own[1]), lane);
  }
}

// Tensor cores multiply numbers of 11 significant bits (tf32) without loss: a half or a bfloat is one of them, a float
// the sum of three.
template <typename T>
struct tf32_parts {
  static constexpr int count = sizeof(T) == 2 ? 1 : 3;
};

template <int Count>
METAL_FUNC void split_tf32(float x, float (&part)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; i++) {
    part[i] = __uint_as_float(__float_as_uint(x) & 0xffffe000u);
    x = x == part[i] ? 0.0f : x - part[i];  // infinity leaves nothing
  }
}

// Infinity has no smaller parts: their products with the other factor's are left to it alone, as 0 * inf is no number.
METAL_FUNC float without_infinity(float x) { return fabsf(x) == INFINITY ? 0.0f : x; }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

#ifndef METAL_HAS_MMA_TF32
// d += a * b for the upper 8 of 16 rows. Lane 4 g + t has a[g][t] and a[g][t + 4], b[t][g] and b[t + 4][g], and
// d[g][2 t] and d[g][2 t + 1].
METAL_FUNC void mma_tf32(float& d0, float& d1, float a0, float a1, float b0, float b1) {
  float lower0 = 0.0f, lower1 = 0.0f;
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %5}, {%7, %8}, "
      "{%0, %1, %2, %3};"
      : "+f"(d0), "+f"(d1), "+f"(lower0), "+f"(lower1)
      : "r"(__float_as_uint(a0)), "r"(0u), "r"(__float_as_uint(a1)), "r"(__float_as_uint(b0)),
        "r"(__float_as_uint(b1)));
}
#endif

// The order of the products does not matter, so columns 2 t and 2 t + 1 of a, which one lane holds, go where the tensor
// core has t and t + 4, and the rows of b likewise.
template <typename D, typename A, typename B, typename C>
METAL_FUNC void simdgroup_multiply_accumulate(
    simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a, const simdgroup_matrix<B, 8, 8>& b,
    const simdgroup_matrix<C, 8, 8>& c) {
  constexpr int a_parts = tf32_parts<A>::count, b_parts = tf32_parts<B>::count;
  const int lane = lane_index(), row = lane / 4, column = lane % 4 * 2;
  float a0, a1, even0, odd0, even1, odd1, sum0, sum1;
  fetch_elements(a.elements, matrix_lane(row, column), a0, a1);
  fetch_elements(b.elements, matrix_lane(column, row), even0, odd0);
  fetch_elements(b.elements, matrix_lane(column + 1, row), even1, odd1);
  fetch_elements(c.elements, matrix_lane(row, column), sum0, sum1);
  float left0[a_parts], left1[a_parts], right0[b_parts], right1[b_parts];
  split_tf32(a0, left0);
  split_tf32(a1, left1);
  split_tf32(row % 2 ? odd0 : even0, right0);
  split_tf32(row % 2 ? odd1 : even1, right1);
#pragma unroll
  for (int order = 2; order >= 0; order--) {  // what is smaller than float can hold is left out, small parts go first
#pragma unroll
    for (int i = 0; i < a_parts; i++) {
#pragma unroll
      for (int j = 0; j < b_parts; j++) {
        if (i + j == order) {
          mma_tf32(
              sum0, sum1, j ? without_infinity(left0[i]) : left0[i], j ? without_infinity(left1[i]) : left1[i],
              i ? without_infinity(right0[j]) : right0[j], i ? without_infinity(right1[j]) : right1[j]);
        }
      }
    }
  }
  const int holder = matrix_row(lane) * 4 + matrix_column(lane) / 2;
  d.elements[0] = D(__shfl_sync(0xffffffffu, sum0, holder));
  d.elements[1] = D(__shfl_sync(0xffffffffu, sum1, holder));
}

#else  // Before Ampere: one column of a and one row of b after the other.

template <typename D, typename A, typename B, typename C>
METAL_FUNC void simdgroup_multiply_accumulate(
    simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a, const simdgroup_matrix<B, 8, 8>& b,
    const simdgroup_matrix<C, 8, 8>& c) {
  const int lane = lane_index(), row = matrix_row(lane), column = matrix_column(lane);
  float sum0 = float(c.elements[0]), sum1 = float(c.elements[1]);
#pragma unroll 1
  for (int k = 0; k < 8; k += 2) {
    float left[2], right0, right1;
    fetch_elements(a.elements, matrix_lane(row, k), left[0], left[1]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      fetch_elements(b.elements, matrix_lane(k + i, column), right0, right1);
      sum0 = fmaf(left[i], right0, sum0);
      sum1 = fmaf(left[i], right1, sum1);
    }
  }
  d.elements[0] = D(sum0);
  d.elements[1] = D(sum1);
}

#endif

template <typename D, typename A, typename B>
METAL_FUNC void simdgroup_multiply(
    simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a, const simdgroup_matrix<B, 8, 8>& b) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8, 8>(0.0f));
}

typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<__half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

// --- Atomics: always relaxed ---------------------------------------------------------------------------------------

enum memory_order { memory_order_relaxed };

template <typename T>
struct atomic {
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;

#define METAL_ATOMIC(name, function)                                            \
  template <typename T>                                                         \
  METAL_FUNC T name(atomic<T>* object, T operand, memory_order) {               \
    return function(&object->value, operand);                                   \
  }                                                                             \
  template <typename T>                                                         \
  METAL_FUNC T name(T* object, T operand, memory_order) {                       \
    return function(object, operand);                                           \
  }

METAL_ATOMIC(atomic_fetch_add_explicit, atomicAdd)
METAL_ATOMIC(atomic_fetch_min_explicit, atomicMin)
METAL_ATOMIC(atomic_fetch_max_explicit, atomicMax)
METAL_ATOMIC(atomic_fetch_and_explicit, atomicAnd)
METAL_ATOMIC(atomic_fetch_or_explicit, atomicOr)
METAL_ATOMIC(atomic_fetch_xor_explicit, atomicXor)
METAL_ATOMIC(atomic_exchange_explicit, atomicExch)

template <typename T>
METAL_FUNC void atomic_store_explicit(atomic<T>* object, T value, memory_order) {
  *(volatile T*)&object->value = value;
}
template <typename T>
METAL_FUNC T atomic_load_explicit(const atomic<T>* object, memory_order) {
  return *(const volatile T*)&object->value;
}

}  // namespace metal

// What a body may say without `metal::`. Names that CUDA has too are left out: they would be ambiguous.
using metal::as_type;
using metal::atomic_exchange_explicit;
using metal::atomic_fetch_add_explicit;
using metal::atomic_fetch_and_explicit;
using metal::atomic_fetch_max_explicit;
using metal::atomic_fetch_min_explicit;
using metal::atomic_fetch_or_explicit;
using metal::atomic_fetch_xor_explicit;
using metal::atomic_float;
using metal::atomic_int;
using metal::atomic_load_explicit;
using metal::atomic_store_explicit;
using metal::atomic_uint;
using metal::clamp;
using metal::make_filled_simdgroup_matrix;
using metal::mem_flags;
using metal::memory_order_relaxed;
using metal::select;
using metal::simd_all;
using metal::simd_and;
using metal::simd_any;
using metal::simd_broadcast;
using metal::simd_broadcast_first;
using metal::simd_is_first;
using metal::simd_max;
using metal::simd_min;
using metal::simd_or;
using metal::simd_prefix_exclusive_sum;
using metal::simd_prefix_inclusive_sum;
using metal::simd_product;
using metal::simd_shuffle;
using metal::simd_shuffle_down;
using metal::simd_shuffle_up;
using metal::simd_shuffle_xor;
using metal::simd_sum;
using metal::simd_xor;
using metal::simdgroup_barrier;
using metal::simdgroup_bfloat8x8;
using metal::simdgroup_float8x8;
using metal::simdgroup_half8x8;
using metal::simdgroup_load;
using metal::simdgroup_matrix;
using metal::simdgroup_multiply;
using metal::simdgroup_multiply_accumulate;
using metal::simdgroup_store;
using metal::threadgroup_barrier;
