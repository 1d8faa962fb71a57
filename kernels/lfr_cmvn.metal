// kernel: lfr_cmvn
// computes: low-frame-rate rows, normalised: M neighbouring frames every N frames, the edge frames repeated,
//   out[l, j * F + f] = (fbank[clamp(l * N + j - (M - 1) / 2, 0, R - 1), f] + shift[j * F + f]) * scale[j * F + f]
//   in float32, rounded once.
// inputs:
//   fbank (R, F) T          -- R frames of F bins, R >= 1
//   shift (M*F) S           -- added first
//   scale (M*F) S           -- multiplied by then
// outputs:
//   out (ceil(R/N), M*F) O  -- rows
// template:
//   T dtype float32|float16|bfloat16  -- frames
//   S dtype float32|float16|bfloat16  -- statistics
//   O dtype float32|float16|bfloat16  -- rows, what T and S promote to
//   M int                             -- frames in a row
//   N int                             -- frames between two rows
// grid: (F, ceil(R / N), M)
// threadgroup: (32, 8, 1), <= 256
// threadgroup_memory: 0
// math: safe
// vjp: reference
// --- body
const int bin = thread_position_in_grid.x;
const int row = thread_position_in_grid.y;
const int slot = thread_position_in_grid.z;
const int frames = fbank_shape[0];
const int bins = fbank_shape[1];
if (bin < bins && row < (frames + N - 1) / N && slot < M) {
  const int frame = metal::min(metal::max(row * N + slot - (M - 1) / 2, 0), frames - 1);
  const int column = slot * bins + bin;
  const float value = static_cast<float>(fbank[(size_t)frame * bins + bin]);
  const float moved = value + static_cast<float>(shift[column]);
  out[(size_t)row * (M * bins) + column] = static_cast<O>(moved * static_cast<float>(scale[column]));
}
