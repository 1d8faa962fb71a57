// kernel: attention
// computes: softmax attention in one pass, the scores never leaving the registers; with g = h / GROUP
//   s[j] = scale * sum_d q[b, h, i, d] * k[b, g, j, d]       over the keys j that query i sees:
//   those with mask[b, j] and, if CAUSAL, j <= offset + i
//   out[b, i, h, d] = sum_j softmax(s)[j] * v[b, g, j, d]    0 if the query sees no key
//   Sums, softmax and weights are float32, whatever T is. What the mask hides is never read, not even its NaN.
// inputs:
//   q (B, GROUP * G, I, E) T    -- queries; any strides, so that views of a packed projection are read in place
//   k (B, G, J, E) T            -- keys; any strides, so that a slice of a larger cache is read in place
//   v (B, G, J, E) T            -- values; likewise
//   mask (B, J) bool            -- True on real keys; any strides, so that one True can stand for all
//   scale () float32            -- positive
//   offset () int32             -- position of query 0 among the keys; read only if CAUSAL
// outputs:
//   out (B, I, GROUP * G, E) T  -- positions before heads: the caller's reshape to (B, I, H * E) is then free
// template:
//   T dtype float32|float16|bfloat16  -- element type
//   E int                             -- head width; rounded up to a multiple of 8 on chip
//   GROUP int                         -- query heads per key head
//   ROWS int                          -- rows of a query tile, a multiple of 8; a SIMD group takes 8
//   KEYS int                          -- keys of a tile: 8, 16 or 32
//   CAUSAL bool
// grid: (ceil(I * GROUP / ROWS) * ROWS * 4, G, B)
// threadgroup: (ROWS * 4, 1, 1)
// threadgroup_memory: (ROWS + KEYS) * (ceil(E / 8) * 8 + 16 / sizeof(T)) * sizeof(T)
// math: safe
// vjp: reference
// --- body
// The rows of a tile are positions and, fastest, the GROUP heads that share a key head: a key is staged once for all
// of them. A SIMD group keeps the output of its 8 rows in registers, as 8 x 8 fragments; the threadgroup stages one
// tile of keys, then of values, in the same memory. 16 bytes of padding keep tile rows off the same memory banks.
constexpr int LANES = 32;
constexpr int THREADS = ROWS / 8 * LANES;
constexpr int SLICES = (E + 7) / 8;
constexpr int WIDTH = SLICES * 8;
constexpr int PITCH = WIDTH + 16 / (int)sizeof(T);
constexpr int STRIPS = KEYS / 8;
constexpr float LOG2_E = 1.44269504088896340736f;
threadgroup T query_tile[ROWS * PITCH];
threadgroup T key_tile[KEYS * PITCH];  // keys, then values

const int lane = thread_index_in_simdgroup;
const int own = thread_position_in_threadgroup.x;
const int batch = threadgroup_position_in_grid.z;
const int key_head = threadgroup_position_in_grid.y;
const int first_row = (int)threadgroup_position_in_grid.x * ROWS;
const int heads = q_shape[1];
const int positions = q_shape[2];
const int rows = positions * GROUP;
const int keys = k_shape[2];

// A lane holds two neighbouring columns of one row of each 8 x 8 fragment. Lanes that share a row differ in bits 0 and 3.
const int fragment_row = (lane & 16) / 4 + (lane / 2) % 4;
const int fragment_column = (lane & 8) / 2 + (lane % 2) * 2;
const int tile_row = (int)simdgroup_index_in_threadgroup * 8;
const int row = first_row + tile_row + fragment_row;
const int position = row / GROUP;

const size_t query_start = batch * q_strides[0] + key_head * GROUP * q_strides[1];
for (int n = own; n < ROWS * WIDTH; n += THREADS) {
  const int r = n / WIDTH;
  const int d = n % WIDTH;
  T element = static_cast<T>(0.0f);
  if (first_row + r < rows && d < E) {
    const int p = (first_row + r) / GROUP;
    const int h = (first_row + r) % GROUP;
    element = q[query_start + h * q_strides[1] + p * q_strides[2] + d * q_strides[3]];
  }
  query_tile[r * PITCH + d] = element;
}

const size_t key_start = batch * k_strides[0] + key_head * k_strides[1];
const size_t value_start = batch * v_strides[0] + key_head * v_strides[1];
const float exponent_scale = scale * LOG2_E;  // powers of two are what the hardware has
float largest = -INFINITY;                    // of the row's scores so far, before scaling
float total = 0.0f;                           // of this lane's weights, relative to the largest
simdgroup_matrix<T, 8, 8> query_fragment;
simdgroup_matrix<T, 8, 8> key_fragment;
simdgroup_matrix<float, 8, 8> scores[STRIPS];
simdgroup_matrix<float, 8, 8> result[SLICES];
#pragma unroll
for (int d = 0; d < SLICES; d++) {
  result[d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}

// No row of the tile sees a key at or behind `end`.
const int last_position = metal::min(first_row + ROWS - 1, rows - 1) / GROUP;
const int end = CAUSAL ? metal::min(keys, offset + last_position + 1) : keys;
for (int first_key = 0; first_key < end; first_key += KEYS) {
  // One bit per visible key. Every SIMD group finds the same bits, so all of them skip a tile of padding together.
  const int own_key = first_key + lane;
  const bool seen = lane < KEYS && own_key < end && mask[batch * mask_strides[0] + own_key * mask_strides[1]];
  const uint visible = simd_sum(seen ? 1u << lane : 0u);
  if (visible == 0) {
    continue;
  }

  threadgroup_barrier(mem_flags::mem_threadgroup);  // the values of the tile before have been used
  for (int n = own; n < KEYS * WIDTH; n += THREADS) {
    const int r = n / WIDTH;
    const int d = n % WIDTH;
    T element = static_cast<T>(0.0f);
    if (((visible >> r) & 1u) != 0 && d < E) {
      element = k[key_start + (first_key + r) * k_strides[2] + d * k_strides[3]];
    }
    key_tile[r * PITCH + d] = element;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

#pragma unroll
  for (int s = 0; s < STRIPS; s++) {
    scores[s] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
#pragma unroll
  for (int d = 0; d < SLICES; d++) {
    simdgroup_load(query_fragment, query_tile + tile_row * PITCH + 8 * d, PITCH);
#pragma unroll
    for (int s = 0; s < STRIPS; s++) {
      simdgroup_load(key_fragment, key_tile + 8 * s * PITCH + 8 * d, PITCH, 0, true);
      simdgroup_multiply_accumulate(scores[s], query_fragment, key_fragment, scores[s]);
    }
  }

  threadgroup_barrier(mem_flags::mem_threadgroup);  // the keys have been used
  for (int n = own; n < KEYS * WIDTH; n += THREADS) {
    const int r = n / WIDTH;
    const int d = n % WIDTH;
    T element = static_cast<T>(0.0f);
    if (((visible >> r) & 1u) != 0 && d < E) {
      element = v[value_start + (first_key + r) * v_strides[2] + d * v_strides[3]];
    }
    key_tile[r * PITCH + d] = element;
  }

  // Online softmax. The largest score is subtracted before scaling: near the top, where it counts, that is exact.
  float new_largest = largest;
#pragma unroll
  for (int s = 0; s < STRIPS; s++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int key = 8 * s + fragment_column + e;
      const bool hidden = ((visible >> key) & 1u) == 0 || (CAUSAL && first_key + key > offset + position);
      const float score = hidden ? -INFINITY : scores[s].thread_elements()[e];
      scores[s].thread_elements()[e] = score;
      new_largest = metal::max(new_largest, score);
    }
  }
  new_largest = metal::max(new_largest, simd_shuffle_xor(new_largest, 1));
  new_largest = metal::max(new_largest, simd_shuffle_xor(new_largest, 8));
  const float pivot = new_largest == -INFINITY ? 0.0f : new_largest;  // no key seen yet: all weights are exp2(-inf) = 0
  const float decay = metal::exp2((largest - pivot) * exponent_scale);
  largest = new_largest;
  total *= decay;
#pragma unroll
  for (int s = 0; s < STRIPS; s++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const float weight = metal::exp2((scores[s].thread_elements()[e] - pivot) * exponent_scale);
      scores[s].thread_elements()[e] = weight;
      total += weight;
    }
  }
#pragma unroll
  for (int d = 0; d < SLICES; d++) {
    result[d].thread_elements()[0] *= decay;
    result[d].thread_elements()[1] *= decay;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

#pragma unroll
  for (int s = 0; s < STRIPS; s++) {
#pragma unroll
    for (int d = 0; d < SLICES; d++) {
      simdgroup_load(key_fragment, key_tile + 8 * s * PITCH + 8 * d, PITCH);
      simdgroup_multiply_accumulate(result[d], scores[s], key_fragment, result[d]);
    }
  }
}

total += simd_shuffle_xor(total, 1);
total += simd_shuffle_xor(total, 8);
if (row < rows) {
  const int head = key_head * GROUP + row % GROUP;
  const size_t place = (((size_t)batch * positions + position) * heads + head) * E + fragment_column;
  const float share = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
  for (int d = 0; d < SLICES; d++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      if (8 * d + fragment_column + e < E) {
        out[place + 8 * d + e] = static_cast<T>(result[d].thread_elements()[e] * share);
      }
    }
  }
}
