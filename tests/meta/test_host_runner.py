"""The host runner itself: that Metal's words mean on the CPU what Apple's specification says they mean."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import metal_host

pytestmark = pytest.mark.skipif(metal_host.unavailable() is not None, reason=str(metal_host.unavailable()))

ROOT = Path(__file__).resolve().parents[2]
LANES = 32


def run(
    source: str,
    x: np.ndarray,
    shape: tuple[int, ...],
    *,
    dtype: mx.Dtype = mx.float32,
    grid: tuple[int, int, int] = (LANES, 1, 1),
    threadgroup: tuple[int, int, int] = (LANES, 1, 1),
    header: str = "",
    **options: object,
) -> np.ndarray:
    """Launch a kernel of `x` and an output `y`, and return `y`."""
    kernel = metal_host.metal_kernel("sample", ["x"], ["y"], source, header)
    launch = {"grid": grid, "threadgroup": threadgroup, "output_shapes": [shape], "output_dtypes": [dtype]}
    return np.array(kernel(inputs=[mx.array(x)], **launch, **options)[0])


# --- SIMD groups --------------------------------------------------------------------------------------------------

LANE = "const uint lane = thread_index_in_simdgroup;\nconst float v = x[lane];\n"
VALUES = np.random.default_rng(0).permutation(LANES).astype(np.float32) + 1
EARLIER = np.concatenate([[0], np.cumsum(VALUES)[:-1]])

SIMD = {
    "simd_sum(v)": np.full(LANES, VALUES.sum()),
    "simd_max(v)": np.full(LANES, 32),
    "simd_min(v)": np.full(LANES, 1),
    "simd_product(lane == 3 ? 5.0f : 1.0f)": np.full(LANES, 5),
    "simd_prefix_exclusive_sum(v)": EARLIER,
    "simd_prefix_inclusive_sum(v)": EARLIER + VALUES,
    "simd_broadcast(v, 9)": np.full(LANES, VALUES[9]),
    "simd_broadcast_first(v)": np.full(LANES, VALUES[0]),
    "simd_shuffle(v, (lane * 7 + 3) % 32)": VALUES[(np.arange(LANES) * 7 + 3) % LANES],
    "simd_shuffle_xor(v, 5)": VALUES[np.arange(LANES) ^ 5],
    "simd_shuffle_down(v, 3)": np.concatenate([VALUES[3:], VALUES[-3:]]),  # the last lanes keep their own
    "simd_shuffle_up(v, 3)": np.concatenate([VALUES[:3], VALUES[:-3]]),
    "simd_shuffle_and_fill_down(v, 0.5f, 3)": np.concatenate([VALUES[3:], [0.5] * 3]),
    "simd_shuffle_and_fill_up(v, 0.5f, 3)": np.concatenate([[0.5] * 3, VALUES[:-3]]),
    "simd_shuffle_rotate_down(v, 1)": np.roll(VALUES, -1),
    "simd_any(v > 31.0f) ? 1.0f : 0.0f": np.ones(LANES),
    "simd_all(v > 31.0f) ? 1.0f : 0.0f": np.zeros(LANES),
    "float(uint(uint64_t(simd_ballot(v > 16.0f))) >> lane & 1u)": (VALUES > 16).astype(np.float32),
    "simd_is_first() ? 1.0f : 0.0f": np.eye(LANES)[0],
    "quad_sum(v)": np.repeat(VALUES.reshape(8, 4).sum(axis=1), 4),
    "quad_broadcast(v, 1)": np.repeat(VALUES.reshape(8, 4)[:, 1], 4),
}


@pytest.mark.parametrize("call", list(SIMD))
def test_lanes_exchange_values(call):
    found = run(f"{LANE}y[lane] = {call};", VALUES, (LANES,))
    assert found.tolist() == SIMD[call].tolist()


def test_a_shuffle_from_a_lane_that_is_not_there_is_undefined():
    kernel = metal_host.metal_kernel("sample", ["x"], ["y"], f"{LANE}y[lane] = simd_shuffle(v, lane + 2);")
    launch = {"grid": (LANES, 1, 1), "threadgroup": (LANES, 1, 1)}
    with pytest.raises(metal_host.ScheduleError, match=r"element \(30,\) of output 'y'"):
        metal_host.verify(
            lambda: kernel(inputs=[mx.array(VALUES)], output_shapes=[(LANES,)], output_dtypes=[mx.float32], **launch)
        )


@given(st.integers(1, 70), st.integers(1, 4))
def test_a_simd_group_may_end_early(threads, per_row):
    """The last one of a threadgroup has fewer lanes where the threadgroup, or the grid, is no multiple of 32."""
    source = """
    const uint own = thread_position_in_grid.x;
    y[own * PER_ROW + thread_position_in_grid.y] = simd_sum(1.0f);
    """
    found = run(
        source, VALUES, (threads, per_row), grid=(threads, per_row, 1), threadgroup=(48, 1, 1),
        template=[("PER_ROW", per_row)],
    )  # fmt: skip
    own = np.arange(threads)
    group, place = own // 48, own % 48
    lanes = np.minimum(np.minimum(48, threads - 48 * group) - place // 32 * 32, 32)
    assert np.array_equal(found, np.repeat(lanes[:, None], per_row, axis=1))


# --- Matrices of SIMD groups --------------------------------------------------------------------------------------

MATRICES = """
threadgroup T tile[3 * 64];
const uint lane = thread_index_in_simdgroup;
for (uint i = lane; i < 128; i += 32) {
  tile[i] = static_cast<T>(x[i]);
}
simdgroup_barrier(mem_flags::mem_threadgroup);
simdgroup_matrix<T, 8, 8> a, b;
simdgroup_matrix<float, 8, 8> c = make_filled_simdgroup_matrix<float, 8, 8>(0.5f);
simdgroup_load(a, tile, 8);
simdgroup_load(b, tile, 8, ulong2(0, 8), TURNED);
simdgroup_multiply_accumulate(c, a, b, c);
simdgroup_store(c, y, 8);
"""


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_matrices_multiply(dtype, turned):
    x = np.random.default_rng(1).integers(-4, 5, (2, 8, 8)).astype(np.float32)  # exact in every type
    found = run(MATRICES, x, (8, 8), template=[("T", dtype), ("TURNED", turned)])
    assert np.array_equal(found, x[0] @ (x[1].T if turned else x[1]) + 0.5)


def test_elements_lie_where_apple_gpus_hold_them():
    source = """
    const uint lane = thread_index_in_simdgroup;
    simdgroup_matrix<float, 8, 8> a;
    simdgroup_load(a, x, 8);
    y[2 * lane] = a.thread_elements()[0];
    y[2 * lane + 1] = a.thread_elements()[1];
    """
    found = run(source, np.arange(64, dtype=np.float32), (LANES, 2))
    lane = np.arange(LANES)
    row, column = (lane // 4 & 4) + lane // 2 % 4, (lane // 4 & 2) * 2 + lane % 2 * 2
    assert np.array_equal(found[:, 0], 8 * row + column)
    assert np.array_equal(found[:, 1], found[:, 0] + 1)


# --- Threads, memory, numbers -------------------------------------------------------------------------------------


@given(st.tuples(*[st.integers(1, 9)] * 3), st.sampled_from([(1, 1, 1), (4, 2, 1), (3, 5, 2), (32, 1, 1)]))
def test_every_thread_of_the_grid_runs_once_and_knows_its_place(grid, threadgroup):
    source = """
    const uint3 p = thread_position_in_grid;
    const uint3 size = threads_per_grid;
    const uint3 own = thread_position_in_threadgroup;
    const uint3 group = threads_per_threadgroup;  // smaller at the end of the grid
    const uint3 there = threadgroup_position_in_grid * dispatch_threads_per_threadgroup + own;
    const bool placed = there.x == p.x && there.y == p.y && there.z == p.z;
    const bool counted = thread_index_in_threadgroup == (own.z * group.y + own.y) * group.x + own.x;
    const bool fits = group.x == metal::min((uint)x[0], size.x - (p.x - own.x));
    y[(p.z * size.y + p.y) * size.x + p.x] = placed && counted && fits ? 1 : 0;
    """
    found = run(source, np.array(threadgroup, np.int32), grid[::-1], dtype=mx.int32, grid=grid, threadgroup=threadgroup)
    assert found.all()


def test_atomics_add_up():
    source = """
    threadgroup atomic_uint count;
    if (thread_index_in_threadgroup == 0) atomic_store_explicit(&count, 0u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    atomic_fetch_add_explicit(&count, (uint)x[thread_index_in_threadgroup], memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (thread_index_in_threadgroup == 0) {
      y[threadgroup_position_in_grid.x] = atomic_load_explicit(&count, memory_order_relaxed);
    }
    """
    x = np.arange(96, dtype=np.uint32)
    found = run(source, x, (3,), dtype=mx.uint32, grid=(288, 1, 1), threadgroup=(96, 1, 1))
    assert found.tolist() == [x.sum()] * 3


def test_an_output_may_start_out_filled():
    assert run("if (thread_position_in_grid.x == 1) y[1] = x[0];", np.array([2.0]), (4,), init_value=7).tolist() == [
        7, 2, 7, 7,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_halves_round_to_nearest_even(dtype):
    x = np.random.default_rng(2).standard_normal(256).astype(np.float32) * 2.0 ** np.arange(-32, 32).repeat(4)
    x[:4] = 2049, 2051, 65520, 1e-8
    source = "const uint i = thread_position_in_grid.x;\ny[i] = static_cast<float>(static_cast<T>(x[i]));"
    found = run(source, x, (256,), grid=(256, 1, 1), template=[("T", dtype)])
    assert np.array_equal(found, np.array(mx.array(x).astype(dtype).astype(mx.float32)))


def test_half_arithmetic_rounds_after_every_operation():
    source = "const half a = static_cast<half>(x[0]);\ny[0] = (a + 1.0h) + 1.0h;\ny[1] = float(a) + 2.0f;"
    found = run(source, np.array([2048.0], np.float32), (2,), grid=(1, 1, 1))
    assert found.tolist() == [2048.0, 2050.0]


@pytest.mark.parametrize(
    ("call", "function"),
    [
        ("metal::exp(v)", np.exp),
        ("metal::exp2(v)", np.exp2),
        ("metal::log(metal::abs(v))", lambda v: np.log(np.abs(v))),
        ("metal::rsqrt(metal::abs(v))", lambda v: np.abs(v) ** -0.5),
        ("metal::tanh(v)", np.tanh),
        ("metal::sin(v)", np.sin),
        ("metal::cos(v)", np.cos),
        ("metal::rint(v)", np.rint),
        ("metal::fma(v, v, 1.0f)", lambda v: v * v + 1),
        ("metal::clamp(v, -1.0f, 1.0f)", lambda v: np.clip(v, -1, 1)),
        ("metal::select(v, 9.0f, v > 0.0f)", lambda v: np.where(v > 0, 9, v)),
        ("metal::precise::exp(v)", np.exp),
        ("metal::fast::exp(v)", np.exp),
        ("helper(v)", lambda v: 2 * v),
    ],
)
def test_functions_are_as_exact_as_float32(call, function):
    x = np.random.default_rng(3).standard_normal(64).astype(np.float32) * 4
    source = f"const float v = x[thread_position_in_grid.x];\ny[thread_position_in_grid.x] = {call};"
    found = run(source, x, (64,), grid=(64, 1, 1), header="inline float helper(float v) { return v + v; }")
    wanted = function(x.astype(np.float64))
    assert (np.abs(found - wanted) <= 2.0**-22 * np.maximum(np.abs(wanted), 1e-3)).all()


def test_strided_inputs_come_as_they_lie_when_asked():
    source = """
    const uint i = thread_position_in_grid.x;
    y[i] = x[i / x_shape[1] * x_strides[0] + i % x_shape[1] * x_strides[1]];
    """
    x = mx.arange(24.0).reshape(4, 6)[::2, 1::2]
    launch = {"grid": (6, 1, 1), "threadgroup": (6, 1, 1), "output_shapes": [(2, 3)], "output_dtypes": [mx.float32]}
    for contiguous in (False, True):
        kernel = metal_host.metal_kernel("sample", ["x"], ["y"], source, ensure_row_contiguous=contiguous)
        assert kernel(inputs=[x], **launch)[0].tolist() == x.tolist()


def test_a_launch_is_counted():
    source = """
    threadgroup float t[8];
    t[0] = 0.0f;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[0] = simd_sum(1.0f);
    """
    kernel = metal_host.metal_kernel("sample", ["x"], ["y"], source)
    launch = {"grid": (64, 1, 1), "threadgroup": (64, 1, 1), "output_shapes": [(1,)], "output_dtypes": [mx.float32]}
    kernel(inputs=[mx.zeros(3)], **launch)
    counted = kernel.statistics
    assert (counted.threads, counted.barriers, counted.simd_calls, counted.threadgroup_bytes) == (64, 64, 64, 32)
    assert "custom_kernel_sample" in kernel.text


# --- The portable engine ------------------------------------------------------------------------------------------

PORTABLE = """
from tests.helpers import metal_host
from tests.meta import test_small_mutants as small
print(metal_host.engine_library.fibers())
print(small.judge(small.SOFTMAX, "float32"))
mutant = small.SOFTMAX_MUTANTS[0]
print(small.judge(small.SOFTMAX.with_source(mutant.plant(small.SOFTMAX.source)), "float32")[0])
"""


def test_threads_switch_without_assembly_too(tmp_path):
    settings = {"METAL_HOST_FLAGS": "-DMETAL_HOST_UCONTEXT", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", PORTABLE]
    done = subprocess.run(command, env=os.environ | settings, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split("\n") == ["ucontext", "('none', '')", "schedule", ""], done.stderr


def test_processors_with_assembly_use_it():
    machine = os.uname().machine
    known = {"x86_64": "x86-64", "arm64": "arm64", "aarch64": "arm64"}
    if "METAL_HOST_FLAGS" not in os.environ:
        assert metal_host.engine_library.fibers() == known.get(machine, "ucontext")
