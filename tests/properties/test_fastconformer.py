"""FastConformer: padding and its contents invisible, a batch equals its items, attention by definition, folding."""

import math
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.fastconformer import (
    FastConformerConfig,
    FastConformerEncoder,
    RelativeAttention,
    align_distances,
    relative_positions,
)
from qwen4b_asr.features import pad_features
from qwen4b_asr.projection import Projection, ProjectionConfig
from tests.helpers.tiny import max_abs, ragged_lengths, randomise, rows

CONFIG = FastConformerConfig(
    input_size=12,
    output_size=16,
    attention_heads=2,
    linear_units=20,
    num_blocks=2,
    kernel_size=5,
    subsampling_channels=4,
)


def whiten(encoder: FastConformerEncoder) -> FastConformerEncoder:
    """Make every variance of a random encoder one that a variance can be."""
    for layer in encoder.layers:
        if layer.conv.batch_norm is not None:
            layer.conv.batch_norm.running_var = 0.1 + mx.square(layer.conv.batch_norm.running_var)
    return encoder


@cache
def tiny_encoder(seed: int = 0) -> FastConformerEncoder:
    encoder = FastConformerEncoder(CONFIG)
    randomise(encoder, seed)
    return whiten(encoder)


@given(ragged_lengths(most=60), st.integers(0, 99))
def test_a_batch_equals_its_items(lengths, seed):
    encoder = tiny_encoder()
    items = [rows(n, 12, seed + i) for i, n in enumerate(lengths)]
    states, mask = encoder(*pad_features(items))
    assert np.array(mask).sum(axis=1).tolist() == [math.ceil(n / 8) for n in lengths]
    assert states.shape[1] == CONFIG.rows(max(lengths))
    for i, (item, n) in enumerate(zip(items, lengths, strict=True)):
        alone, whole = encoder(item[None])
        assert alone.shape[1] == whole.shape[1] == CONFIG.rows(n)
        assert max_abs(states[i, : CONFIG.rows(n)] - alone[0]) < 2e-5 * max(1.0, max_abs(alone))


@given(
    st.integers(1, 40),
    st.integers(1, 20),
    st.floats(-1e4, 1e4) | st.just(math.nan) | st.just(math.inf),
    st.integers(0, 99),
)
def test_the_contents_of_padding_are_invisible(length, padding, junk, seed):
    x = rows(length, 12, seed)[None]
    mask = mx.arange(length + padding)[None] < length
    zeros = mx.concatenate([x, mx.zeros((1, padding, 12))], axis=1)
    dirty = mx.concatenate([x, mx.full((1, padding, 12), junk)], axis=1)
    clean_states, dirty_states = (tiny_encoder()(f, mask)[0][:, : CONFIG.rows(length)] for f in (zeros, dirty))
    assert np.array_equal(np.array(clean_states), np.array(dirty_states))


@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_attention_equals_its_definition(length, heads, half_width, seed):
    size = 2 * heads * half_width
    width = size // heads
    attention = RelativeAttention(
        FastConformerConfig(input_size=8, output_size=size, attention_heads=heads, linear_units=4, num_blocks=1)
    )
    randomise(attention, seed)
    x = rows(length, size, seed + 1)
    ours = np.array(attention(x[None], relative_positions(length, size), None))[0]
    weight = {name: np.array(getattr(attention, name).weight, np.float64) for name in ("linear_pos", "linear_out")}
    q, k, v = (np.array(f(x)).reshape(length, heads, width) for f in (
        attention.linear_q, attention.linear_k, attention.linear_v))  # fmt: skip
    context = np.zeros((length, size))
    for h in range(heads):
        for i in range(length):
            scores = []
            for j in range(length):
                angles = [(i - j) / 10000 ** (2 * c / size) for c in range(size // 2)]
                encoding = np.array([f(a) for a in angles for f in (math.sin, math.cos)])
                position = (weight["linear_pos"] @ encoding)[h * width : (h + 1) * width]
                content = (q[i, h] + np.array(attention.pos_bias_u)[h]) @ k[j, h]
                scores.append((content + (q[i, h] + np.array(attention.pos_bias_v)[h]) @ position) / width**0.5)
            chance = np.exp(np.array(scores) - max(scores))
            context[i, h * width : (h + 1) * width] = chance / chance.sum() @ v[:, h]
    slow = context @ weight["linear_out"].T + np.array(attention.linear_out.bias)
    assert np.abs(ours - slow).max() < 1e-4 * max(1.0, np.abs(slow).max())


@given(st.integers(1, 12), st.integers(1, 3))
def test_distances_are_aligned_with_keys(length, heads):
    distances = mx.broadcast_to(mx.arange(length - 1, -length, -1), (2, heads, length, 2 * length - 1))
    aligned = np.array(align_distances(distances))
    places = np.arange(length)
    assert np.array_equal(aligned, np.broadcast_to(places[:, None] - places[None], (2, heads, length, length)))


@given(st.integers(1, 30), st.integers(0, 99))
def test_folding_changes_nothing_but_rounding(length, seed):
    encoder = FastConformerEncoder(CONFIG)
    whiten(randomise(encoder, seed))
    x = rows(length, 12, seed + 1)[None]
    before, _ = encoder(x)
    mx.eval(before)
    encoder.fold_batch_norms()
    after, _ = encoder(x)
    assert max_abs(after - before) < 2e-5 * max(1.0, max_abs(before))


def test_batch_norms_keep_their_statistics_in_training():
    encoder = tiny_encoder(1)
    x = rows(40, 12)[None]
    calm, _ = encoder(x)
    encoder.train()
    trained, _ = encoder(x)
    encoder.eval()
    assert np.array_equal(np.array(calm), np.array(trained))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_an_item_without_any_real_row_is_finite(dtype):
    encoder = FastConformerEncoder(CONFIG)
    whiten(randomise(encoder, 3)).set_dtype(dtype)
    states, mask = encoder(rows(24, 12)[None], mx.zeros((1, 24), dtype=mx.bool_))
    assert not mx.any(mask)
    assert mx.all(mx.isfinite(states))


def test_what_others_are_told_changes_nothing():
    x = rows(20, 12)[None]
    assert np.array_equal(np.array(tiny_encoder()(x)[0]), np.array(tiny_encoder()(x, language="zh", use_itn=True)[0]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "sanm"}, "kind must be 'fastconformer' but got 'sanm'"),
        ({"num_blocks": 0}, "num_blocks must be at least 1"),
        ({"subsampling_channels": 0}, "subsampling_channels must be at least 1"),
        ({"attention_heads": 3}, "attention_heads must divide output_size 16 but got 3"),
        ({"output_size": 15, "attention_heads": 5}, "output_size must be even"),
        ({"kernel_size": 4}, "kernel_size must be odd but got 4"),
        ({"subsampling_factor": 6}, "subsampling_factor must be a power of two but got 6"),
        ({"subsampling_factor": 1}, "subsampling_factor must be a power of two but got 1"),
    ],
)
def test_impossible_sizes_are_refused(values, message):
    sizes = dict(output_size=16, attention_heads=2, input_size=8, linear_units=8, num_blocks=1)
    with pytest.raises(ValueError, match=r"\[FastConformerConfig\] " + message):
        FastConformerConfig(**{**sizes, **values})


def test_misshapen_inputs_are_refused():
    with pytest.raises(ValueError, match="features must be 12 wide but got 13"):
        tiny_encoder()(mx.zeros((1, 9, 13)))
    with pytest.raises(ValueError, match=r"mask must be \(1, 9\) but got \(1, 8\)"):
        tiny_encoder()(mx.zeros((1, 9, 12)), mx.ones((1, 8), dtype=mx.bool_))


def test_the_projection_maps_each_row_by_itself():
    projection = Projection(ProjectionConfig(input_size=6, output_size=4))
    randomise(projection, 5)
    x = rows(7, 6)
    alone = mx.concatenate([projection(row[None, None])[0] for row in x])
    mask = mx.zeros((1, 7), dtype=mx.bool_)
    assert max_abs(projection(x[None], mask)[0] - alone) < 1e-6
    with pytest.raises(ValueError, match="audio states must be 6 wide but got 5"):
        projection(mx.zeros((1, 2, 5)))
    for values in ({"kind": "nano"}, {"input_size": 0}, {"output_size": 0}):
        with pytest.raises(ValueError, match="ProjectionConfig"):
            ProjectionConfig(**values)
