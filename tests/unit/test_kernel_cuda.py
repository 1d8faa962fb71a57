"""The CUDA form of the kernels: what the conversion writes, that it compiles, and, run on the CPU, what it computes.

Three levels, each said by its tests: text (always), compiled for GPUs that need not be here (NVRTC or nvcc), run by
fibers on the CPU (g++). HYPOTHESIS_PROFILE=many takes all cases to machine code and through the last level, instead of
one of each kernel.
"""

import os

import mlx.core as mx
import numpy as np
import pytest

from qwen4b_asr.kernels import NAMES, operations
from qwen4b_asr.kernels._contract import parse_contract
from qwen4b_asr.kernels._cuda import to_cuda
from qwen4b_asr.kernels._loader import override
from qwen4b_asr.kernels._selfcheck import compare
from tests.helpers import cuda_host, cuda_text
from tests.helpers.cuda_host import HostCuda
from tests.helpers.cuda_text import Recorder

MANY = os.environ.get("HYPOTHESIS_PROFILE") == "many"
needs_compiler = pytest.mark.skipif(cuda_text.compiler() is None, reason=f"CUDA compile check needs {cuda_text.NEEDS}")
needs_host = pytest.mark.skipif(not cuda_host.available(), reason=f"running CUDA on the CPU needs {cuda_host.NEEDS}")

CONTRACT = parse_contract("""\
// kernel: sample
// computes: nothing in particular
// inputs:
//   x (N, M) T
//   scale () float32
// outputs:
//   y (N, M) float32
// template:
//   T dtype float32|float16|bfloat16
// grid: 1
// threadgroup: 32
// vjp: reference
""")


def convert(body: str, header: str = "") -> tuple[str, str]:
    """The converted header, without the prelude, and body; blanks made one."""
    cuda_header, source = to_cuda(header, body, CONTRACT)
    prelude, _ = to_cuda("", "", CONTRACT)
    return " ".join(cuda_header.removeprefix(prelude.rstrip("\n")).split()), " ".join(source.split())


# --- Text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("threadgroup float a[32 * K], b[2];", "__shared__ float a[32 * K], b[2];"),
        ("threadgroup T tile[8][9];", "__shared__ T tile[8][9];"),
        ("threadgroup atomic_uint n;", "__shared__ atomic_uint n;"),
        ("threadgroup T* p = tile;", "T* p = tile;"),
        ("const device T* p = x;", "const T* p = x;"),
        ("device const T& p = x[0];", "const T& p = x[0];"),
        ("auto p = (const constant int*)q;", "auto p = (const int*)q;"),
        ("int device_count = thread; // a thread of its own", "int device_count = thread; //"),
    ],
)
def test_address_spaces_go_and_shared_memory_stays(body, wanted):
    assert wanted in convert(body)[1]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("thread_position_in_grid", "const uint3 thread_position_in_grid = make_uint3("),
        ("threadgroup_position_in_grid", "const uint3 threadgroup_position_in_grid = blockIdx;"),
        ("thread_index_in_simdgroup", "const uint thread_index_in_simdgroup = (("),
    ],
)
def test_ids_are_bound_where_they_are_used_and_nowhere_else(name, wanted):
    assert wanted in convert(f"int i = {name}.x;")[1]
    assert wanted not in convert(f"int i = 0;  // {name}")[1]
    assert wanted not in convert(f"int my_{name} = 0;")[1]


@pytest.mark.parametrize("name", ["threads_per_grid", "quadgroup_index_in_threadgroup"])
def test_what_cuda_cannot_tell_is_refused(name):
    with pytest.raises(ValueError, match=rf"\[sample\] the body must do without {name}"):
        convert(f"int n = {name}.x;")
    convert(f"int n = 0;  // not {name}")


def test_zero_d_inputs_are_pointers_and_shapes_arrays_in_cuda():
    body = convert("y[0] = x[x_strides[1]] * scale * x_shape[0];")[1]
    assert "const auto* const scale_pointer = scale;" in body.partition("{")[0]
    assert "const auto& scale = *scale_pointer;" in body.partition("{")[2]
    assert "x_shape_pointer = x_shape.data();" in body.partition("{")[0]
    assert "const auto* const x_strides = x_strides_pointer;" in body.partition("{")[2]
    assert "_shape" not in convert("y[0] = x[0];")[1]


def test_helpers_run_on_the_device():
    header, _ = convert(
        "y[0] = 0;",
        "inline float f(device const float* p) { return p[0]; }\nstatic inline int g() { return 1; }\n"
        "constant float TABLE[2] = {1, 2};\nconstant constexpr int N = 3;\n"
        "template <typename T>\nMETAL_FUNC T h(T x) { return x; }\n",
    )
    assert "__device__ inline float f(const float* p)" in header
    assert "__device__ static inline int g()" in header
    assert "__constant__ const float TABLE[2]" in header
    assert "constexpr int N = 3;" in header
    assert "METAL_FUNC T h(T x)" in header


# --- Compiled -----------------------------------------------------------------------------------------------------


def record(name: str, first: int | None = None) -> list[cuda_text.Text]:
    """The texts of an operation's launches in every type, of all its small cases or of the first few."""
    operation, recorder = operations()[name], Recorder()
    cases = [case for case in operation.cases if case.roles & {"check", "test"}]
    with override("cuda", recorder):
        for case in cases[:first]:
            for dtype in case.dtypes:
                operation.kernel(**case.arguments(dtype))
    return list(recorder.texts.values())


@needs_compiler
def test_every_text_compiles():
    texts = [text for name in NAMES for text in record(name)]
    assert len(texts) >= 60
    # One unit for all: reading CUDA's own headers takes longer than most kernels.
    assert cuda_text.compile_texts(texts, ("80",), machine_code=False) == ""


@needs_compiler
def test_every_kernel_becomes_machine_code_for_ampere_and_hopper():
    texts = [text for name in NAMES for text in record(name, None if MANY else 1)]
    if not MANY:  # attention is unrolled far: one text of it is heavy enough
        texts = [text for text in texts if "_attention_" not in text.name or "_bfloat16_" in text.name]
    assert len(texts) >= 3 * (len(NAMES) - 1) + 1
    assert cuda_text.compile_texts(texts, ("80", "90")) == ""


VOCABULARY = """
threadgroup T tile[64];
threadgroup atomic_uint count;
const uint lane = thread_index_in_simdgroup;
const uint n = thread_position_in_threadgroup.x;
if (n == 0) { atomic_store_explicit(&count, 0u, memory_order_relaxed); }
tile[n] = static_cast<T>(metal::fast::exp(metal::clamp(static_cast<float>(x[n]), -1.0f, 1.0f)));
tile[n + 32] = metal::max(metal::min(tile[n], static_cast<T>(2.0f)), metal::sqrt(metal::abs(tile[n])));
threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
simdgroup_matrix<T, 8, 8> a, b(static_cast<T>(1.0f));
simdgroup_float8x8 c = make_filled_simdgroup_matrix<float, 8, 8>(0.5f);
simdgroup_load(a, tile, 8);
simdgroup_load(b, tile, 4, ulong2{0, 1}, true);
simdgroup_multiply_accumulate(c, a, b, c);
simdgroup_multiply(c, c, b);
simdgroup_store(c, y, 8);
simdgroup_barrier(mem_flags::mem_none);
float s = simd_sum(c.thread_elements()[0]) + simd_prefix_exclusive_sum(float(lane)) + helper(2.0f, x);
s += simd_broadcast_first(simd_shuffle_down(s, 1)) + simd_max(static_cast<float>(tile[n])) + popcount(lane);
s += float(simd_min(tile[n])) + metal::precise::log(s) + metal::isnan(s) + (simd_any(s > 3.0f) ? INFINITY : scale);
atomic_fetch_add_explicit(&count, 1u, memory_order_relaxed);
atomic_fetch_max_explicit(&count, as_type<uint>(s), memory_order_relaxed);
y[n] = s + atomic_load_explicit(&count, memory_order_relaxed) + select(0.0f, 1.0f, lane < 3);
""".replace("popcount", "metal::popcount")
HELPERS = "template <typename U>\nMETAL_FUNC float helper(float v, const device U* p) { return v + float(p[0]); }\n"


def sample(source: str, header: str, dtype: mx.Dtype) -> tuple[Recorder, cuda_text.Text]:
    """The text of a sample kernel."""
    recorder = Recorder()
    cuda_header, body = to_cuda(header, source, CONTRACT)
    kernel = recorder(name="sample", input_names=["x", "scale"], output_names=["y"], source=body, header=cuda_header)
    kernel(inputs=[mx.zeros((8, 8), dtype), mx.array(1.0)], output_shapes=[(8, 8)], output_dtypes=[mx.float32],
           grid=(32, 1, 1), threadgroup=(32, 1, 1), template=[("T", dtype)])  # fmt: skip
    (text,) = recorder.texts.values()
    return recorder, text


@needs_compiler
def test_the_whole_vocabulary_compiles():
    texts = [sample(VOCABULARY, HELPERS, dtype)[1] for dtype in (mx.float32, mx.float16, mx.bfloat16)]
    assert cuda_text.compile_texts(texts, ("75", "90")) == ""


@needs_compiler
def test_an_error_in_a_body_is_seen():
    assert "error" in cuda_text.compile_texts([sample("y[0] = nonsense;", "", mx.float32)[1]], ("80",))


# --- Run on the CPU -----------------------------------------------------------------------------------------------


@needs_host
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"] if MANY else ["float32", "bfloat16"])
def test_the_converted_kernel_computes_what_the_plain_operations_do(name, dtype):
    operation = operations()[name]
    cases = [case for case in operation.cases if case.roles & {"check", "test"} and dtype in case.dtypes]
    assert cases
    for case in cases if MANY else cases[:1]:
        arguments = case.arguments(dtype)
        wide = {n: v.astype(mx.float32) if _is_float(v) else v for n, v in arguments.items()}
        with override("cuda", HostCuda()):
            actual = _as_list(operation.kernel(**arguments))
        plain, exact = (_as_list(operation.reference(**a)) for a in (arguments, wide))
        assert [compare(*trio) for trio in zip(actual, plain, exact, strict=True)] == [None] * len(plain), case.name


def _is_float(value: object) -> bool:
    return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)


def _as_list(value):
    return [value] if isinstance(value, mx.array) else list(value)


MATMUL = """
simdgroup_matrix<T, 8, 8> a, b;
simdgroup_float8x8 c = make_filled_simdgroup_matrix<float, 8, 8>(scale);
simdgroup_load(a, x, 8);
simdgroup_load(b, x, 8, 0, true);
simdgroup_multiply_accumulate(c, a, b, c);
simdgroup_store(c, y, 8, 0, true);
"""


def run_sample(source: str, x: mx.array) -> np.ndarray:
    header, body = to_cuda("", source, CONTRACT)
    kernel = HostCuda()(name="sample", input_names=["x", "scale"], output_names=["y"], source=body, header=header)
    (y,) = kernel(inputs=[x, mx.array(0.5)], output_shapes=[x.shape], output_dtypes=[mx.float32], grid=(32, 1, 1),
                  threadgroup=(32, 1, 1), template=[("T", x.dtype)])  # fmt: skip
    return np.array(y)


@needs_host
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_matrices_multiply_without_loss(dtype):
    x = mx.array(np.random.default_rng(0).standard_normal((8, 8)) * 10.0 ** np.arange(-4, 4)).astype(dtype)
    wide = np.array(x.astype(mx.float32)).astype(np.float64)
    exact = (wide @ wide.T + 0.5).T
    bound = 4 * np.finfo(np.float32).eps * (np.abs(wide) @ np.abs(wide.T) + 0.5)
    assert (np.abs(run_sample(MATMUL, x) - exact) <= bound).all()


@needs_host
def test_infinity_stays_infinity_in_a_product():
    x = np.ones((8, 8), np.float32)
    x[2, 3] = np.inf
    y = run_sample(MATMUL, mx.array(x))
    assert np.isposinf(y[2]).all()
    assert np.isposinf(y[:, 2]).all()
    assert (np.delete(np.delete(y, 2, 0), 2, 1) == 8.5).all()


PREFIXES = "const float v = x[thread_index_in_simdgroup];\n" + "\n".join(
    f"y[32 * {i} + thread_index_in_simdgroup] = {call};"
    for i, call in enumerate(["simd_prefix_inclusive_sum(v)", "simd_prefix_exclusive_sum(v)"])
)


@needs_host
def test_prefix_sums():
    x = np.arange(64, dtype=np.float32).reshape(8, 8)
    inclusive = np.cumsum(x.ravel()[:32])
    y = run_sample(PREFIXES, mx.array(x)).ravel()
    assert y[:32].tolist() == inclusive.tolist()
    assert y[32:].tolist() == [0, *inclusive[:-1]]
