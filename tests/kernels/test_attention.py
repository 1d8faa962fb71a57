"""The attention kernel against its definition."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.kernels import _loader, use
from qwen4b_asr.kernels.attention import (
    CASES,
    _powers_of_two,
    attention,
    attention_kernel,
    attention_reference,
    powers_of_two_pay,
    tile_sizes,
)

from .support import EPSILON, SMALLEST, bits, dtypes, exact, magnitudes, on_the_host, random, seeds, verified

# Around the 8 rows of a SIMD group, its 32 lanes, and the tiles of 8, 16 and 32 rows and keys.
counts = st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65])
# Heads that share a key head, head width, causal. Each is another text to compile, as is each tile and element type:
# where they do not matter, two will do.
forms = st.sampled_from([(1, 8, False), (3, 10, True)])
two_dtypes = st.sampled_from([mx.float32, mx.bfloat16])
more_counts = st.sampled_from([9, 17, 32, 33, 65])
GROUP, WIDTH = 3, 10
TEST_CASES = [case for case in CASES if "test" in case.roles]


def definition(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: mx.array | None = None,
    causal: bool = False,
    offset: int = 0,
) -> tuple[np.ndarray, np.ndarray, float]:
    """In float64: the result, which queries see a key (B, 1, I, 1), and the largest sum of magnitudes in a score."""
    batch, heads, queries, _ = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    seen = np.ones((batch, 1, queries, keys), bool)
    if mask is not None:
        seen &= np.array(mask)[:, None, None, :]
    if causal:
        seen &= np.arange(keys)[None, :] <= np.arange(queries)[:, None] + offset
    real = np.ones((batch, keys), bool) if mask is None else np.array(mask)
    x = exact(q)
    y, z = (np.where(real[:, None, :, None], np.repeat(exact(t), group, axis=1), 0) for t in (k, v))
    scores = np.where(seen, scale * (x @ y.swapaxes(2, 3)), -np.inf)
    sees = seen.any(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        weights = np.where(sees, np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-1e300)), 0)
    total = weights.sum(axis=-1, keepdims=True)
    out = weights @ z / np.where(sees, total, 1)
    return out, sees, float(np.max(scale * (np.abs(x) @ np.abs(y).swapaxes(2, 3)), initial=0))


def judge(found: mx.array, plain: mx.array, v: mx.array, exactly: tuple[np.ndarray, np.ndarray, float]) -> None:
    """Allow twice the plain operation's error, one step of the element type, and the rounding of float32 scores.

    A score of 10,000 is known to a thousandth in float32, and so is the weight that is its exponential.
    """
    wanted, sees, score = exactly
    assert found.shape == plain.shape == wanted.shape
    assert found.dtype == plain.dtype
    assert np.isfinite(exact(found)).all(), "not finite"
    assert not np.any(np.where(sees, 0, exact(found))), "a query that sees no key must get zeros"
    error, allowed = (float(np.abs(np.where(sees, exact(x) - wanted, 0)).max()) for x in (found, plain))
    size = float(np.abs(np.where(np.isfinite(exact(v)), exact(v), 0)).max())
    slack = EPSILON[found.dtype] * float(np.abs(wanted).max()) + SMALLEST[found.dtype] + 2.0**-22 * score * size
    assert error <= 2 * allowed + slack, f"error {error:.3g}, the plain operation's {allowed:.3g}, slack {slack:.3g}"


def inputs(seed: int, shape: tuple[int, ...], dtype: mx.Dtype, size: float = 1.0, value_size: float = 1.0):
    """Queries, keys and values, by name; `shape` is batch, key heads, group, queries, keys, head width."""
    rng = np.random.default_rng(seed)
    batch, key_heads, group, queries, keys, width = shape
    q = random(rng, (batch, key_heads * group, queries, width), dtype, size)
    k, v = (random(rng, (batch, key_heads, keys, width), dtype, s) for s in (size, value_size))
    return {"q": q, "k": k, "v": v}


def masks(seed: int, kind: str, batch: int, keys: int) -> mx.array | None:
    """Real keys of a batch: all, padded at the end, with holes, a hole of whole tiles, or one item without any."""
    rng = np.random.default_rng(seed)
    if kind == "none":
        return None
    if kind == "padded":
        return mx.array(np.arange(keys)[None] < rng.integers(1, keys + 1, (batch, 1)))
    mask = rng.random((batch, keys)) < 0.7
    if kind == "late":
        mask[:, : keys - 1] = False
        mask[:, -1] = True
    if kind == "empty":
        mask[0] = False
    return mx.array(mask)


@given(
    seeds, dtypes, st.integers(1, 2), st.integers(1, 2), forms, counts, counts, st.integers(0, 3), st.integers(0, 3),
    st.sampled_from(["none", "padded", "holes", "late", "empty"]), st.sampled_from([None, 0, 1, -2]),
)  # fmt: skip
def test_as_exact_as_the_plain_operation(
    seed, dtype, batch, key_heads, form, queries, keys, size, value_size, kind, offset
):
    group, width, causal = form
    shape = (batch, key_heads, group, queries, keys, width)
    sizes = [*magnitudes(dtype)[:3], 50.0]  # the last makes scores of 10,000
    arrays = inputs(seed, shape, dtype, sizes[size], magnitudes(dtype)[value_size])
    options = {
        "scale": width**-0.5,
        "mask": masks(seed, kind, batch, keys),
        "causal": causal,
        "offset": keys - queries if offset is None else offset,
    }
    with on_the_host():
        found = attention_kernel(**arrays, **options)
        mx.eval(found)
    judge(found, attention_reference(**arrays, **options), arrays["v"], definition(**arrays, **options))


@given(seeds, counts, counts, st.integers(0, 3), st.integers(0, 3), st.sampled_from(["none", "padded", "late"]))
def test_powers_of_two_are_as_exact_as_mlx(seed, queries, keys, size, value_size, kind):
    sizes = [*magnitudes(mx.float32)[:3], 50.0]
    arrays = inputs(seed, (2, 2, 1, queries, keys, 8), mx.float32, sizes[size], magnitudes(mx.float32)[value_size])
    mask = masks(seed, kind, 2, keys)
    found = _powers_of_two(**arrays, scale=0.3, mask=mask)
    plain = mx.fast.scaled_dot_product_attention(
        **arrays, scale=0.3, mask=None if mask is None else mask[:, None, None, :]
    )
    judge(found, plain, arrays["v"], definition(**arrays, scale=0.3, mask=mask))


def test_powers_of_two_are_for_many_queries_on_a_cpu():
    q, k, _ = inputs(1, (1, 2, 1, 12, 12, 8), mx.float32).values()
    assert powers_of_two_pay(q, k) == (mx.default_device().type == mx.DeviceType.cpu)
    assert not powers_of_two_pay(q[:, :, :8], k)
    assert not powers_of_two_pay(q, k[:, :1])
    assert not powers_of_two_pay(q.astype(mx.bfloat16), k)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", TEST_CASES, ids=lambda case: case.name)
def test_every_schedule_gives_the_same_bits(case, dtype):
    arguments = case.arguments(dtype)
    found = verified(lambda: attention_kernel(**arguments))
    judge(found, attention_reference(**arguments), arguments["v"], definition(**arguments))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_scores_may_be_large_and_rise_from_tile_to_tile(dtype, sign):
    """The running maximum starts far off and moves at every tile, or never."""
    arrays = {name: mx.ones((1, 1, 70, 8), dtype=dtype) for name in "qkv"}
    ramp = (mx.arange(70) - 35.0)[:, None] * sign
    arrays["k"] = (arrays["k"] * ramp * 2).astype(dtype)
    arrays["v"] = (arrays["v"] * ramp / 35).astype(dtype)
    arrays["q"] = arrays["q"] * 18
    scale = 1.0
    with on_the_host():
        found = attention_kernel(**arrays, scale=scale)
        mx.eval(found)
    assert abs(float(mx.max(mx.matmul(arrays["q"], arrays["k"].swapaxes(2, 3))))) > 9000
    judge(found, attention_reference(**arrays, scale=scale), arrays["v"], definition(**arrays, scale=scale))


@given(seeds, two_dtypes, more_counts, more_counts, st.sampled_from([float("nan"), float("inf"), 3e4]))
def test_what_the_mask_hides_is_invisible(seed, dtype, queries, keys, junk):
    clean = inputs(seed, (2, 1, GROUP, queries, keys, WIDTH), dtype)
    mask = masks(seed, "holes", 2, keys)
    hidden = mx.logical_not(mask)[:, None, :, None]
    dirty = {**clean, **{n: mx.where(hidden, mx.array(junk).astype(dtype), clean[n]) for n in "kv"}}
    with on_the_host():
        a, b = (attention_kernel(**x, scale=1.0, mask=mask) for x in (clean, dirty))
        assert bits(a) == bits(b)


@given(seeds, two_dtypes, more_counts, more_counts, st.sampled_from([float("inf"), 3e4]))
def test_a_query_does_not_see_later_keys(seed, dtype, queries, keys, junk):
    clean = inputs(seed, (1, 1, GROUP, queries, keys, WIDTH), dtype)
    cut, offset = keys - queries // 2, keys - queries  # half of the queries stand before the cut
    later = mx.arange(keys)[:, None] >= cut
    dirty = {**clean, "k": mx.where(later, mx.array(junk).astype(dtype), clean["k"])}
    with on_the_host():
        a, b = (attention_kernel(**x, scale=1.0, causal=True, offset=offset) for x in (clean, dirty))
        assert bits(a[:, :, : cut - offset]) == bits(b[:, :, : cut - offset])
        assert bits(a) != bits(b)


@given(seeds, two_dtypes, st.lists(st.integers(8, 40), min_size=2, max_size=3), st.booleans())
def test_a_batch_equals_its_items(seed, dtype, each, causal):
    rows = max(each)
    arrays = inputs(seed, (len(each), 1, GROUP, rows, rows, WIDTH), dtype)
    mask = mx.arange(rows)[None] < mx.array(each)[:, None]
    with on_the_host():
        together = attention_kernel(**arrays, scale=0.5, mask=mask, causal=causal)
        for item, length in enumerate(each):
            one = {name: array[item : item + 1, :, :length] for name, array in arrays.items()}
            alone = attention_kernel(**one, scale=0.5, causal=causal)
            assert bits(alone[0]) == bits(together[item, :, :length])


@given(seeds, st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_chunks_with_an_offset_equal_the_whole(seed, chunks):
    rows = sum(chunks)
    arrays = inputs(seed, (1, 2, GROUP, rows, rows, WIDTH), mx.float32)
    with on_the_host():
        whole = attention_kernel(**arrays, scale=0.3, causal=True)
        done = 0
        for chunk in chunks:
            end = done + chunk
            part = {"q": arrays["q"][:, :, done:end], "k": arrays["k"][:, :, :end], "v": arrays["v"][:, :, :end]}
            found = attention_kernel(**part, scale=0.3, causal=True, offset=done)
            assert bits(found) == bits(whole[:, :, done:end])
            done = end


VIEWS = ("packed", "slice of a cache", "turned", "every other", "reversed", "one for all heads")


def view(kind: str, rng: np.random.Generator, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Queries, keys, values and mask of 2 items, 2 heads, 11 positions and 8 columns that do not lie in rows."""
    shape = (2, 2, 11, 8)
    mask = mx.array(rng.random((11, 2)) < 0.8).T
    if kind == "packed":
        parts = mx.split(random(rng, (2, 11, 48), dtype), 3, axis=-1)
        return {**{n: t.reshape(2, 11, 2, 8).swapaxes(1, 2) for n, t in zip("qkv", parts, strict=True)}, "mask": mask}
    make = {
        "slice of a cache": lambda: random(rng, (2, 2, 32, 8), dtype)[:, :, 5:16],
        "turned": lambda: random(rng, (8, 11, 2, 2), dtype).transpose(3, 2, 1, 0),
        "every other": lambda: random(rng, (2, 2, 22, 16), dtype)[:, :, ::2, 1::2],
        "reversed": lambda: random(rng, shape, dtype)[:, ::-1, ::-1, ::-1],
        "one for all heads": lambda: mx.broadcast_to(random(rng, (2, 1, 11, 8), dtype), shape),
    }[kind]
    return {**{name: make() for name in "qkv"}, "mask": mask}


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_views_are_read_by_their_strides(kind, dtype):
    arrays = view(kind, np.random.default_rng(5), dtype)
    with on_the_host():
        found = bits(attention_kernel(**arrays, scale=0.4))
        assert found == bits(attention_kernel(**{n: mx.contiguous(x) for n, x in arrays.items()}, scale=0.4))


def test_gradients_are_those_of_the_plain_operation():
    arguments = CASES[0].arguments("float32")
    arrays = [arguments.pop(name) for name in "qkv"]

    def gradients(operation: Any) -> Any:
        return mx.grad(lambda *x: operation(*x, **arguments).square().sum(), argnums=(0, 1, 2))(*arrays)

    plain = gradients(attention_reference)
    with on_the_host():
        for ours, theirs in zip(gradients(attention), plain, strict=True):
            np.testing.assert_allclose(exact(ours), exact(theirs), rtol=1e-4, atol=1e-5)
            assert np.abs(exact(theirs)).max() > 0.01


# --- Which way a call goes ----------------------------------------------------------------------------------------


def refuse(**_: Any) -> Any:
    """Stand where kernels are built, and build none."""
    raise AssertionError("a kernel was built")


def arguments(**changes: Any) -> dict[str, Any]:
    """What the kernel suits, but for the changes."""
    return {**inputs(3, (1, 2, 2, 12, 12, 8), mx.float32), "scale": 0.3, **changes}


def test_what_suits_the_kernel_goes_there():
    with _loader.override("metal", refuse), pytest.raises(AssertionError, match="a kernel was built"):
        attention(**arguments())


@pytest.mark.parametrize(
    "changes",
    [
        {"q": mx.ones((1, 4, 8, 8))},  # few queries: MLX's own kernel
        {"mask": mx.ones((1, 1, 12, 12), dtype=mx.bool_)},
        {"mask": mx.zeros((1, 12))},  # added to the scores
        {"scale": -0.3},
        {"scale": 0.0},
        {"v": mx.ones((1, 2, 12, 8), dtype=mx.float16)},
        {"v": mx.ones((1, 2, 12, 16))},
        {name: mx.ones((1, 2, 12, 264)) for name in "qkv"},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_the_rest_is_left_to_mlx(changes):
    options = arguments(**changes)
    with _loader.override("metal", refuse):
        found = attention(**options)
    assert bits(found) == bits(attention_reference(**options))


@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("masked", [False, True])
def test_without_a_kernel_it_is_the_operation_that_the_stages_used(queries, masked):
    arrays = inputs(7, (2, 2, 2, queries, 12, 8), mx.float32)
    q, k, v = arrays.values()
    mask = masks(7, "padded", 2, 12) if masked else None
    own = mx.fast.scaled_dot_product_attention
    with use("off"):
        found = attention(q, k, v, scale=0.3, mask=mask)
        causal = attention(q, k, v, scale=0.3, causal=True, offset=12 - queries)
    # On a CPU many queries go another way, which is within rounding of this one.
    wanted = own(q, k, v, scale=0.3, mask=None if mask is None else mask[:, None, None, :])
    np.testing.assert_allclose(np.array(found), np.array(wanted), rtol=0, atol=1e-6)
    assert bits(causal) == bits(own(q, k, v, scale=0.3, mask="causal"))


def test_stages_still_call_one_operation_of_mlx(monkeypatch):
    """With the masks that it has kernels for, and under a name that training puts its own in the place of."""
    calls = []
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", lambda *_, **options: calls.append(options["mask"]))
    q, k, v = inputs(7, (1, 2, 2, 9, 12, 8), mx.float32).values()
    mask = masks(7, "padded", 1, 12)
    with use("off"):
        attention(q, k, v, scale=0.3)
        attention(q, k, v, scale=0.3, causal=True, offset=3)
        attention(q, k, v, scale=0.3, mask=mask)
        attention(q, k, v, scale=0.3, causal=True)
    assert calls[:2] == [None, "causal"]
    assert [seen.shape for seen in calls[2:]] == [(1, 1, 1, 12), (9, 12)]


@pytest.mark.parametrize("item_bytes", [2, 4])
def test_tiles_fit_into_threadgroup_memory(item_bytes):
    for width in range(1, 257):
        pitch = -(-width // 8) * 8 * item_bytes + 16
        for rows in (1, 7, 8, 9, 16, 17, 24, 25, 1000):
            tile_rows, tile_keys = tile_sizes(rows, width, item_bytes)
            assert tile_rows in (8, 16, 32)
            assert tile_keys in (8, 16, 32)
            assert tile_rows == 8 or tile_rows < rows + 8
            assert (tile_rows + tile_keys) * pitch <= 32768
