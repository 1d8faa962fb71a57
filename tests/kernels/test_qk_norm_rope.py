"""The kernel of normalised, rotated queries and keys against its definition."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.kernels.qk_norm_rope import CASES, qk_norm_rope, qk_norm_rope_kernel, qk_norm_rope_reference

from .support import bits, dtypes, exact, judge, magnitudes, on_the_host, random, rounded_once, seeds, verified

EPS, THETA = 1e-6, 1e6
NAMES = ("q", "k", "q_weight", "k_weight")
widths = st.sampled_from([2, 8, 62, 66, 128])  # each is another text to compile
heads = st.sampled_from([(1, 1), (2, 1), (4, 2), (5, 3), (1, 4)])
positions = st.sampled_from([1, 2, 7, 8, 9, 31, 32, 33])
offsets = st.sampled_from([0, 1, 31, 1000, 40_000])


def definition(x: mx.array, weight: mx.array, offset: int, angles: np.ndarray | None = None) -> np.ndarray:
    """Norm and rotation of (B, S, heads, E) in float64, heads before positions; by `angles` (S, E / 2) if given."""
    values = exact(x)
    width = values.shape[-1]
    values = values / np.sqrt(np.mean(values**2, axis=-1, keepdims=True) + EPS) * exact(weight)
    if angles is None:
        angles = np.arange(offset, offset + values.shape[1])[:, None] * THETA ** (-2.0 * np.arange(width // 2) / width)
    angles = angles[:, None]
    a, b = np.split(values, 2, axis=-1)
    turned = [a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)]
    return np.concatenate(turned, axis=-1).swapaxes(1, 2)


def inputs(seed: int, batch: int, rows: int, counts: tuple[int, int], width: int, dtype: mx.Dtype, size: float = 1.0):
    """Queries, keys and the two weights, by name."""
    rng = np.random.default_rng(seed)
    q, k = (random(rng, (batch, rows, count, width), dtype, size) for count in counts)
    return dict(zip(NAMES, (q, k, random(rng, (width,), dtype), random(rng, (width,), dtype)), strict=True))


@given(seeds, dtypes, st.integers(1, 2), positions, heads, widths, offsets, st.integers(0, 3))
def test_as_exact_as_the_plain_operations(seed, dtype, batch, rows, counts, width, offset, magnitude):
    arrays = inputs(seed, batch, rows, counts, width, dtype, magnitudes(dtype)[magnitude])
    with on_the_host():
        found = qk_norm_rope_kernel(**arrays, eps=EPS, theta=THETA, offset=offset)
        mx.eval(found)
    plain = qk_norm_rope_reference(**arrays, eps=EPS, theta=THETA, offset=offset)
    for name, ours, theirs in zip(("q", "k"), found, plain, strict=True):
        wanted = definition(arrays[name], arrays[f"{name}_weight"], offset)
        judge(ours, theirs, wanted)
        # A pair turns by an angle of float32: what one half loses, the other may gain.
        noise = (2.0**-22 * (offset + rows) + 2.0**-20) * np.hypot(*np.split(wanted, 2, axis=-1))
        rounded_once(ours, wanted, np.concatenate([noise, noise], axis=-1))


@pytest.mark.parametrize("offset", [0, 1000, 40_000, 1_000_003, 2**24 - 2])
def test_sine_and_cosine_are_those_of_the_float32_angles_at_far_positions(offset):
    arrays = inputs(0, 1, 2, (1, 1), 128, mx.float32)
    frequencies = (THETA ** (-np.arange(0, 128, 2) / 128)).astype(np.float32)
    angles = np.arange(offset, offset + 2, dtype=np.float32)[:, None] * frequencies
    assert angles.dtype == np.float32
    with on_the_host():
        found = qk_norm_rope_kernel(**arrays, eps=EPS, theta=THETA, offset=offset)
        mx.eval(found)
    for name, ours in zip(("q", "k"), found, strict=True):
        wanted = definition(arrays[name], arrays[f"{name}_weight"], offset, angles.astype(np.float64))
        assert np.abs(exact(ours) - wanted).max() < 1e-6 * np.abs(wanted).max()


@given(seeds, dtypes, heads, st.sampled_from([8, 66]), st.integers(2, 6), st.integers(0, 50))
def test_a_prompt_equals_its_steps(seed, dtype, counts, width, batch, offset):
    """To the bit, although a prompt shares its angles among heads and a step does not."""
    rows = -(-32 // batch)
    arrays = inputs(seed, batch, rows, counts, width, dtype)
    with on_the_host():
        together = qk_norm_rope_kernel(**arrays, eps=EPS, theta=THETA, offset=offset)
        for row in (0, rows // 2, rows - 1):
            step = {**arrays, **{name: arrays[name][-1:, row : row + 1] for name in ("q", "k")}}
            alone = qk_norm_rope_kernel(**step, eps=EPS, theta=THETA, offset=mx.array(offset + row))
            for a, b in zip(together, alone, strict=True):
                assert bits(a[-1:, :, row : row + 1]) == bits(b)


@given(seeds, dtypes, st.sampled_from([float("nan"), float("inf"), 3e4]))
def test_heads_and_positions_do_not_see_one_another(seed, dtype, junk):
    clean = inputs(seed, 2, 3, (3, 2), 8, dtype)
    dirty = {name: mx.array(value) for name, value in clean.items()}
    for name in ("q", "k"):
        dirty[name][0, 1, 1] = junk
    with on_the_host():
        pairs = zip(*(qk_norm_rope_kernel(**x, eps=EPS, theta=THETA) for x in (clean, dirty)), strict=True)
        for a, b in pairs:
            differs = np.any(exact(a) != exact(b), axis=-1)
            wanted = np.zeros_like(differs)
            wanted[0, 1, 1] = True
            assert np.array_equal(differs, wanted)


@given(seeds, dtypes, st.sampled_from(["turned", "every other head", "part of a packed one"]))
def test_views_are_read_by_their_strides(seed, dtype, view):
    rng = np.random.default_rng(seed)
    weights = {name: random(rng, (16,), dtype)[::2] for name in ("q_weight", "k_weight")}
    packed = random(rng, (2, 3, 48), dtype)
    q, k = {
        "turned": lambda: [random(rng, (2, count, 3, 8), dtype).swapaxes(1, 2) for count in (4, 2)],
        "every other head": lambda: [random(rng, (2, 3, 2 * count, 8), dtype)[:, :, ::2] for count in (4, 2)],
        "part of a packed one": lambda: [packed[..., :32].reshape(2, 3, 4, 8), packed[..., 32:].reshape(2, 3, 2, 8)],
    }[view]()
    arrays = {"q": q, "k": k, **weights}
    with on_the_host():
        found = qk_norm_rope_kernel(**arrays, eps=EPS, theta=THETA)
        copied = {name: mx.contiguous(x) for name, x in arrays.items()}
        for a, b in zip(found, qk_norm_rope_kernel(**copied, eps=EPS, theta=THETA), strict=True):
            assert bits(a) == bits(b)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", [case for case in CASES if "test" in case.roles], ids=lambda case: case.name)
def test_every_schedule_gives_the_same_bits(case, dtype):
    arguments = case.arguments(dtype)
    found = verified(lambda: qk_norm_rope_kernel(**arguments))
    for name, ours, theirs in zip(("q", "k"), found, qk_norm_rope_reference(**arguments), strict=True):
        judge(ours, theirs, definition(arguments[name], arguments[f"{name}_weight"], arguments["offset"]))


def test_gradients_are_those_of_the_plain_operations():
    arguments = CASES[0].arguments("float32")
    arrays = [arguments.pop(name) for name in NAMES]

    def loss(operation: Any) -> Any:
        def total(*x: mx.array) -> mx.array:
            q, k = operation(*x, **arguments)
            return mx.exp(q * 0.3).sum() + mx.square(k[..., 0]).sum()

        return mx.grad(total, argnums=(0, 1, 2, 3))

    plain = loss(qk_norm_rope_reference)(*arrays)
    with on_the_host():
        for ours, theirs in zip(loss(qk_norm_rope)(*arrays), plain, strict=True):
            np.testing.assert_allclose(exact(ours), exact(theirs), rtol=1e-4, atol=1e-4)
            assert np.abs(exact(theirs)).max() > 0.01


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"q": mx.zeros((1, 2, 8))}, "even E"),
        ({"q": mx.zeros((1, 3, 4, 8))}, "one B, S"),
        ({"k": mx.zeros((1, 2, 2, 6))}, "even E"),
        ({"q": mx.zeros((1, 2, 4, 7)), "k": mx.zeros((1, 2, 2, 7))}, "even E"),
        ({"q_weight": mx.zeros(7)}, r"must be \(8,\)"),
        ({"k_weight": mx.zeros((8, 1))}, r"must be \(8,\)"),
    ],
)
def test_misfits_are_refused(changes, said):
    good = {"q": mx.zeros((1, 2, 4, 8)), "k": mx.zeros((1, 2, 2, 8)), "q_weight": mx.ones(8), "k_weight": mx.ones(8)}
    with pytest.raises(ValueError, match=rf"\[qk_norm_rope\] .*{said}"):
        qk_norm_rope(**{**good, **changes}, eps=EPS, theta=THETA)


def test_what_the_kernel_does_not_know_goes_the_plain_way():
    arrays = inputs(0, 1, 2, (2, 1), 8, mx.float16)
    with on_the_host():
        mixed = qk_norm_rope(**{**arrays, "k": arrays["k"].astype(mx.float32)}, eps=EPS, theta=THETA)
        plain = qk_norm_rope_reference(**{**arrays, "k": arrays["k"].astype(mx.float32)}, eps=EPS, theta=THETA)
        assert [bits(x) for x in mixed] == [bits(x) for x in plain]
        none = {**arrays, **{name: arrays[name][:0] for name in ("q", "k")}}
        assert [x.shape for x in qk_norm_rope(**none, eps=EPS, theta=THETA)] == [(0, 2, 2, 8), (0, 1, 2, 8)]


@given(seeds, st.lists(offsets, min_size=1, max_size=3), positions, heads, widths)
def test_each_item_may_have_an_offset_of_its_own(seed, starts, rows, counts, width):
    arrays = inputs(seed, len(starts), rows, counts, width, mx.float32)
    together = qk_norm_rope(**arrays, eps=EPS, theta=THETA, offset=mx.array(starts))
    for i, start in enumerate(starts):
        one = {name: x[i : i + 1] if name in ("q", "k") else x for name, x in arrays.items()}
        alone = qk_norm_rope_reference(**one, eps=EPS, theta=THETA, offset=start)
        for found, wanted in zip(together, alone, strict=True):
            assert np.array_equal(np.array(found[i : i + 1]), np.array(wanted))


def test_offsets_of_another_batch_are_refused():
    arrays = inputs(0, 2, 1, (2, 1), 8, mx.float32)
    with pytest.raises(ValueError, match=r"offset must be \(\) or \(2,\) but got \(3,\)"):
        qk_norm_rope(**arrays, eps=EPS, theta=THETA, offset=mx.array([1, 2, 3]))
