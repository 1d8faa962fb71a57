"""What the tests of all kernels share: element types, exact values, and the judge.

A kernel is judged by its own kind: against float64 it may be off by twice what MLX's plain operations are off in the
same element type, and by one step of that type. A fixed tolerance would be too wide for one shape and too tight for
another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import strategies as st

from qwen4b_asr.kernels import _loader, use
from tests.helpers import metal_host

ON_GPU = os.environ.get("KERNEL_TESTS") == "gpu"
"""Whether these tests use the machine's GPU in place of the host runner."""

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
EPSILON = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
SMALLEST = {mx.float32: 2.0**-149, mx.float16: 2.0**-24, mx.bfloat16: 2.0**-133}

dtypes = st.sampled_from(list(DTYPES.values()))
seeds = st.integers(0, 2**32 - 1)
# Around the 8 rows of a thread and threadgroup, the 32 lanes of a SIMD group, and primes.
lengths = st.sampled_from([1, 2, 3, 7, 8, 9, 13, 15, 16, 17, 23, 31, 32, 33, 64, 65])


def magnitudes(dtype: mx.Dtype) -> list[float]:
    """Sizes of values to try: the smallest, small, ordinary and large ones of an element type."""
    if dtype == mx.float16:
        return [8 * SMALLEST[dtype], 1e-3, 1.0, 300.0]
    return [8 * SMALLEST[dtype], 1e-18, 1.0, 1e15]


def random(rng: np.random.Generator, shape: Sequence[int], dtype: mx.Dtype, magnitude: float = 1.0) -> mx.array:
    """Normally distributed values of about `magnitude`."""
    return mx.array((rng.standard_normal(shape) * magnitude).astype(np.float32)).astype(dtype)


def exact(x: mx.array) -> np.ndarray:
    """The values of an array in float64."""
    return np.array(x.astype(mx.float32)).astype(np.float64)


def bits(x: mx.array) -> bytes:
    """The memory of an array, which tells -0 from 0 and one NaN from another."""
    return np.array(mx.contiguous(x).view(mx.uint8)).tobytes()


def judge(found: mx.array, plain: mx.array, wanted: np.ndarray) -> None:
    """Hold a kernel's result against float64.

    Args:
        found: The kernel's result.
        plain: What the plain operations give in the same element type.
        wanted: The exact result.

    Raises:
        AssertionError: If shape or dtype differ from the plain operations', or the error is more than twice theirs
            and one step of the element type.
    """
    assert found.shape == plain.shape == wanted.shape
    assert found.dtype == plain.dtype
    assert np.isfinite(exact(found)).all(), "not finite"
    error, allowed = (float(np.abs(exact(x) - wanted).max(initial=0)) for x in (found, plain))
    step = EPSILON[found.dtype] * float(np.abs(wanted).max(initial=0)) + SMALLEST[found.dtype]
    assert error <= 2 * allowed + step, f"error {error:.3g}, the plain operations' {allowed:.3g}, a step {step:.3g}"


def rounded_once(found: mx.array, wanted: np.ndarray, noise: np.ndarray) -> None:
    """Make sure that a kernel computes in float32 and rounds each result a single time, which `judge` may not see.

    Args:
        found: The kernel's result.
        wanted: The exact result.
        noise: What float32 arithmetic may add to the error of each value.

    Raises:
        AssertionError: If a value is off by more than half a step of the element type and the noise.
    """
    allowed = EPSILON[found.dtype] / 2 * np.abs(wanted) + SMALLEST[found.dtype] / 2 + noise
    excess = np.abs(exact(found) - wanted) / allowed
    assert excess.max(initial=0) <= 1, f"off by {excess.max():.3g} times what one rounding explains"


@contextmanager
def on_the_host() -> Iterator[None]:
    """Run the Metal text of every kernel on the CPU while the block runs; skip the test where that cannot be.

    With ``KERNEL_TESTS=gpu`` in the environment the kernels run on the machine's own GPU instead.
    """
    if ON_GPU:
        if _loader.backend() is None:
            pytest.skip("KERNEL_TESTS=gpu needs an Apple or NVIDIA GPU")
        with use("on"):
            yield
        return
    if reason := metal_host.unavailable():
        pytest.skip(reason)
    with _loader.override("metal", metal_host.metal_kernel):
        yield


def verified(kernel: Callable[[], Any]) -> Any:
    """Run a kernel under every schedule and poison of the host runner, or twice on a GPU; all must agree to the bit."""
    with on_the_host():
        if not ON_GPU:
            return metal_host.verify(kernel)
        first, second = kernel(), kernel()
        for one, other in zip(*([x] if isinstance(x, mx.array) else x for x in (first, second)), strict=True):
            assert bits(one) == bits(other), "two runs differ"
        return first
