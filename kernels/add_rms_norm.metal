// kernel: add_rms_norm
// computes: a residual and the norm that follows it:
//   total[r, i] = x[r, i] + delta[r, i], rounded to T
//   normed[r, i] = total[r, i] / sqrt(mean_i(total[r, i]^2) + eps) * weight[i]
//   in float32 from the rounded sum, each result rounded once.
// inputs:
//   x (R, H) T              -- the stream
//   delta (R, H) T          -- what a block adds to it
//   weight (H) T            -- of the norm
//   eps () float32          -- of the norm
// outputs:
//   total (R, H) T          -- the stream behind the block
//   normed (R, H) T         -- what the next block reads
// template:
//   T dtype float32|float16|bfloat16  -- element type
// grid: (256, R, 1)
// threadgroup: (256, 1, 1)
// threadgroup_memory: 32
// math: safe
// vjp: reference
// --- body
// A threadgroup takes a row. Each thread comes twice by its own columns: the sum is made anew rather than kept, since a
// width that is known only at run time has no place in registers, and the second reading comes from the cache.
constexpr int THREADS = 256;
constexpr int GROUPS = THREADS / 32;
threadgroup float group_squares[GROUPS];

const int own = thread_position_in_threadgroup.x;
const int width = x_shape[1];
const size_t start = (size_t)threadgroup_position_in_grid.y * width;

float squares = 0.0f;
for (int i = own; i < width; i += THREADS) {
  const T sum = static_cast<T>(static_cast<float>(x[start + i]) + static_cast<float>(delta[start + i]));
  total[start + i] = sum;
  squares += static_cast<float>(sum) * static_cast<float>(sum);
}
squares = simd_sum(squares);
if (thread_index_in_simdgroup == 0) {
  group_squares[simdgroup_index_in_threadgroup] = squares;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
squares = 0.0f;
for (int j = 0; j < GROUPS; j++) {
  squares += group_squares[j];
}
const float scale = metal::rsqrt(squares / width + eps);
for (int i = own; i < width; i += THREADS) {
  const T sum = static_cast<T>(static_cast<float>(x[start + i]) + static_cast<float>(delta[start + i]));
  normed[start + i] = static_cast<T>(static_cast<float>(sum) * scale * static_cast<float>(weight[i]));
}
