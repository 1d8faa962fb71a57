"""The kernel of a residual and the norm behind it against its definition."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.kernels.add_rms_norm import CASES, add_rms_norm, add_rms_norm_kernel, add_rms_norm_reference

from .support import bits, dtypes, exact, judge, magnitudes, on_the_host, random, rounded_once, seeds, verified

EPS = 1e-6
NAMES = ("x", "delta", "weight")
widths = st.sampled_from([1, 2, 31, 32, 33, 255, 256, 257, 520])
row_counts = st.sampled_from([(1, 1), (1, 3), (2, 2)])


def inputs(seed: int, rows: tuple[int, int], width: int, dtype: mx.Dtype, size: float = 1.0) -> dict[str, mx.array]:
    rng = np.random.default_rng(seed)
    x, delta = (random(rng, (*rows, width), dtype, size) for _ in range(2))
    return dict(zip(NAMES, (x, delta, random(rng, (width,), dtype)), strict=True))


@given(seeds, dtypes, row_counts, widths, st.integers(0, 3))
def test_as_exact_as_the_plain_operations(seed, dtype, rows, width, magnitude):
    arrays = inputs(seed, rows, width, dtype, magnitudes(dtype)[magnitude])
    with on_the_host():
        total, normed = add_rms_norm_kernel(**arrays, eps=EPS)
        mx.eval(total, normed)
    plain = add_rms_norm_reference(**arrays, eps=EPS)
    assert bits(total) == bits(plain[0])
    values = exact(total)
    wanted = values / np.sqrt(np.mean(values**2, axis=-1, keepdims=True) + EPS) * exact(arrays["weight"])
    judge(normed, plain[1], wanted)
    rounded_once(normed, wanted, 2.0**-20 * np.abs(wanted))


@given(seeds, dtypes, st.sampled_from([float("nan"), float("inf")]))
def test_rows_do_not_see_one_another(seed, dtype, junk):
    clean = inputs(seed, (1, 3), 40, dtype)
    dirty = {**clean, "x": mx.array(clean["x"])}
    dirty["x"][:, 1] = junk
    with on_the_host():
        for a, b in zip(add_rms_norm_kernel(**clean, eps=EPS), add_rms_norm_kernel(**dirty, eps=EPS), strict=True):
            assert bits(a[:, ::2]) == bits(b[:, ::2])


@given(seeds, dtypes, st.sampled_from(["turned", "every other", "reversed"]))
def test_views_are_read_by_their_strides(seed, dtype, view):
    rng = np.random.default_rng(seed)
    x = {
        "turned": lambda: random(rng, (1, 9, 5), dtype).swapaxes(1, 2),
        "every other": lambda: random(rng, (1, 5, 18), dtype)[:, :, ::2],
        "reversed": lambda: random(rng, (1, 5, 9), dtype)[:, ::-1],
    }[view]()
    delta, weight = random(rng, (1, 5, 9), dtype), random(rng, (18,), dtype)[::2]
    with on_the_host():
        found = add_rms_norm_kernel(x, delta, weight, eps=EPS)
        again = add_rms_norm_kernel(mx.contiguous(x), delta, mx.contiguous(weight), eps=EPS)
        assert [bits(a) for a in found] == [bits(b) for b in again]


@pytest.mark.parametrize("case", [case for case in CASES if "test" in case.roles], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_schedule_gives_the_same(case, dtype):
    arguments = case.arguments(dtype)
    verified(lambda: add_rms_norm_kernel(**arguments))


def test_gradients_are_those_of_the_plain_operations():
    arrays = list(inputs(0, (1, 2), 20, mx.float32).values())

    def loss(function: Any, *given: mx.array) -> mx.array:
        total, normed = function(*given, eps=EPS)
        return mx.sum(mx.sin(total) * normed)

    wanted = mx.grad(lambda *a: loss(add_rms_norm_reference, *a), argnums=(0, 1, 2))(*arrays)
    with on_the_host():
        found = mx.grad(lambda *a: loss(add_rms_norm, *a), argnums=(0, 1, 2))(*arrays)
        mx.eval(found)
    for a, b in zip(found, wanted, strict=True):
        assert np.abs(exact(a) - exact(b)).max() < 1e-5 * max(1.0, np.abs(exact(b)).max())


@pytest.mark.parametrize("shapes", [((1, 2, 8), (1, 2, 7), (8,)), ((1, 2, 8), (1, 2, 8), (7,)), ((2, 8), (2, 8), (8,))])
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match=r"x and delta must be \(B, S, H\)"):
        add_rms_norm(*(mx.zeros(shape) for shape in shapes), eps=EPS)


def test_mixed_types_and_nothing_are_left_to_the_plain_operations():
    x = mx.ones((1, 2, 8))
    with on_the_host():
        total, normed = add_rms_norm(x, x.astype(mx.bfloat16), mx.ones((8,)), eps=EPS)
        assert (total.dtype, normed.dtype) == (mx.float32, mx.float32)
        assert add_rms_norm(x[:, :0], x[:, :0], mx.ones((8,)), eps=EPS)[1].shape == (1, 0, 8)
