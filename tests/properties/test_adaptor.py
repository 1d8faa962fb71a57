"""The adaptor: padding invisible, a batch equals its items, rows in any order."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.adaptor import AdaptorConfig
from qwen4b_asr.features import pad_features
from tests.helpers.tiny import CONFIG, max_abs, ragged_lengths, rows, tiny_model

WIDTH = CONFIG.adaptor.input_size


@given(ragged_lengths(), st.integers(0, 99))
def test_a_batch_equals_its_items(lengths, seed):
    adaptor = tiny_model().adaptor
    items = [rows(n, WIDTH, seed + i) for i, n in enumerate(lengths)]
    batch = adaptor(*pad_features(items))
    for i, (item, n) in enumerate(zip(items, lengths, strict=True)):
        alone = adaptor(item[None])[0]
        assert max_abs(batch[i, :n] - alone) < 2e-5 * max(1.0, max_abs(alone))


@given(st.integers(1, 20), st.integers(1, 12), st.floats(-1e4, 1e4), st.integers(0, 99))
def test_the_contents_of_padding_are_invisible(length, padding, junk, seed):
    adaptor = tiny_model().adaptor
    x = rows(length, WIDTH, seed)[None]
    mask = mx.arange(length + padding)[None] < length
    zeros = mx.concatenate([x, mx.zeros((1, padding, WIDTH))], axis=1)
    dirty = mx.concatenate([x, mx.full((1, padding, WIDTH), junk)], axis=1)
    assert np.array_equal(np.array(adaptor(zeros, mask)[:, :length]), np.array(adaptor(dirty, mask)[:, :length]))


@given(st.permutations(range(7)), st.integers(0, 99))
def test_rows_have_no_positions(order, seed):
    adaptor = tiny_model().adaptor
    x = rows(7, WIDTH, seed)[None]
    order = mx.array(order)
    assert max_abs(adaptor(x)[:, order] - adaptor(x[:, order])) < 1e-4


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="audio states must be 32 wide but got 31"):
        tiny_model().adaptor(mx.zeros((1, 3, 31)))
    with pytest.raises(ValueError, match="num_heads must divide"):
        AdaptorConfig(num_heads=3)
