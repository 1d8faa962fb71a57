"""Weights by columns and side by side: the values of before, and the same products bit for bit."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen4b_asr._blas import loaded_blas
from qwen4b_asr.cpu import columns, products
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
    st.lists(st.integers(1, 600), min_size=1, max_size=3),
    st.sampled_from([1, 32]),
    st.integers(2, 500),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
@example([36, 2], 32, 1299, 3, True, False, 0)  # the first is computed as eight rows, the second, small, as three
def test_joined_products_are_the_separate_ones_bit_for_bit(groups, unit, inputs, count, together, bias, seed):
    layers = [dense(unit * group, inputs, seed + i, bias) for i, group in enumerate(groups)]
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
    assert np.array_equal(projection(x), wanted)


@pytest.mark.parametrize("exact", [True, False])
def test_few_rows_are_one_product_where_that_is_exact(monkeypatch, exact):
    layers = [dense(64, 32, seed) for seed in range(3)]
    for layer, weight in zip(layers, side_by_side([layer.weight for layer in layers]), strict=True):
        layer.weight = weight
    projection, multiply, widths = Projection(layers), products.multiply_rows, []
    monkeypatch.setattr(products, "_same_bits", lambda *_: exact)
    monkeypatch.setattr(products, "multiply_rows", lambda x, y: widths.append(y.shape[1]) or multiply(x, y))
    for count in (1, 2, 3, 16, 17):
        widths.clear()
        projection(np.array(rows(count, 32)))
        assert widths == ([192] if exact and count < 17 else [64, 64, 64])


def test_other_orders_of_adding_are_found_out(monkeypatch):
    """With a product that depends on the width, and with one that does not, in place of a BLAS."""
    monkeypatch.setattr(products, "multiply_rows", lambda x, y: np.ones((len(x), y.shape[1]), np.float32))
    assert products._same_bits.__wrapped__(7, (5, 6), 1)
    monkeypatch.setattr(products, "multiply_rows", lambda x, y: np.full((len(x), y.shape[1]), 1e-7 * y.shape[1]))
    assert not products._same_bits.__wrapped__(7, (5, 6), 1)


@pytest.mark.parametrize("exact", [True, False])
def test_a_decoder_is_laid_out_for_numpy(monkeypatch, exact):
    for module in (columns, products):
        monkeypatch.setattr(module, "joins_exactly", lambda *_, **__: exact)
    model, plain = (randomise(Qwen3(CONFIG.decoder), 3) for _ in range(2))
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[1].mlp
    narrowing = mlp.down_proj.weight
    paths = lay_out_for_numpy(model)
    assert {"model.embed_tokens", "model.layers.1.mlp.up_proj"} <= set(paths)
    assert "model.layers.1.mlp.down_proj" not in paths
    multiply_by_numpy(model)
    assert (Projection([attention.q_proj, attention.k_proj, attention.v_proj])._whole is not None) == exact
    assert (Projection([mlp.gate_proj, mlp.up_proj])._whole is not None) == exact
    assert mlp.down_proj.weight is narrowing
    x = rows(5, CONFIG.decoder.hidden_size)[None]
    assert max_abs(model(x) - plain(x)) < 1e-5 * max_abs(plain(x))


def test_other_layers_are_left_where_numpy_would_find_them():
    model = randomise(Qwen3(CONFIG.decoder), 3)
    model.set_dtype(mx.bfloat16)
    assert lay_out_for_numpy(model) == []
