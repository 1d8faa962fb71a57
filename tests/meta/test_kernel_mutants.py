"""Mutants of the project's own kernels: each is killed, and by the check named in its test."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen4b_asr.kernels import _loader, _selfcheck, logits_argmax, operations
from qwen4b_asr.kernels._cases import Case
from tests.helpers import metal_host
from tests.meta.mutants import Mutant, verdict

pytestmark = pytest.mark.skipif(metal_host.unavailable() is not None, reason=str(metal_host.unavailable()))

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

FSMN = {
    "tiny": (
        Mutant("residual dropped", "float sum = x[i + LEFT];", "float sum = 0.0f;", "numbers"),
        Mutant("residual of another row", "float sum = x[i + LEFT];", "float sum = x[i];", "numbers"),
        Mutant("mask of the values dropped", " && mask[mask_start + row]) {", ") {", "numbers"),
        Mutant("mask of the output dropped", "mask[mask_start + row] ? sum : 0.0f", "sum", "numbers"),
        Mutant("mask of the first item", "mask[mask_start + row] ? sum", "mask[row] ? sum", "numbers"),
        Mutant("first column ignored", "stride + OFFSET + column", "stride + column", "numbers"),
        Mutant("left context off by one", "first + i - LEFT;", "first + i - LEFT + 1;", "numbers"),
        Mutant("lower bound dropped", "row >= 0 && row < rows && mask", "row < rows && mask", "launch", "byte -"),
        Mutant("upper bound off by one", "row >= 0 && row < rows && mask", "row >= 0 && row <= rows && mask", "launch"),
        Mutant("columns unchecked", "(int)column < width && ", "", "launch", "out-of-bounds"),
        Mutant("window too short", "float x[ROWS + K - 1];", "float x[ROWS + K - 2];", "launch",
               "outside of the array"),
        Mutant("last row unwritten", "if (row < rows) {\n      float", "if (row < rows - 1) {\n      float", "schedule",
               "is never written"),
        Mutant("missing cast", "static_cast<T>(mask[mask_start + row] ? sum : 0.0f)",
               "mask[mask_start + row] ? sum : 0.0f", "compile", dtype="bfloat16"),
        Mutant("no address space", "x[i] = static_cast<float>(qkv[value_start + (size_t)row * stride]);",
               "const T* value = qkv + value_start + (size_t)row * stride;\nx[i] = static_cast<float>(*value);", "lint",
               "device"),
    ),
}  # fmt: skip

ATTENTION = {
    "one-query": (
        Mutant("scale dropped", "= scale * LOG2_E;", "= LOG2_E;", "numbers"),
        Mutant("lanes misplaced", "(lane & 16) / 4 + (lane / 2) % 4", "(lane & 16) / 4 + lane % 4", "schedule"),
        Mutant("reduction over half of the row", "total += simd_shuffle_xor(total, 8);\n", "", "numbers"),
        Mutant("SIMD function in a branch", "const uint visible = simd_sum(seen ? 1u << lane : 0u);",
               "uint visible = 0;\nif (lane < KEYS / 2) visible = simd_sum(seen ? 1u << lane : 0u);", "launch",
               "while other lanes of the SIMD group"),
        Mutant("rows unchecked", "if (row < rows) {", "if (position >= 0) {", "launch", "output 'out'"),
        Mutant("queries unchecked", "if (first_row + r < rows && d < E) {", "if (d < E) {", "launch", "input 'q'"),
        Mutant("threadgroup memory as a thread's", "simdgroup_load(query_fragment, query_tile +",
               "T* tile = query_tile;\n    simdgroup_load(query_fragment, tile +", "lint", "threadgroup"),
        Mutant("missing cast", "static_cast<T>(result[d].thread_elements()[e] * share)",
               "result[d].thread_elements()[e] * share", "compile", dtype="bfloat16"),
    ),
    "odd-width": (
        Mutant("mask dropped", "own_key < end && mask[batch * mask_strides[0] + own_key * mask_strides[1]]",
               "own_key < end", "numbers"),
        Mutant("mask of the first item", "mask[batch * mask_strides[0] + own", "mask[own", "numbers"),
        Mutant("keys unchecked", "seen = lane < KEYS && own_key < end && ", "seen = lane < KEYS && ", "launch",
               "input 'mask'"),
        Mutant("keys of the neighbour", "(first_key + r) * k_strides[2]", "(first_key + r) * k_strides[1]", "numbers"),
        Mutant("pitch mistaken", "key_tile + 8 * s * PITCH + 8 * d, PITCH);",
               "key_tile + 8 * s * PITCH + 8 * d, WIDTH);", "schedule"),
        Mutant("last column unwritten", "8 * d + fragment_column + e < E)", "8 * d + fragment_column + e < E - 1)",
               "schedule", "is never written"),
        Mutant("columns unchecked", "if (8 * d + fragment_column + e < E)", "if (d >= 0)", "launch",
               "output 'out'"),
    ),
    "causal-64": (
        Mutant("no barrier before the keys", f"  {BARRIER}  // the values of the tile before have been used\n", "",
               "schedule"),
        Mutant("no barrier after the keys", f"    key_tile[r * PITCH + d] = element;\n  }}\n  {BARRIER}\n",
               "    key_tile[r * PITCH + d] = element;\n  }\n", "schedule"),
        Mutant("no barrier before the values", f"  {BARRIER}  // the keys have been used\n", "", "schedule"),
        Mutant("no barrier after the values", f"*= decay;\n  }}\n  {BARRIER}\n", "*= decay;\n  }\n", "schedule"),
        Mutant("barrier in a branch", f"  {BARRIER}  // the keys have been used", f"  if (own < 32) {BARRIER}",
               "launch", "threadgroup_barrier at kernel:"),
        Mutant("old tiles not scaled down", "    result[d].thread_elements()[1] *= decay;\n", "", "numbers"),
        Mutant("old sums not scaled down", "  total *= decay;\n", "", "numbers"),
        Mutant("future seen", " || (CAUSAL && first_key + key > offset + position)", "", "numbers"),
        Mutant("present hidden", "first_key + key > offset + position", "first_key + key >= offset + position",
               "numbers"),
        Mutant("end of the keys too early", "offset + last_position + 1)", "offset + last_position)", "numbers"),
    ),
}  # fmt: skip

ADD_RMS_NORM = {
    "tiny-prompt": (
        Mutant("stream dropped", "static_cast<float>(x[start + i]) + static_cast<float>(delta[start + i]));\n  total",
               "static_cast<float>(delta[start + i]));\n  total", "numbers"),
        Mutant("epsilon as large as the values", "squares / width + eps", "squares / width + 1.0f", "numbers"),
        Mutant("mean dropped", "squares / width + eps", "squares + eps", "numbers"),
        Mutant("one SIMD group left out", "for (int j = 0; j < GROUPS; j++)", "for (int j = 1; j < GROUPS; j++)",
               "numbers"),
        Mutant("weight dropped", " * static_cast<float>(weight[i]));", ");", "numbers"),
        Mutant("delta of another row", "delta[start + i]));\n  normed", "delta[i]));\n  normed", "numbers"),
        Mutant("no barrier", f"{BARRIER}\n", "", "schedule"),
        Mutant("row too long", "for (int i = own; i < width; i += THREADS) {\n  const T sum = static_cast<T>("
               "static_cast<float>(x[start + i]) + static_cast<float>(delta[start + i]));\n  total",
               "for (int i = own; i <= width; i += THREADS) {\n  const T sum = static_cast<T>("
               "static_cast<float>(x[start + i]) + static_cast<float>(delta[start + i]));\n  total", "launch"),
        Mutant("last column unwritten", "i < width; i += THREADS) {\n  const T sum = static_cast<T>(static_cast<float>("
               "x[start + i]) + static_cast<float>(delta[start + i]));\n  normed",
               "i < width - 1; i += THREADS) {\n  const T sum = static_cast<T>(static_cast<float>("
               "x[start + i]) + static_cast<float>(delta[start + i]));\n  normed", "schedule", "is never written"),
        Mutant("missing cast", "static_cast<T>(static_cast<float>(sum) * scale * static_cast<float>(weight[i]))",
               "static_cast<float>(sum) * scale * static_cast<float>(weight[i])", "compile", dtype="bfloat16"),
        Mutant("no address space", " * static_cast<float>(weight[i]));",
               " * static_cast<float>(*static_cast<const T*>(weight + i)));", "lint"),
    ),
}  # fmt: skip

LFR_CMVN = {
    "odd": (
        Mutant("no clamp at the end", "metal::min(metal::max(row * N + slot - (M - 1) / 2, 0), frames - 1)",
               "metal::max(row * N + slot - (M - 1) / 2, 0)", "launch", "input 'fbank'"),
        Mutant("no clamp at the start", "metal::max(row * N + slot - (M - 1) / 2, 0)", "row * N + slot - (M - 1) / 2",
               "launch", "byte -"),
        Mutant("stacked around another frame", "(M - 1) / 2", "M / 2", "numbers"),
        Mutant("shift dropped", "value + static_cast<float>(shift[column])", "value", "numbers"),
        Mutant("scale before shift", "const float moved = value + static_cast<float>(shift[column]);",
               "const float moved = value + static_cast<float>(shift[column]) / static_cast<float>(scale[column]);",
               "numbers"),
        Mutant("columns transposed", "slot * bins + bin", "bin * M + slot", "numbers"),
        Mutant("bins unchecked", "bin < bins && ", "", "launch", "out-of-bounds"),
        Mutant("one slot unwritten", "slot < M)", "slot < M - 1)", "schedule", "is never written"),
        Mutant("missing cast", "static_cast<O>(moved * static_cast<float>(scale[column]))",
               "moved * static_cast<float>(scale[column])", "compile", dtype="bfloat16"),
        Mutant("no address space", "static_cast<float>(shift[column]);",
               "static_cast<float>(*(static_cast<const float*>(shift + column)));", "lint"),
    ),
}  # fmt: skip

LOGITS_ARGMAX = {
    "decisive": (
        Mutant("no barrier after clearing", f"  flags[t] = 0;\n}}\n{BARRIER}\n", "  flags[t] = 0;\n}\n", "schedule"),
        Mutant("no barrier after the repeated", f"{BARRIER}\nif (NGRAM > 0) {{", "if (NGRAM > 0) {", "schedule"),
        Mutant("no barrier after the banned", f"{BARRIER}\n\n// Every block", "// Every block", "schedule"),
        Mutant("no barrier after the groups' best", f"  group_ids[simd_group] = lowest;\n}}\n{BARRIER}\n",
               "  group_ids[simd_group] = lowest;\n}\n", "schedule"),
        Mutant("barrier in a branch", f"  group_ids[simd_group] = lowest;\n}}\n{BARRIER}\n",
               f"  group_ids[simd_group] = lowest;\n  {BARRIER}\n}}\n", "launch", "threadgroup_barrier at kernel:"),
        Mutant("penalty the wrong way", "score < 0.0f ? score * penalty : score / penalty",
               "score < 0.0f ? score / penalty : score * penalty", "numbers"),
        Mutant("ban dropped", "score = flags[t] == BANNED ? -INFINITY : score", "score = score", "numbers"),
        Mutant("negative numbers in the wrong order", "(bits >> 31) != 0 ? ~bits : bits | 0x80000000u", "bits",
               "numbers"),
        Mutant("past the vocabulary", "const int width = metal::min(SPAN, vocabulary - first);",
               "const int width = SPAN;", "launch", "out-of-bounds"),
        Mutant("more groups than there are", "lane < GROUPS ? group_best[lane] : 0", "group_best[lane]", "launch",
               "outside of the array"),
        Mutant("a history longer than it is", "metal::min(length[batch], history_shape[1])", "history_shape[1]",
               "numbers"),
        Mutant("result unwritten", "  if (lane == 0) {\n    const size_t place",
               "  if (lane == 32) {\n    const size_t place", "schedule", "is never written"),
        Mutant("threadgroup memory as a thread's", "  flags[t] = 0;", "  uchar* flag = flags + t;\n  *flag = 0;",
               "lint", "threadgroup"),
        Mutant("arguments of two types", "metal::min(SPAN, vocabulary - first)",
               "metal::min(SPAN, logits_shape[1] - 1u)", "compile", "ambiguous"),
        Mutant("ids of blocks before", "const int t = history[history_start + i] - first;\n  if (t >= 0 && t < width)",
               "const int t = history[history_start + i] - first;\n  if (t < width)", "launch", "outside of the array"),
        Mutant("ids of blocks behind", "const int t = history[history_start + i] - first;\n  if (t >= 0 && t < width)",
               "const int t = history[history_start + i] - first;\n  if (t >= 0)", "launch", "outside of the array"),
        Mutant("block forgotten", "    own_id = first + t;", "    own_id = t;", "numbers"),
    ),
}  # fmt: skip

QK_NORM_ROPE = {
    "tiny-prompt": (
        Mutant("mean over half", "simd_sum(squares) / E", "simd_sum(squares) / HALF", "numbers"),
        Mutant("one half forgotten", "lower[j] * lower[j] + upper[j] * upper[j]", "lower[j] * lower[j]", "numbers"),
        Mutant("turned backwards", "a * cosine[j] - b * sine[j]", "a * cosine[j] + b * sine[j]", "numbers"),
        Mutant("offset dropped", "static_cast<float>(offset + s)", "static_cast<float>(s)", "numbers"),
        Mutant("SIMD function in a branch", "simd_sum(squares) / E", "(lane < 16 ? simd_sum(squares) : squares) / E",
               "launch", "while other lanes of the SIMD group"),
        Mutant("frequencies unchecked", "i < HALF ? frequency[i] : 0.0f", "frequency[i]", "launch",
               "input 'frequency'"),
        Mutant("heads unchecked", "real_row && head < q_heads + k_heads;", "real_row;", "launch", "out-of-bounds"),
        Mutant("upper half of the keys unwritten", "        k_out[to + HALF + i] = second;\n", "", "schedule",
               "is never written"),
        Mutant("positions before heads", "((size_t)item * own_heads + own_head) * positions + s",
               "((size_t)item * positions + s) * own_heads + own_head", "numbers"),
        Mutant("keys' weights for queries", "const float wa = is_query ? static_cast<float>(q_weight[i])",
               "const float wa = is_query ? static_cast<float>(k_weight[i])", "numbers"),
        Mutant("missing cast", "const T first = static_cast<T>(a * cosine[j] - b * sine[j]);",
               "const T first = a * cosine[j] - b * sine[j];", "compile", dtype="bfloat16"),
        Mutant("no address space", "? static_cast<float>(q[from + i])",
               "? static_cast<float>(*static_cast<const T*>(q + from + i))", "lint"),
    ),
}  # fmt: skip


def _decisive(rng: np.random.Generator, dtype: mx.Dtype) -> dict[str, Any]:
    """Logits whose choice hangs on every part of `logits_argmax`: in order 7, 5, the last but two, 11.

    7 is banned, because it follows 5, with which the history ends; 5 is penalised below 11; both are in the first
    block. What lies behind the history's length would spoil the winner, in the second block. The second item is all
    negative: its winner is the one of the smallest magnitude.
    """
    span = logits_argmax._SPAN
    logits = np.full((2, span + 5), -8.0)
    logits[0, [7, 5, span + 2, 11]] = 4.0, 3.0, 2.9, 2.8
    logits[1, [40, span + 4]] = -2.0, -3.0
    return {
        "logits": mx.array(logits).astype(dtype),
        "history": mx.array([[5, 7, span + 1, 5, span + 2]] * 2, dtype=mx.int32),
        "length": mx.array([4, 4], dtype=mx.int32),
        "penalty": 1.2,
        "ngram": 2,
    }


DECISIVE = Case("decisive", _decisive)

ALL = {
    "attention": ATTENTION,
    "add_rms_norm": ADD_RMS_NORM,
    "fsmn": FSMN,
    "lfr_cmvn": LFR_CMVN,
    "logits_argmax": LOGITS_ARGMAX,
    "qk_norm_rope": QK_NORM_ROPE,
}
PLANTED = [
    pytest.param(operation, case, mutant, id=f"{operation}: {mutant.name} - {mutant.killed_by}")
    for operation, cases in ALL.items()
    for case, mutants in cases.items()
    for mutant in mutants
]


def judge(operation_name: str, case_name: str, dtype: str, mutant: Mutant | None) -> tuple[str, str]:
    """Hold an operation's kernel, with or without a mistake in it, against all checks on one of its cases."""
    operation = operations()[operation_name]
    cases = (*operation.cases, DECISIVE)
    arguments = next(case for case in cases if case.name == case_name).arguments(dtype)

    def factory(*, source: str, **parameters: Any) -> metal_host.HostKernel:
        return metal_host.metal_kernel(source=mutant.plant(source) if mutant else source, **parameters)

    def call() -> Any:
        return operation.kernel(**arguments)

    def problem(result: Any) -> str | None:
        widened = {
            name: value.astype(mx.float32) if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
            else value
            for name, value in arguments.items()
        }  # fmt: skip
        results, plain, exact = (
            [value] if isinstance(value, mx.array) else list(value)
            for value in (result, operation.reference(**arguments), operation.reference(**widened))
        )
        found = [_selfcheck.compare(*trio) for trio in zip(results, plain, exact, strict=True)]
        return next((message for message in found if message), None)

    with _loader.override("metal", factory):
        return verdict(call, problem, lambda: [record.text for record in metal_host.launches(call)])


def test_every_kernel_has_mutants():
    assert set(ALL) == set(operations())
    for operation, cases in ALL.items():
        kinds = {mutant.killed_by for mutants in cases.values() for mutant in mutants}
        assert {"compile", "launch", "schedule", "numbers", "lint"} <= kinds, operation


@pytest.mark.parametrize(("operation", "case"), [(name, case) for name, cases in ALL.items() for case in cases])
def test_the_kernel_itself_survives(operation, case):
    assert judge(operation, case, "float32", None) == ("none", "")


@pytest.mark.parametrize(("operation", "case", "mutant"), PLANTED)
def test_a_mutant_is_killed(operation, case, mutant):
    if mutant.killed_by == "lint" and (reason := metal_host.lint_unavailable()):
        pytest.skip(reason)
    killer, message = judge(operation, case, mutant.dtype, mutant)
    assert (killer, mutant.says in message) == (mutant.killed_by, True), message
