"""The memory block's kernel against its definition."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.kernels.fsmn import CASES, fsmn, fsmn_kernel, fsmn_reference

from .support import bits, dtypes, exact, judge, lengths, magnitudes, on_the_host, random, rounded_once, seeds, verified

# Taps and left context; each is another text to compile, and so is each first column of the values.
contexts = st.sampled_from([(1, 0), (3, 1), (4, 3), (11, 5)])
widths = st.sampled_from([1, 2, 5, 31, 32, 33])
OTHERS = 66  # columns of queries and keys, before the values


def definition(qkv: mx.array, weight: mx.array, mask: mx.array, left: int, offset: int | None = None) -> np.ndarray:
    """Term by term in float64; what a mask hides is not read."""
    width, taps, _ = weight.shape
    first = qkv.shape[2] - width if offset is None else offset
    keep = np.array(mask)[:, :, None]
    v = np.where(keep, exact(qkv)[:, :, first : first + width], 0.0)
    w = exact(weight)[:, :, 0]
    total = v.copy()
    rows = v.shape[1]
    for row in range(rows):
        for k in range(taps):
            if 0 <= row + k - left < rows:
                total[:, row] += w[:, k] * v[:, row + k - left]
    return np.where(keep, total, 0.0)


def masks(rng: np.random.Generator, kind: str, batch: int, rows: int) -> np.ndarray:
    """Real rows of a batch: all, padded at the end, with holes, or one item without any."""
    if kind == "full":
        return np.ones((batch, rows), bool)
    if kind == "padded":
        return np.arange(rows)[None] < rng.integers(1, rows + 1, (batch, 1))
    mask = rng.random((batch, rows)) < 0.7
    mask[0] &= kind != "empty"
    return mask


@given(
    seeds, dtypes, st.integers(1, 3), lengths, widths, contexts, st.sampled_from([None, 0, 3]),
    st.sampled_from(["full", "padded", "holes", "empty"]), st.integers(0, 3),
)  # fmt: skip
def test_as_exact_as_the_plain_operations(seed, dtype, batch, rows, width, context, offset, kind, magnitude):
    rng = np.random.default_rng(seed)
    taps, left = context
    size = magnitudes(dtype)[magnitude]
    qkv = random(rng, (batch, rows, OTHERS + width), dtype, size)
    weight = random(rng, (width, taps, 1), dtype, taps**-0.5)
    mask = mx.array(masks(rng, kind, batch, rows))
    with on_the_host():
        found = fsmn_kernel(qkv, weight, mask, left=left, offset=offset)
        mx.eval(found)
    wanted = definition(qkv, weight, mask, left, offset)
    for shifted_adds in (True, False, None):
        plain = fsmn_reference(qkv, weight, mask, left=left, offset=offset, shifted_adds=shifted_adds)
        judge(found, plain, wanted)
    rounded_once(found, wanted, 2.0**-20 * definition(mx.abs(qkv), mx.abs(weight), mask, left, offset))


@given(seeds, dtypes, lengths, contexts, st.sampled_from([float("nan"), float("inf"), 3e4]))
def test_what_the_mask_hides_is_invisible(seed, dtype, rows, context, junk):
    rng = np.random.default_rng(seed)
    taps, left = context
    width = 5
    weight = random(rng, (width, taps, 1), dtype)
    mask = mx.array(masks(rng, "holes", 2, rows))
    qkv = random(rng, (2, rows, OTHERS + width), dtype)
    clean, dirty = (mx.where(mask[:, :, None], qkv, mx.array(value).astype(dtype)) for value in (0.0, junk))
    dirty[:, :, :OTHERS] = float("nan")  # nor are the other parts of the projection read
    with on_the_host():
        a, b = (fsmn_kernel(x, weight, mask, left=left) for x in (clean, dirty))
        assert bits(a) == bits(b)
    assert not np.any(exact(a)[~np.array(mask)])


@given(seeds, dtypes, st.lists(lengths, min_size=2, max_size=3), contexts)
def test_a_batch_equals_its_items(seed, dtype, each, context):
    rng = np.random.default_rng(seed)
    taps, left = context
    width, rows = 5, max(each)
    weight = random(rng, (width, taps, 1), dtype)
    qkv = random(rng, (len(each), rows, OTHERS + width), dtype)
    mask = mx.arange(rows)[None] < mx.array(each)[:, None]
    with on_the_host():
        together = fsmn_kernel(qkv, weight, mask, left=left)
        for item, length in enumerate(each):
            alone = fsmn_kernel(qkv[item : item + 1, :length], weight, mx.ones((1, length), dtype=mx.bool_), left=left)
            assert bits(alone[0]) == bits(together[item, :length])


@given(seeds, dtypes, st.sampled_from(["turned", "every other row", "every other column", "reversed"]))
def test_views_are_read_by_their_strides(seed, dtype, view):
    rng = np.random.default_rng(seed)
    mask = mx.array(masks(rng, "holes", 2, 9))
    qkv = {
        "turned": lambda: random(rng, (10, 9, 2), dtype).transpose(2, 1, 0),
        "every other row": lambda: random(rng, (2, 18, 10), dtype)[:, ::2],
        "every other column": lambda: random(rng, (2, 9, 20), dtype)[:, :, 1::2],
        "reversed": lambda: random(rng, (2, 9, 10), dtype)[:, ::-1],
    }[view]()
    taps = random(rng, (3, 10), dtype)[:, ::2].T[:, :, None]
    with on_the_host():
        found = bits(fsmn_kernel(qkv, taps, mask, left=1))
        assert found == bits(fsmn_kernel(mx.contiguous(qkv), mx.contiguous(taps), mask, left=1))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", [case for case in CASES if "test" in case.roles], ids=lambda case: case.name)
def test_every_schedule_gives_the_same_bits(case, dtype):
    arguments = case.arguments(dtype)
    found = verified(lambda: fsmn_kernel(**arguments))
    wanted = definition(*(arguments[name] for name in ("qkv", "weight", "mask", "left")))
    judge(found, fsmn_reference(**arguments), wanted)


def test_gradients_are_those_of_the_plain_operations():
    arguments = CASES[0].arguments("float32")
    qkv, weight = arguments.pop("qkv"), arguments.pop("weight")

    def loss(operation: Any) -> Any:
        return mx.grad(lambda *x: operation(*x, **arguments).square().sum(), argnums=(0, 1))

    plain = loss(fsmn_reference)(qkv, weight)
    with on_the_host():
        for ours, theirs in zip(loss(fsmn)(qkv, weight), plain, strict=True):
            np.testing.assert_allclose(exact(ours), exact(theirs), rtol=1e-5, atol=1e-5)
            assert np.abs(exact(theirs)).max() > 0.1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"qkv": mx.zeros((2, 5))}, r"\(B, L, S\)"),
        ({"weight": mx.zeros((4, 3, 2))}, r"\(D, K, 1\)"),
        ({"mask": mx.ones((2, 6), dtype=mx.bool_)}, "mask must be"),
        ({"mask": mx.ones((2, 5))}, "of bool"),
        ({"left": 3}, r"left must lie in 0\.\.2"),
        ({"offset": 9}, "4 columns must lie"),
        ({"offset": -1}, "4 columns must lie"),
        ({"weight": mx.zeros((13, 3, 1))}, "13 columns must lie"),
    ],
)
def test_misfits_are_refused(changes, said):
    good = {"qkv": mx.zeros((2, 5, 12)), "weight": mx.zeros((4, 3, 1)), "mask": mx.ones((2, 5), dtype=mx.bool_)}
    arguments = {**good, "left": 1, **changes}
    with pytest.raises(ValueError, match=rf"\[fsmn\] .*{said}"):
        fsmn(**arguments)


def test_what_the_kernel_does_not_know_goes_the_plain_way():
    mask = mx.ones((1, 4), dtype=mx.bool_)
    with on_the_host():
        mixed = fsmn(mx.ones((1, 4, 6)), mx.ones((2, 3, 1), dtype=mx.float16), mask, left=1)
        assert mixed.dtype == mx.float32
        assert fsmn(mx.zeros((0, 4, 6)), mx.ones((2, 3, 1)), mx.ones((0, 4), dtype=mx.bool_), left=1).shape == (0, 4, 2)
