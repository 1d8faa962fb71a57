// kernel: fsmn
// computes: SANM's memory block over the values v = qkv[..., OFFSET : OFFSET + D] of a packed projection,
//   x[b, r, d] = mask[b, r] ? v[b, r, d] : 0, and 0 before the first row and after the last
//   out[b, r, d] = mask[b, r] ? x[b, r, d] + sum_k weight[d, k] * x[b, r + k - LEFT, d] : 0
//   Sums are float32. A masked row is never multiplied, only left out, so not even its NaN is seen.
// inputs:
//   qkv (B, L, S) T         -- packed projection; only D of its S columns are read
//   weight (D, K, 1) T      -- taps, MLX's convolution layout
//   mask (B, L) bool        -- True on real rows
// outputs:
//   out (B, L, D) T         -- memory; zero on masked rows
// template:
//   T dtype float32|float16|bfloat16  -- element type
//   K int                             -- taps
//   LEFT int                          -- rows of left context, 0 <= LEFT < K
//   OFFSET int                        -- first column of the values in qkv
//   ROWS int                          -- consecutive rows that one thread computes
// grid: (D, ceil(L / ROWS), B)
// threadgroup: (32, 8, 1), <= 256
// threadgroup_memory: 0
// math: safe
// vjp: reference
// --- body
// A thread owns one column and ROWS consecutive rows. It reads ROWS + K - 1 values instead of ROWS * K, and
// neighbouring threads read neighbouring columns. The masks of those rows are the same for the whole SIMD group.
const uint column = thread_position_in_grid.x;
const uint item = thread_position_in_grid.z;
const int first = (int)thread_position_in_grid.y * ROWS;
const int rows = mask_shape[1];
const int width = weight_shape[0];
const int stride = qkv_shape[2];
if ((int)column < width && first < rows && (int)item < mask_shape[0]) {
  const size_t mask_start = (size_t)item * rows;
  const size_t value_start = mask_start * stride + OFFSET + column;
  float x[ROWS + K - 1];
#pragma unroll
  for (int i = 0; i < ROWS + K - 1; i++) {
    const int row = first + i - LEFT;
    x[i] = 0.0f;
    if (row >= 0 && row < rows && mask[mask_start + row]) {
      x[i] = static_cast<float>(qkv[value_start + (size_t)row * stride]);
    }
  }
  float tap[K];
#pragma unroll
  for (int k = 0; k < K; k++) {
    tap[k] = static_cast<float>(weight[(size_t)column * K + k]);
  }
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const int row = first + i;
    if (row < rows) {
      float sum = x[i + LEFT];
#pragma unroll
      for (int k = 0; k < K; k++) {
        sum += tap[k] * x[i + k];
      }
      out[(mask_start + row) * width + column] = static_cast<T>(mask[mask_start + row] ? sum : 0.0f);
    }
  }
}
