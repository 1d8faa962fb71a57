// kernel: logits_argmax
// computes: per block of SPAN ids, the best logit after the repetition penalty and the n-gram ban, in float32
//   s[t] = logits[b, t]; of ids in the history, once each: s * penalty if s < 0, else s / penalty
//   s[t] = -inf if t follows, somewhere in the history, the same NGRAM - 1 ids that end it
//   best[b, c] = max of s over the ids of block c, ids[b, c] = the lowest id that has it
//   The history of b is its first length[b] ids. Ids outside the vocabulary are ignored.
//   Values leave as keys that order like the floats they stand for, NaN first of all: unsigned integers have a
//   maximum without special cases. Two zeros tie. The caller takes the best block, the first one of equals.
// inputs:
//   logits (B, V) T
//   history (B, N) int32        -- ids so far, oldest first; what lies behind `length` is never looked at
//   length (B) int32            -- ids held, 0 <= length <= N
//   penalty () float32          -- positive; 1 changes nothing
// outputs:
//   best (B, ceil(V / SPAN)) uint32  -- sort key of the block's best score
//   ids (B, ceil(V / SPAN)) int32    -- its id
// template:
//   T dtype float32|float16|bfloat16  -- element type
//   NGRAM int                         -- size of the n-grams that must not repeat; 0 bans nothing
//   SPAN int                          -- ids of a block
// grid: (ceil(V / SPAN) * 256, B, 1)
// threadgroup: (256, 1, 1)
// threadgroup_memory: SPAN + 64
// math: safe
// vjp: none: an index has no gradient
// --- body
// A block looks the history up once, in a table of flags for its own ids. One threadgroup for the whole vocabulary
// would read 150,000 logits through one core; blocks keep all of them busy.
constexpr int THREADS = 256;
constexpr int GROUPS = THREADS / 32;
constexpr uchar REPEATED = 1;
constexpr uchar BANNED = 2;
threadgroup uchar flags[SPAN];
threadgroup uint group_best[GROUPS];
threadgroup int group_ids[GROUPS];

const int own = thread_position_in_threadgroup.x;
const int lane = thread_index_in_simdgroup;
const int simd_group = simdgroup_index_in_threadgroup;
const int block = threadgroup_position_in_grid.x;
const int batch = threadgroup_position_in_grid.y;
const int vocabulary = logits_shape[1];
const int first = block * SPAN;
const int width = metal::min(SPAN, vocabulary - first);
const int held = metal::min(length[batch], history_shape[1]);
const size_t history_start = (size_t)batch * history_shape[1];

for (int t = own; t < SPAN; t += THREADS) {
  flags[t] = 0;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
// Threads that meet the same id write the same flag.
for (int i = own; i < held; i += THREADS) {
  const int t = history[history_start + i] - first;
  if (t >= 0 && t < width) {
    flags[t] = REPEATED;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (NGRAM > 0) {
  for (int i = own; i + NGRAM <= held; i += THREADS) {
    bool same = true;
    for (int j = 0; j < NGRAM - 1; j++) {
      same = same && history[history_start + i + j] == history[history_start + held - NGRAM + 1 + j];
    }
    const int t = history[history_start + i + NGRAM - 1] - first;
    if (same && t >= 0 && t < width) {
      flags[t] = BANNED;
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// Every block has an id and every key is above 0, so the lowest of no ids is never taken.
uint own_best = 0;
int own_id = vocabulary;
for (int t = own; t < width; t += THREADS) {
  float score = static_cast<float>(logits[(size_t)batch * vocabulary + first + t]);
  if (flags[t] != 0) {
    score = flags[t] == BANNED ? -INFINITY : score < 0.0f ? score * penalty : score / penalty;
  }
  // Positive floats order like their bits, negative ones the other way round.
  const uint bits = as_type<uint>(score == 0.0f ? 0.0f : score);
  const uint key = score != score ? 0xffffffffu : (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  if (key > own_best) {
    own_best = key;
    own_id = first + t;
  }
}
uint most = simd_max(own_best);
int lowest = simd_min(own_best == most ? own_id : vocabulary);
if (lane == 0) {
  group_best[simd_group] = most;
  group_ids[simd_group] = lowest;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (simd_group == 0) {
  own_best = lane < GROUPS ? group_best[lane] : 0;
  own_id = lane < GROUPS ? group_ids[lane] : vocabulary;
  most = simd_max(own_best);
  lowest = simd_min(own_best == most ? own_id : vocabulary);
  if (lane == 0) {
    const size_t place = (size_t)batch * threadgroups_per_grid.x + block;
    best[place] = most;
    ids[place] = lowest;
  }
}
