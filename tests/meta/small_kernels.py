"""Three small kernels to plant mutants in: between them they use all that the project's kernels use.

Each is correct. They are written for these tests alone and compute textbook operations, so that what goes wrong with a
mutant is plain to see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from tests.helpers import metal_host

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


@dataclass(frozen=True)
class SmallKernel:
    """A kernel with one way of launching it and its exact result.

    Attributes:
        name: Its name.
        source: Its body.
        inputs: Names of its inputs, and NumPy arrays to launch it on; float arrays take the element type of the run.
        exact: The result in float64, from the inputs as the kernel sees them.
        grid: Threads along each axis.
        threadgroup: Threads of a threadgroup along each axis.
        template: Template arguments besides T.
        tolerance: Error allowed, in units of the type's precision times the largest value of the result.
    """

    name: str
    source: str
    inputs: dict[str, np.ndarray]
    exact: Callable[..., np.ndarray]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    template: tuple[tuple[str, Any], ...] = ()
    tolerance: float = 8.0

    def with_source(self, source: str) -> SmallKernel:
        """Return the same kernel with another body."""
        return replace(self, source=source)

    def arrays(self, dtype: str) -> list[mx.array]:
        """Return the inputs in an element type."""
        return [
            mx.array(value).astype(DTYPES[dtype]) if value.dtype == np.float32 else mx.array(value)
            for value in self.inputs.values()
        ]

    def build(self) -> metal_host.HostKernel:
        """Return the kernel as the host runs it."""
        return metal_host.metal_kernel(self.name, list(self.inputs), ["y"], self.source)

    def call(self, kernel: Any, dtype: str) -> mx.array:
        """Launch it."""
        shape = self._exact(dtype).shape
        return kernel(
            inputs=self.arrays(dtype),
            template=[("T", DTYPES[dtype]), *self.template],
            grid=self.grid,
            threadgroup=self.threadgroup,
            output_shapes=[shape],
            output_dtypes=[DTYPES[dtype]],
        )[0]

    def text(self, dtype: str) -> str:
        """Return the Metal text that MLX generates for the launch."""
        kernel = mx.fast.metal_kernel(
            name=self.name, input_names=list(self.inputs), output_names=["y"], source=self.source
        )
        return metal_host.capture(
            kernel,
            self.arrays(dtype),
            template=[("T", DTYPES[dtype]), *self.template],
            grid=self.grid,
            threadgroup=self.threadgroup,
            output_shapes=[self._exact(dtype).shape],
            output_dtypes=[DTYPES[dtype]],
        )

    def problem(self, found: mx.array, dtype: str) -> str | None:
        """Return what is wrong with a result, or None."""
        wanted = self._exact(dtype)
        error = np.abs(np.array(found.astype(mx.float32)).astype(np.float64) - wanted)
        allowed = self.tolerance * EPSILON[dtype] * float(np.abs(wanted).max())
        # not `max(error) > allowed`, which a NaN would pass
        return None if bool((error <= allowed).all()) else f"error {error.max():.3g}, allowed {allowed:.3g}"

    def _exact(self, dtype: str) -> np.ndarray:
        return self.exact(*(np.array(x.astype(mx.float32)).astype(np.float64) for x in self.arrays(dtype)))


def _values(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


# --- Softmax of rows: reductions over a threadgroup, barriers -----------------------------------------------------

SOFTMAX_SOURCE = """
constexpr int GROUPS = THREADS / 32;
threadgroup float partial[GROUPS];
const uint lane = thread_index_in_simdgroup;
const uint group = simdgroup_index_in_threadgroup;
const int own = thread_position_in_threadgroup.x;
const int n = x_shape[1];
const device T* row = x + (size_t)threadgroup_position_in_grid.x * n;
device T* out = y + (size_t)threadgroup_position_in_grid.x * n;

float largest = -INFINITY;
for (int i = own; i < n; i += THREADS) {
  largest = metal::max(largest, static_cast<float>(row[i]));
}
largest = simd_max(largest);
if (lane == 0) {
  partial[group] = largest;
}
threadgroup_barrier(mem_flags::mem_threadgroup);  // maxima are written
largest = simd_max(lane < GROUPS ? partial[lane] : -INFINITY);

float total = 0.0f;
for (int i = own; i < n; i += THREADS) {
  total += metal::exp(static_cast<float>(row[i]) - largest);
}
total = simd_sum(total);
threadgroup_barrier(mem_flags::mem_threadgroup);  // maxima are read
if (lane == 0) {
  partial[group] = total;
}
threadgroup_barrier(mem_flags::mem_threadgroup);  // sums are written
total = simd_sum(lane < GROUPS ? partial[lane] : 0.0f);

for (int i = own; i < n; i += THREADS) {
  out[i] = static_cast<T>(metal::exp(static_cast<float>(row[i]) - largest) / total);
}
"""


def _softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


SOFTMAX = SmallKernel(
    "softmax", SOFTMAX_SOURCE, {"x": _values(1, 3, 150, scale=3.0)}, _softmax, (3 * 128, 1, 1), (128, 1, 1),
    (("THREADS", 128),),
)  # fmt: skip

# --- Tiled matrix product: threadgroup tiles, simdgroup_matrix, ragged edges --------------------------------------

# y = a b. A threadgroup of two SIMD groups computes 16 rows by 8 columns; each SIMD group 8 of the rows.
MATMUL_SOURCE = """
constexpr int ROWS = 16;
constexpr int STEP = 8;
threadgroup T a_tile[ROWS * STEP];
threadgroup T b_tile[STEP * 8];
threadgroup float results[ROWS * 8];
const int lane = thread_index_in_simdgroup;
const int group = simdgroup_index_in_threadgroup;
const int own = thread_position_in_threadgroup.x;
const int first_row = threadgroup_position_in_grid.y * ROWS;
const int first_column = threadgroup_position_in_grid.x * 8;
const int rows = a_shape[0];
const int inner = a_shape[1];
const int columns = b_shape[1];

simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
simdgroup_matrix<T, 8, 8> left;
simdgroup_matrix<T, 8, 8> right;
for (int k = 0; k < inner; k += STEP) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // tiles are used
  for (int i = own; i < ROWS * STEP; i += 64) {
    const int r = first_row + i / STEP;
    const int c = k + i % STEP;
    a_tile[i] = r < rows && c < inner ? a[r * inner + c] : static_cast<T>(0.0f);
  }
  for (int i = own; i < STEP * 8; i += 64) {
    const int r = k + i / 8;
    const int c = first_column + i % 8;
    b_tile[i] = r < inner && c < columns ? b[r * columns + c] : static_cast<T>(0.0f);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // tiles are filled
  simdgroup_load(left, a_tile + group * 8 * STEP, STEP);
  simdgroup_load(right, b_tile, 8);
  simdgroup_multiply_accumulate(sum, left, right, sum);
}
threadgroup float* block = results + group * 64;
simdgroup_store(sum, block, 8);
simdgroup_barrier(mem_flags::mem_threadgroup);
for (int i = lane; i < 64; i += 32) {
  const int r = first_row + group * 8 + i / 8;
  const int c = first_column + i % 8;
  if (r < rows && c < columns) {
    y[r * columns + c] = static_cast<T>(block[i]);
  }
}
"""

MATMUL = SmallKernel(
    "matmul",
    MATMUL_SOURCE,
    {"a": _values(2, 21, 29) + 2.0, "b": _values(3, 29, 13) + 2.0},  # sums that only float32 holds to half's precision
    lambda a, b: a @ b,
    (2 * 64, 2, 1),
    (64, 1, 1),
)

# --- Depthwise convolution: masks, bounds, a residual -------------------------------------------------------------

# y[b, t, c] = mask[b, t] ? x + sum_k w[c, k] x[b, t + k - LEFT, c] : 0, over unmasked rows of x.
DEPTHWISE_SOURCE = """
const int c = thread_position_in_grid.x;
const int t = thread_position_in_grid.y;
const int item = thread_position_in_grid.z;
const int rows = x_shape[1];
const int columns = x_shape[2];
if (c < columns && t < rows) {
  const device T* own = x + (size_t)item * rows * columns;
  const size_t place = (size_t)t * columns + c;
  float sum = static_cast<float>(own[place]);
  for (int k = 0; k < TAPS; k++) {
    const int s = t + k - LEFT;
    if (s >= 0 && s < rows && mask[item * rows + s]) {
      sum += static_cast<float>(w[c * TAPS + k]) * static_cast<float>(own[(size_t)s * columns + c]);
    }
  }
  y[(size_t)item * rows * columns + place] = static_cast<T>(mask[item * rows + t] ? sum : 0.0f);
}
"""


def _depthwise(x: np.ndarray, w: np.ndarray, mask: np.ndarray) -> np.ndarray:
    x = np.where(mask[..., None] > 0, x, 0.0)
    taps, left = w.shape[1], 1
    padded = np.pad(x, ((0, 0), (left, taps - 1 - left), (0, 0)))
    sums = sum(padded[:, k : k + x.shape[1]] * w[:, k] for k in range(taps))
    return np.where(mask[..., None] > 0, x + sums, 0.0)


DEPTHWISE = SmallKernel(
    "depthwise",
    DEPTHWISE_SOURCE,
    {
        "x": _values(4, 2, 7, 16),  # 16 floats a row: no rounding up to 16 bytes hides an overrun
        "w": _values(5, 16, 3),
        "mask": np.arange(7)[None] < np.array([[7], [4]]),
    },
    _depthwise,
    (16, 7, 2),
    (8, 4, 1),
    (("TAPS", 3), ("LEFT", 1)),
)

KERNELS: Sequence[SmallKernel] = (SOFTMAX, MATMUL, DEPTHWISE)
