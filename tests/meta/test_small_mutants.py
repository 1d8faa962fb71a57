"""Mutants of small kernels: every kind of mistake is found, and by the check that is there for it."""

import pytest

from tests.helpers import metal_host
from tests.meta.mutants import Mutant, verdict
from tests.meta.small_kernels import DEPTHWISE, KERNELS, MATMUL, SOFTMAX, SmallKernel

pytestmark = pytest.mark.skipif(metal_host.unavailable() is not None, reason=str(metal_host.unavailable()))

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

SOFTMAX_MUTANTS = (
    Mutant("no barrier after writing", f"{BARRIER}  // maxima are written", "", "schedule", "order of threads"),
    Mutant("no barrier before writing again", f"{BARRIER}  // maxima are read", "", "schedule", "order of threads"),
    Mutant("no barrier after the sums", f"{BARRIER}  // sums are written", "", "schedule", "order of threads"),
    Mutant("a barrier that orders nothing", f"{BARRIER}  // sums are written",
           "threadgroup_barrier(mem_flags::mem_none);", "launch", "orders no memory"),
    Mutant("barrier in a branch", "  partial[group] = largest;\n",
           f"  partial[group] = largest;\n  {BARRIER}\n", "launch", "threadgroup_barrier at kernel:"),
    Mutant("two barriers for one", f"}}\n{BARRIER}  // sums are written",
           f"  {BARRIER}\n}} else {{\n  {BARRIER}\n}}", "launch", "waits at threadgroup_barrier"),
    Mutant("SIMD function in a branch", "total = simd_sum(total);", "if (lane < 16) total = simd_sum(total);", "launch",
           "while other lanes of the SIMD group"),
    Mutant("different SIMD functions", "largest = simd_max(largest);",
           "largest = lane < 16 ? simd_max(largest) : simd_sum(largest);", "launch", "is in simd_sum"),
    Mutant("early return", "float largest = -INFINITY;", "if (own >= n - 30) return;\nfloat largest = -INFINITY;",
           "launch", "returns while"),
    Mutant("bound off by one", "i < n; i += THREADS) {\n  out[i]", "i <= n; i += THREADS) {\n  out[i]", "launch",
           "out-of-bounds access"),
    Mutant("row of the wrong width", "x + (size_t)threadgroup_position_in_grid.x * n",
           "x + (size_t)threadgroup_position_in_grid.x * (n + 1)", "launch", "input 'x'"),
    Mutant("output unwritten", "int i = own; i < n; i += THREADS) {\n  out[i]",
           "int i = own + 1; i < n; i += THREADS) {\n  out[i]", "schedule", "is never written"),
    Mutant("unwritten threadgroup memory read", "simd_max(lane < GROUPS ? partial[lane] : -INFINITY)",
           "simd_max(((threadgroup float*)partial)[lane])", "launch",
           "threadgroup variable 'partial'"),
    Mutant("index outside of a threadgroup array", "lane < GROUPS ? partial[lane] : 0.0f",
           "lane <= GROUPS ? partial[lane] : 0.0f", "launch", "index 4 is outside of the array at kernel:"),
    Mutant("threadgroup memory too large", "threadgroup float partial[GROUPS];",
           "threadgroup float partial[GROUPS];\nthreadgroup float extra[9000];\nextra[0] = 0.0f;", "launch", "32768"),
    Mutant("write to an input", "  partial[group] = largest;\n",
           "  partial[group] = largest;\n  *(device T*)row = static_cast<T>(0.0f);\n", "launch", "which is read-only"),
    Mutant("endless loop", "i < n; i += THREADS) {\n  total", "i < n; i += 0) {\n  total", "launch", "endless loop"),
    Mutant("division by zero", "const int n = x_shape[1];", "const int n = x_shape[1] / (x_shape[0] - 3);", "launch",
           "division by zero"),
    Mutant("missing cast", "out[i] = static_cast<T>(metal::exp(static_cast<float>(row[i]) - largest) / total);",
           "out[i] = metal::exp(static_cast<float>(row[i]) - largest) / total;", "compile", dtype="bfloat16"),
    Mutant("arguments of two types", "metal::max(largest, static_cast<float>(row[i]))",
           "metal::max(largest, i)", "compile", "ambiguous"),
    Mutant("const taken away", "const device T* row", "device T* row", "compile", "const"),
    Mutant("initialised threadgroup memory", "partial[GROUPS];", "partial[GROUPS] = {0};", "compile", "initialiser"),
    Mutant("maximum of nothing", "float largest = -INFINITY;", "float largest = 200.0f;", "numbers"),
    Mutant("no address space", "const device T* row", "const T* row", "lint", "device"),
    Mutant("the wrong address space", "const device T* row", "const constant T* row", "lint", "device"),
    Mutant("threadgroup memory as a thread's", "  partial[group] = total;",
           "  float* p = partial + group;\n  *p = total;", "lint", "threadgroup"),
    Mutant("a letter beyond ASCII", "float total = 0.0f;", "float total = 0.0f;  // \N{GREEK CAPITAL LETTER SIGMA}",
           "lint", "ASCII"),
)  # fmt: skip

MATMUL_MUTANTS = (
    Mutant("no barrier before filling", f"  {BARRIER}  // tiles are used\n", "", "schedule", "order of threads"),
    Mutant("no barrier after filling", f"  {BARRIER}  // tiles are filled\n", "", "schedule"),
    Mutant("no barrier in the SIMD group", "simdgroup_barrier(mem_flags::mem_threadgroup);\n", "", "schedule"),
    Mutant("barrier outside of the loop's rhythm", f"  {BARRIER}  // tiles are used\n",
           f"  if (group == 0) {BARRIER}\n", "launch", "threadgroup_barrier at kernel:"),
    Mutant("last step dropped", "k < inner; k += STEP", "k + STEP <= inner; k += STEP", "numbers"),
    Mutant("tile filled in part", "i < ROWS * STEP; i += 64", "i < ROWS * STEP; i += 128", "schedule",
           "memory that nobody wrote"),
    Mutant("edge read all the same", "r < inner && c < columns ? b[r * columns + c] : static_cast<T>(0.0f)",
           "b[r * columns + c]", "launch", "input 'b'"),
    Mutant("edge written all the same", "  if (r < rows && c < columns) {", "  if (c < columns) {", "launch",
           "output 'y'"),
    Mutant("tile transposed", "simdgroup_load(right, b_tile, 8);", "simdgroup_load(right, b_tile, 8, 0, true);",
           "numbers"),
    Mutant("rows of the other SIMD group", "a_tile + group * 8 * STEP", "a_tile + (1 - group) * 8 * STEP", "numbers"),
    Mutant("results of all SIMD groups in one place", "results + group * 64", "results", "schedule"),
    Mutant("fragment beyond its tile", "simdgroup_load(right, b_tile, 8);", "simdgroup_load(right, b_tile + 1, 8);",
           "launch", "threadgroup variable 'b_tile'"),
    Mutant("fragment of another type", "simdgroup_matrix<T, 8, 8> left;", "simdgroup_matrix<float, 8, 8> left;",
           "compile", dtype="float16"),
    Mutant("sums in half", "simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);",
           "simdgroup_matrix<T, 8, 8> sum = make_filled_simdgroup_matrix<T, 8, 8>(static_cast<T>(0.0f));",
           "compile", dtype="float16"),
    Mutant("fragments in a branch", "  simdgroup_multiply_accumulate(sum, left, right, sum);",
           "  if (lane < 16) simdgroup_multiply_accumulate(sum, left, right, sum);", "launch",
           "while other lanes of the SIMD group"),
    Mutant("store in the wrong address space", "threadgroup float* block", "device float* block", "lint",
           "threadgroup"),
)  # fmt: skip

DEPTHWISE_MUTANTS = (
    Mutant("residual dropped", "float sum = static_cast<float>(own[place]);", "float sum = 0.0f;", "numbers"),
    Mutant("mask of the inputs dropped", "s < rows && mask[item * rows + s])", "s < rows)", "numbers"),
    Mutant("mask of the output dropped", "mask[item * rows + t] ? sum : 0.0f", "sum", "numbers"),
    Mutant("mask of the neighbour", "mask[item * rows + t] ? sum", "mask[item * rows + (t + 1) % rows] ? sum",
           "numbers"),
    Mutant("mask of the first item", "mask[item * rows + s])", "mask[s])", "numbers"),
    Mutant("left context off by one", "t + k - LEFT", "t + k - LEFT + 1", "numbers"),
    Mutant("lower bound dropped", "s >= 0 && s < rows && mask[item * rows + s]", "s < rows", "launch", "byte -"),
    Mutant("upper bound dropped", "s < rows && mask[item * rows + s]", "s <= rows", "launch", "input 'x'"),
    Mutant("taps past the end", "w[c * TAPS + k]", "w[c * TAPS + k + 1]", "launch", "input 'w'"),
    Mutant("columns unchecked", "if (c < columns && t < rows) {", "if (c < columns) {", "launch", "out-of-bounds"),
    Mutant("output unwritten", "  y[(size_t)item", "  if (mask[item * rows + t]) y[(size_t)item", "schedule",
           "is never written"),
    Mutant("missing cast", "static_cast<T>(mask[item * rows + t] ? sum : 0.0f)", "mask[item * rows + t] ? sum : 0.0f",
           "compile", dtype="bfloat16"),
    Mutant("taps of the neighbour", "w[c * TAPS + k]", "w[(c ^ 1) * TAPS + k]", "numbers"),
)  # fmt: skip

PLANTED = [
    pytest.param(kernel, mutant, id=f"{kernel.name}: {mutant.name} - {mutant.killed_by}")
    for kernel, mutants in (
        (SOFTMAX, SOFTMAX_MUTANTS),
        (MATMUL, MATMUL_MUTANTS),
        (DEPTHWISE, DEPTHWISE_MUTANTS),
    )
    for mutant in mutants
]


def judge(kernel: SmallKernel, dtype: str) -> tuple[str, str]:
    """Hold a small kernel against all checks."""
    built = kernel.build()
    return verdict(
        lambda: kernel.call(built, dtype),
        lambda result: kernel.problem(result, dtype),
        lambda: [kernel.text(dtype)],
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_the_kernel_itself_survives(kernel, dtype):
    assert judge(kernel, dtype) == ("none", "")


@pytest.mark.parametrize(("kernel", "mutant"), PLANTED)
def test_a_mutant_is_killed(kernel, mutant, monkeypatch):
    monkeypatch.setattr(metal_host.engine_library, "LIMIT_SECONDS", 2)  # for the endless loop
    if mutant.killed_by == "lint" and (reason := metal_host.lint_unavailable()):
        pytest.skip(reason)
    killer, message = judge(kernel.with_source(mutant.plant(kernel.source)), mutant.dtype)
    assert (killer, mutant.says in message) == (mutant.killed_by, True), message
