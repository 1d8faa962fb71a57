// <metal_simdgroup_matrix>: 8x8 matrices of float, half or bfloat, spread over the 32 lanes, two elements each.
//
// The spread is that of Apple GPUs, which MLX's own kernels rely on (BaseMMAFrag::get_coord). Loads read before the lanes
// meet and stores write after: what other lanes must have written before a load, or must not read before a later barrier,
// is as exposed to the schedule as with plain memory.
#pragma once

#include "simdgroup.h"

namespace metal {

template <class T, int ROWS, int COLUMNS>
struct simdgroup_matrix {
  static_assert(ROWS == 8 && COLUMNS == 8, "Metal has 8x8 only");
  static_assert(is_floating_point_v<T>, "of float, half or bfloat");
  typedef vec<T, 2> elements_t;
  elements_t elements;

  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal, METAL_HOST_PLACE);
  elements_t& thread_elements() { return elements; }
  const elements_t& thread_elements() const { return elements; }
};

typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

namespace detail {

struct Coordinates {
  int row, column;  // of the lane's first element; the second stands to its right
};
inline Coordinates coordinates_of(int lane) {
  const int quad = lane / 4;
  return {(quad & 4) + (lane / 2) % 4, (quad & 2) * 2 + (lane % 2) * 2};
}

inline Coordinates meet(const char* what, const char* file, int line) {
  const Exchange<int> all(what, 0, file, line);
  if (all.view->lanes != 0xffffffffu) metal_host::services->fail("simdgroup_matrix needs all 32 lanes");
  return coordinates_of(int(all.lane));
}

// Where a lane's element i lies, in elements.
inline long offset_of(Coordinates at, int i, ulong stride, ulong2 origin, bool transposed) {
  const ulong row = ulong(transposed ? at.column + i : at.row), column = ulong(transposed ? at.row : at.column + i);
  return long((origin.y + row) * stride + origin.x + column);
}

}  // namespace detail

template <class T, int R, int C>
inline simdgroup_matrix<T, R, C>::simdgroup_matrix(T diagonal, const char* file, int line) {
  const detail::Coordinates at = detail::meet("simdgroup_matrix", file, line);
  for (int i = 0; i < 2; i++) elements[i] = at.row == at.column + i ? diagonal : T(0);
}

template <class T, int R, int C>
inline simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, R, C> result;
  result.elements = vec<T, 2>(value);
  return result;
}
template <class T, int R, int C>
inline simdgroup_matrix<T, R, C> make_diagonal_simdgroup_matrix(T value, METAL_HOST_PLACE) {
  return simdgroup_matrix<T, R, C>(value, file, line);
}

template <class T>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& to, const T* from, ulong elements_per_row = 8,
                           ulong2 origin = ulong2(0), bool transpose = false, METAL_HOST_PLACE) {
  const detail::Coordinates at = detail::coordinates_of(int(metal_host::services->lane()));
  for (int i = 0; i < 2; i++) to.elements[i] = from[detail::offset_of(at, i, elements_per_row, origin, transpose)];
  detail::meet("simdgroup_load", file, line);
}

template <class T>
inline void simdgroup_store(const simdgroup_matrix<T, 8, 8>& from, T* to, ulong elements_per_row = 8,
                            ulong2 origin = ulong2(0), bool transpose = false, METAL_HOST_PLACE) {
  const detail::Coordinates at = detail::meet("simdgroup_store", file, line);
  for (int i = 0; i < 2; i++) to[detail::offset_of(at, i, elements_per_row, origin, transpose)] = from.elements[i];
}

// d = a b + c, with float sums.
template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                          const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c,
                                          METAL_HOST_PLACE) {
  struct Operands {
    float a[2], b[2];
  };
  const Operands mine{{float(a.elements[0]), float(a.elements[1])}, {float(b.elements[0]), float(b.elements[1])}};
  const detail::Exchange<Operands> all("simdgroup_multiply_accumulate", mine, file, line);
  if (all.view->lanes != 0xffffffffu) metal_host::services->fail("simdgroup_matrix needs all 32 lanes");
  float left[8][8], right[8][8];
  for (int lane = 0; lane < 32; lane++) {
    const detail::Coordinates at = detail::coordinates_of(lane);
    const Operands theirs = all[lane];
    for (int i = 0; i < 2; i++) {
      left[at.row][at.column + i] = theirs.a[i];
      right[at.row][at.column + i] = theirs.b[i];
    }
  }
  const detail::Coordinates at = detail::coordinates_of(int(all.lane));
  for (int i = 0; i < 2; i++) {
    float sum = float(c.elements[i]);
    for (int k = 0; k < 8; k++) sum = __builtin_fmaf(left[at.row][k], right[k][at.column + i], sum);
    d.elements[i] = D(sum);
  }
}

template <class D, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                               const simdgroup_matrix<B, 8, 8>& b, METAL_HOST_PLACE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>(D(0)), file, line);
}

}  // namespace metal
