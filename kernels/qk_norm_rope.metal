// kernel: qk_norm_rope
// computes: per head, RMS norm and rotary position of queries and keys, heads moved before positions;
//   n[i] = x[i] / sqrt(mean_i(x[i]^2) + eps) * weight[i], angle = (offset + s) * frequency[i]
//   out[i] = n[i] * cos(angle) - n[i + E/2] * sin(angle)
//   out[i + E/2] = n[i] * sin(angle) + n[i + E/2] * cos(angle)      for i < E/2
//   All in float32, rounded once. The angle is a float32 product, as in transformers and in MLX: models were trained
//   with its rounding, which at position 40000 is 2e-3 rad. Its sine and cosine are good to 4e-7 wherever it is below
//   2^24, since whole turns are taken off first; what a GPU's own sine makes of a large angle is another matter.
//   Keys and values are not written into the cache's place. Outputs of a custom kernel are new buffers, so it would
//   have to copy the whole cache for each token (Qwen3-4B at 4096 positions: 36 x 2 x 8 x 4096 x 128 bfloat16,
//   604 MB), or write to an input behind the back of MLX, whose scheduler does not order such writes. The cache's
//   own slice update writes the new rows only.
// inputs:
//   q (B, S, H, E) T            -- query projection
//   k (B, S, G, E) T            -- key projection; G heads, of any relation to H
//   q_weight (E) T              -- of the queries' norm
//   k_weight (E) T              -- of the keys' norm
//   frequency (E/2) float32     -- angle of each pair per position, rad
//   eps () float32              -- of both norms
//   offset () int32             -- position of row 0
// outputs:
//   q_out (B, H, S, E) T        -- queries
//   k_out (B, G, S, E) T        -- keys
// template:
//   T dtype float32|float16|bfloat16  -- element type
//   E int                             -- head width, even
//   RUN int                           -- heads that one SIMD group takes one after another, sharing the angles
// grid: (32 * B * S, ceil((H + G) / RUN), 1)
// threadgroup: (32, 4, 1), <= 128
// threadgroup_memory: 0
// math: safe
// vjp: reference
// --- body
// One SIMD group takes one position and RUN heads; lane i holds both halves of the pairs i, i + 32, ...
constexpr int HALF = E / 2;
constexpr int PAIRS = (HALF + 31) / 32;
const int lane = thread_index_in_simdgroup;
const int row = thread_position_in_grid.x / 32;
const int run = thread_position_in_grid.y;
const int positions = q_shape[1];
const int q_heads = q_shape[2];
const int k_heads = k_shape[2];
const int item = row / positions;
const int s = row - item * positions;
const bool real_row = item < q_shape[0];

float cosine[PAIRS];
float sine[PAIRS];
#pragma unroll
for (int j = 0; j < PAIRS; j++) {
  const int i = lane + 32 * j;
  const float angle = static_cast<float>(offset + s) * (i < HALF ? frequency[i] : 0.0f);
  // Two pi is the sum of two floats, and each product is exact inside its fused multiply-add.
  const float whole = -metal::rint(angle * 0.15915494309189535f);
  const float turned = metal::fma(whole, -1.7484555314695172e-07f, metal::fma(whole, 6.2831854820251465f, angle));
  cosine[j] = metal::cos(turned);
  sine[j] = metal::sin(turned);
}

for (int n = 0; n < RUN; n++) {
  const int head = run * RUN + n;
  const bool is_query = head < q_heads;
  const bool live = real_row && head < q_heads + k_heads;  // the same for the whole SIMD group
  const int own_head = is_query ? head : head - q_heads;
  const int own_heads = is_query ? q_heads : k_heads;
  const size_t from = ((size_t)row * own_heads + own_head) * E;
  const size_t to = (((size_t)item * own_heads + own_head) * positions + s) * E;
  float lower[PAIRS];
  float upper[PAIRS];
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < PAIRS; j++) {
    const int i = lane + 32 * j;
    lower[j] = 0.0f;
    upper[j] = 0.0f;
    if (live && i < HALF) {
      lower[j] = is_query ? static_cast<float>(q[from + i]) : static_cast<float>(k[from + i]);
      upper[j] = is_query ? static_cast<float>(q[from + HALF + i]) : static_cast<float>(k[from + HALF + i]);
    }
    squares += lower[j] * lower[j] + upper[j] * upper[j];
  }
  const float scale = metal::rsqrt(simd_sum(squares) / E + eps);
#pragma unroll
  for (int j = 0; j < PAIRS; j++) {
    const int i = lane + 32 * j;
    if (live && i < HALF) {
      const float wa = is_query ? static_cast<float>(q_weight[i]) : static_cast<float>(k_weight[i]);
      const float wb = is_query ? static_cast<float>(q_weight[HALF + i]) : static_cast<float>(k_weight[HALF + i]);
      const float a = lower[j] * scale * wa;
      const float b = upper[j] * scale * wb;
      const T first = static_cast<T>(a * cosine[j] - b * sine[j]);
      const T second = static_cast<T>(a * sine[j] + b * cosine[j]);
      if (is_query) {
        q_out[to + i] = first;
        q_out[to + HALF + i] = second;
      } else {
        k_out[to + i] = first;
        k_out[to + HALF + i] = second;
      }
    }
  }
}
