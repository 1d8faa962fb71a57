"""Weights by columns and side by side: the values of before, and their products.

MLX's products keep their bits, and so do one and two rows of NumPy's; more of those stay the same up to rounding.
"""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr._blas import loaded_blas
from qwen4b_asr.cpu.columns import by_columns, lay_out_by_columns, lay_out_for_numpy, side_by_side
from qwen4b_asr.cpu.products import NumpyLinear, Projection, multiply_by_numpy
from qwen4b_asr.decoder import Qwen3
from qwen4b_asr.joined import join_projections
from tests.helpers.tiny import CONFIG, max_abs, randomise, rows


@given(st.integers(1, 1100), st.integers(1, 90), st.integers(1, 9), st.integers(0, 99))
def test_values_stay_and_products_keep_their_bits(outputs, inputs, positions, seed):
    layer, turned = nn.Linear(inputs, outputs, bias=False), nn.Linear(inputs, outputs, bias=False)
    turned.weight = by_columns(layer.weight)
    assert np.array_equal(np.array(turned.weight), np.array(layer.weight))
    x = rows(positions, inputs, seed)[None]
    if "openblas" in (loaded_blas() or ""):
        assert np.array_equal(np.array(turned(x)), np.array(layer(x)))
    else:  # the only one for which it is done
        assert max_abs(turned(x) - layer(x)) <= 1e-5 * max(1.0, max_abs(layer(x)))


def test_it_is_the_columns_that_lie_side_by_side():
    weight = mx.random.normal((700, 30))
    assert np.array(by_columns(weight).T).flags.c_contiguous
    assert memoryview(by_columns(weight)).strides == (4, 2800)


def test_a_decoder_keeps_its_logits_and_its_shapes():
    plain, turned = (randomise(Qwen3(CONFIG.decoder), 3) for _ in range(2))
    paths = lay_out_by_columns(turned)
    assert "model.embed_tokens" in paths
    assert "model.layers.1.mlp.down_proj" in paths
    assert len(paths) == 1 + 7 * CONFIG.decoder.num_hidden_layers
    ids = mx.array([[3, 1, 299]])
    assert np.array_equal(np.array(turned.embed(ids)), np.array(plain.embed(ids)))
    x = rows(5, CONFIG.decoder.hidden_size)[None]
    assert max_abs(turned(x) - plain(x)) < 1e-5 * max_abs(plain(x))
    assert turned.model.embed_tokens.weight.shape == plain.model.embed_tokens.weight.shape


def test_other_types_and_codes_stay_as_they_are():
    model = randomise(Qwen3(CONFIG.decoder), 3)
    model.set_dtype(mx.bfloat16)
    join_projections(model)
    assert lay_out_by_columns(model) == []


def dense(outputs: int, inputs: int, seed: int, bias: bool = False) -> NumpyLinear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    randomise(layer, seed)
    multiply_by_numpy(layer)
    return layer


@given(st.lists(st.integers(2, 600), min_size=2, max_size=3), st.integers(2, 40), st.integers(0, 99))
def test_matrices_side_by_side_are_what_they_were(widths, inputs, seed):
    weights = [mx.random.normal((width, inputs), key=mx.random.key(seed + i)) for i, width in enumerate(widths)]
    found = [np.asarray(weight) for weight in side_by_side(weights)]
    for weight, matrix in zip(weights, found, strict=True):
        assert np.array_equal(matrix, np.array(weight))
    first = found[0].ctypes.data
    assert [matrix.ctypes.data - first for matrix in found] == [4 * sum(widths[:i]) for i in range(len(widths))]
    assert {matrix.strides for matrix in found} == {(4, 4 * sum(widths))}


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(2, 300),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_joined_products_are_the_separate_ones_and_single_rows_bit_for_bit(groups, inputs, count, together, bias, seed):
    layers = [dense(64 * group, inputs, seed + i, bias) for i, group in enumerate(groups)]
    if together:
        for layer, weight in zip(layers, side_by_side([layer.weight for layer in layers]), strict=True):
            layer.weight = weight
    else:
        for layer in layers:
            layer.weight = by_columns(layer.weight)
    x = np.array(rows(count, inputs, seed))
    projection = Projection(layers)
    assert (projection._whole is not None) == (not bias and (together or len(layers) == 1))
    wanted = np.concatenate([np.asarray(layer(mx.array(x))) for layer in layers], axis=1)
    if count < 3 or projection._whole is None:
        assert np.array_equal(projection(x), wanted)
    assert np.allclose(projection(x), wanted, rtol=0, atol=1e-5 * max(1.0, np.abs(wanted).max()))


def test_a_decoder_is_laid_out_for_numpy():
    sizes = replace(CONFIG.decoder, head_dim=32, intermediate_size=192)
    model, plain = (randomise(Qwen3(sizes), 3) for _ in range(2))
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[1].mlp
    narrowing = mlp.down_proj.weight
    paths = lay_out_for_numpy(model, threads=2)
    assert "model.embed_tokens" in paths
    assert "model.layers.1.mlp.down_proj" not in paths
    multiply_by_numpy(model)
    assert Projection([attention.q_proj, attention.k_proj, attention.v_proj])._whole is not None
    assert Projection([mlp.gate_proj, mlp.up_proj])._whole is not None
    assert mlp.down_proj.weight is narrowing
    x = rows(5, sizes.hidden_size)[None]
    assert max_abs(model(x) - plain(x)) < 1e-5 * max_abs(plain(x))


def test_outputs_that_threads_would_not_share_evenly_stay_apart():
    sizes = replace(CONFIG.decoder, head_dim=32, intermediate_size=192)
    for threads, joined in ((1, True), (3, False), (32, False)):
        model = randomise(Qwen3(sizes), 3)
        lay_out_for_numpy(model, threads)
        multiply_by_numpy(model)
        attention = model.model.layers[0].self_attn
        whole = Projection([attention.q_proj, attention.k_proj, attention.v_proj])._whole
        assert (whole is not None) == joined


def test_other_layers_are_left_where_numpy_would_find_them():
    model = randomise(Qwen3(CONFIG.decoder), 3)
    model.set_dtype(mx.bfloat16)
    assert lay_out_for_numpy(model, threads=1) == []
