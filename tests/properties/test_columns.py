"""Weights by columns: the values of before, and the same products bit for bit."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr._blas import loaded_blas
from qwen4b_asr.cpu.columns import by_columns, lay_out_by_columns
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
