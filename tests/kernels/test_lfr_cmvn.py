"""The kernel of stacked, normalised frames against its definition."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.kernels.lfr_cmvn import CASES, lfr_cmvn, lfr_cmvn_kernel, lfr_cmvn_reference, low_frame_rate

from .support import bits, dtypes, exact, judge, lengths, magnitudes, on_the_host, random, rounded_once, seeds, verified

shapes = st.sampled_from([(7, 6), (4, 2), (2, 5)])  # each is another text to compile
mixed = st.sampled_from([(mx.float32, mx.bfloat16), (mx.float16, mx.float32), (mx.bfloat16, mx.float16)])
pairs = dtypes.map(lambda dtype: (dtype, dtype)) | mixed
widths = st.sampled_from([1, 2, 7, 8, 31, 32, 33, 80])


def definition(fbank: mx.array, shift: mx.array, scale: mx.array, m: int, n: int) -> np.ndarray:
    """Frame by frame in float64."""
    frames = exact(fbank)
    last = len(frames) - 1
    rows = [
        np.concatenate([frames[min(max(row * n + j - (m - 1) // 2, 0), last)] for j in range(m)])
        for row in range(-(-len(frames) // n))
    ]
    return (np.stack(rows) + exact(shift)) * exact(scale)


def statistics(rng: np.random.Generator, width: int, dtype: mx.Dtype, size: float) -> tuple[mx.array, mx.array]:
    """Shift and scale of the size of the frames and around 1."""
    return random(rng, (width,), dtype, size), random(rng, (width,), dtype)


@given(seeds, pairs, lengths, widths, shapes, st.integers(0, 3))
def test_as_exact_as_the_plain_operations(seed, pair, frames, bins, shape, magnitude):
    rng = np.random.default_rng(seed)
    m, n = shape
    size = min(magnitudes(dtype)[magnitude] for dtype in pair)
    fbank = random(rng, (frames, bins), pair[0], size)
    shift, scale = statistics(rng, m * bins, pair[1], size)
    with on_the_host():
        found = lfr_cmvn_kernel(fbank, shift, scale, m=m, n=n)
        mx.eval(found)
    wanted = definition(fbank, shift, scale, m, n)
    judge(found, lfr_cmvn_reference(fbank, shift, scale, m=m, n=n), wanted)
    rounded_once(found, wanted, 2.0**-22 * definition(*map(mx.abs, (fbank, shift, scale)), m, n))


@given(seeds, lengths, widths, shapes)
def test_float32_is_that_of_the_plain_operations_to_the_bit(seed, frames, bins, shape):
    rng = np.random.default_rng(seed)
    m, n = shape
    fbank = random(rng, (frames, bins), mx.float32)
    shift, scale = statistics(rng, m * bins, mx.float32, 1.0)
    with on_the_host():
        found = bits(lfr_cmvn_kernel(fbank, shift, scale, m=m, n=n))
    assert found == bits(lfr_cmvn_reference(fbank, shift, scale, m=m, n=n))


@given(seeds, dtypes, st.sampled_from(["turned", "every other frame", "every other bin", "reversed"]))
def test_views_are_read_by_their_strides(seed, dtype, view):
    rng = np.random.default_rng(seed)
    fbank = {
        "turned": lambda: random(rng, (5, 9), dtype).T,
        "every other frame": lambda: random(rng, (18, 5), dtype)[::2],
        "every other bin": lambda: random(rng, (9, 10), dtype)[:, 1::2],
        "reversed": lambda: random(rng, (9, 5), dtype)[::-1],
    }[view]()
    shift, scale = (x[::2] for x in statistics(rng, 70, dtype, 1.0))
    with on_the_host():
        found = bits(lfr_cmvn_kernel(fbank, shift, scale, m=7, n=6))
        assert found == bits(lfr_cmvn_kernel(*(mx.contiguous(x) for x in (fbank, shift, scale)), m=7, n=6))


@given(seeds, dtypes, st.integers(20, 40), shapes)
def test_a_row_reads_its_own_frames_only(seed, dtype, frames, shape):
    m, n = shape
    fbank = random(np.random.default_rng(seed), (frames, 3), dtype)
    zeros, ones = mx.zeros(3 * m, dtype=dtype), mx.ones(3 * m, dtype=dtype)
    row = frames // n // 2
    first = row * n - (m - 1) // 2
    inside = (mx.arange(frames) >= first) & (mx.arange(frames) < first + m)
    dirty = mx.where(inside[:, None], fbank, mx.array(float("nan")).astype(dtype))
    with on_the_host():
        a, b = (lfr_cmvn_kernel(x, zeros, ones, m=m, n=n)[row] for x in (fbank, dirty))
        assert bits(a) == bits(b)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", [case for case in CASES if "test" in case.roles], ids=lambda case: case.name)
def test_every_schedule_gives_the_same_bits(case, dtype):
    arguments = case.arguments(dtype)
    judge(verified(lambda: lfr_cmvn_kernel(**arguments)), lfr_cmvn_reference(**arguments), definition(**arguments))


def test_gradients_are_those_of_the_plain_operations():
    arguments = CASES[0].arguments("float32")
    arrays = [arguments.pop(name) for name in ("fbank", "shift", "scale")]

    def loss(operation: Any) -> Any:
        return mx.grad(lambda *x: operation(*x, **arguments).square().sum(), argnums=(0, 1, 2))

    plain = loss(lfr_cmvn_reference)(*arrays)
    with on_the_host():
        for ours, theirs in zip(loss(lfr_cmvn)(*arrays), plain, strict=True):
            np.testing.assert_allclose(exact(ours), exact(theirs), rtol=1e-5, atol=1e-5)
            assert np.abs(exact(theirs)).max() > 0.01


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fbank": mx.zeros((0, 2))}, "T >= 1"),
        ({"fbank": mx.zeros(4)}, r"\(T, F\)"),
        ({"shift": mx.zeros(13)}, r"must be \(14,\)"),
        ({"scale": mx.zeros(1)}, r"must be \(14,\)"),
        ({"m": 0}, "at least 1"),
        ({"n": 0}, "at least 1"),
    ],
)
def test_misfits_are_refused(changes, said):
    good = {"fbank": mx.zeros((4, 2)), "shift": mx.zeros(14), "scale": mx.zeros(14), "m": 7, "n": 6}
    with pytest.raises(ValueError, match=rf"\[lfr_cmvn\] .*{said}"):
        lfr_cmvn(**{**good, **changes})


def test_what_the_kernel_does_not_know_goes_the_plain_way():
    shift, scale = mx.zeros(14), mx.ones(14)
    with on_the_host():
        whole = lfr_cmvn(mx.ones((4, 2), dtype=mx.int32), shift, scale, m=7, n=6)
        assert whole.dtype == mx.float32
        assert lfr_cmvn(mx.ones((4, 2)), shift, scale.astype(mx.float16), m=7, n=6).tolist() == whole.tolist()
        assert lfr_cmvn(mx.ones((4, 2)), *(x.astype(mx.int32) for x in (shift, scale)), m=7, n=6).dtype == mx.float32
        assert lfr_cmvn(mx.ones((4, 0)), mx.zeros(0), mx.zeros(0), m=7, n=6).shape == (1, 0)


def test_stacking_alone_is_the_same_stacking():
    fbank = random(np.random.default_rng(0), (20, 3), mx.float32)
    zeros, ones = mx.zeros(21), mx.ones(21)
    assert bits(low_frame_rate(fbank, 7, 6)) == bits(lfr_cmvn_reference(fbank, zeros, ones, m=7, n=6))
