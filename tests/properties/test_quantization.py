"""Quantised matrices: shapes, the layout bit by bit, and a decoder that equals the one with the same numbers dense."""

import json
from dataclasses import asdict, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from qwen4b_asr import quantization
from qwen4b_asr.cache import KVCache
from qwen4b_asr.decoder import DecoderConfig, Qwen3
from qwen4b_asr.lora import dense_weight, layer_shape
from qwen4b_asr.quantization import (
    Quantization,
    Scheme,
    UnpackingLinear,
    quantizable,
    quantize_modules,
    unpack,
    unpack_for_many_rows,
)
from tests.helpers.tiny import CONFIG, max_abs, randomise, rows

SIZES = replace(CONFIG.decoder, vocab_size=40, hidden_size=64, intermediate_size=96)
PATHS = sorted(quantizable(Qwen3(SIZES)))

affine = st.builds(Scheme, st.sampled_from([32, 64, 128]), st.sampled_from([1, 2, 3, 4, 5, 6, 8]))
schemes = affine | st.sampled_from([Scheme(32, 4, "mxfp4"), Scheme(32, 8, "mxfp8"), Scheme(16, 4, "nvfp4")])
# The feed-forward's 96 columns hold groups of 32 only.
fitting = schemes.filter(lambda scheme: scheme.group_size in (16, 32))


@pytest.fixture(autouse=True)
def on_the_cpu():
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


@given(schemes, st.integers(1, 9), st.integers(1, 4))
def test_shapes_are_those_that_mlx_makes_and_tell_the_scheme(scheme, count, groups):
    columns = groups * max(scheme.group_size, 32)
    matrix = mx.random.normal((count, columns))
    made = mx.quantize(matrix, group_size=scheme.group_size, bits=scheme.bits, mode=scheme.mode)
    shapes = scheme.shapes(count, columns)
    assert list(shapes.values()) == [tuple(array.shape) for array in made]
    found = Scheme.infer(columns, shapes["weight"][1], shapes["scales"][1], "biases" in shapes)
    assert found == scheme


@given(affine, st.integers(1, 5), st.integers(1, 3), st.sampled_from([mx.float32, mx.bfloat16]), st.integers(0, 99))
def test_the_codes_are_packed_from_the_low_bits_up(scheme, count, groups, dtype, seed):
    columns = groups * scheme.group_size
    matrix = rows(count, columns, seed).astype(dtype)
    weight, scales, biases = mx.quantize(matrix, group_size=scheme.group_size, bits=scheme.bits)
    bits = np.unpackbits(np.array(weight).view(np.uint8), axis=1, bitorder="little").reshape(count, columns, -1)
    codes = bits @ (1 << np.arange(scheme.bits))
    spread = [np.repeat(np.array(part.astype(mx.float32)), scheme.group_size, axis=1) for part in (scales, biases)]
    layer = nn.QuantizedLinear(columns, count, False, scheme.group_size, scheme.bits)
    layer.weight, layer.scales, layer.biases = weight, scales, biases
    dense, kind = dense_weight(layer)
    assert kind == dtype
    assert layer_shape(layer) == (count, columns)
    assert np.allclose(np.array(dense), codes * spread[0] + spread[1], atol=1e-5)


@given(
    fitting, st.dictionaries(st.sampled_from(PATHS), st.none() | fitting, max_size=6), st.booleans(), st.integers(0, 99)
)
def test_a_quantised_decoder_equals_the_dense_one_of_the_same_numbers(default, overrides, tied, seed):
    quantization = Quantization(default, overrides)
    sizes = replace(SIZES, tie_word_embeddings=tied)
    source = randomise(Qwen3(sizes), seed)
    quantize_modules(source, quantization)
    # Names and shapes are those that a configuration alone gives.
    built = Qwen3(replace(sizes, quantization=quantization))
    shapes = {name: (a.shape, a.dtype) for name, a in tree_flatten(built.parameters())}
    assert shapes == {name: (a.shape, a.dtype) for name, a in tree_flatten(source.parameters())}
    dense = Qwen3(sizes)
    flat = dict(tree_flatten(source.parameters()))
    for path, module in quantizable(dense).items():
        if f"{path}.scales" in flat:
            scheme = quantization.scheme(path)
            arrays = [flat.pop(f"{path}.{part}", None) for part in ("weight", "scales", "biases")]
            flat[f"{path}.weight"] = mx.dequantize(
                *arrays, group_size=scheme.group_size, bits=scheme.bits, mode=scheme.mode
            ).astype(mx.float32)
            assert flat[f"{path}.weight"].shape == module.weight.shape
    dense.load_weights(list(flat.items()), strict=True)
    ids = mx.array([[1, 5, 2, 39, 0]])
    wanted, found = dense(dense.embed(ids)), source(source.embed(ids))
    assert found.dtype == mx.float32
    assert max_abs(wanted - found) <= 2e-5 * max(1.0, max_abs(wanted))
    caches = [KVCache() for _ in source.model.layers]
    steps = mx.concatenate([source(source.embed(ids[:, i : i + 1]), caches) for i in range(5)], axis=1)
    assert max_abs(steps - found) <= 1e-4 * max(1.0, max_abs(found))


@given(schemes, st.dictionaries(st.sampled_from(PATHS), st.none() | schemes, max_size=4))
def test_what_json_keeps_is_the_same(default, overrides):
    config = replace(SIZES, quantization=Quantization(default, overrides))
    assert DecoderConfig(**json.loads(json.dumps(asdict(config)))) == config


@given(schemes, st.integers(1, 300))
def test_groups_must_divide_a_row(scheme, columns):
    assume(columns % scheme.group_size)
    with pytest.raises(ValueError, match="group_size"):
        scheme.shapes(3, columns)


@given(affine, st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_unpacked_codes_are_the_numbers_that_they_stand_for(scheme, count, groups, seed):
    parts = mx.quantize(rows(count, groups * scheme.group_size, seed), group_size=scheme.group_size, bits=scheme.bits)
    wanted = mx.dequantize(*parts, group_size=scheme.group_size, bits=scheme.bits)
    found = unpack(*parts, scheme)
    assert found.dtype == mx.float32
    assert mx.allclose(found, wanted, rtol=0, atol=1e-6)


@given(
    affine, st.booleans(), st.integers(1, 20), st.integers(1, 3), st.sampled_from([1, 700, 1 << 20]), st.integers(0, 99)
)
def test_a_layer_that_unpacks_computes_the_same_for_any_number_of_rows(scheme, bias, count, batch, numbers, seed):
    columns = 2 * scheme.group_size
    plain = nn.QuantizedLinear.from_linear(nn.Linear(columns, 7, bias), scheme.group_size, scheme.bits)
    other = nn.Sequential(nn.QuantizedLinear.from_linear(nn.Linear(columns, 7, bias), scheme.group_size, scheme.bits))
    other.layers[0].update(plain.parameters())
    unpack_for_many_rows(other)
    assert type(other.layers[0]) is UnpackingLinear
    x = rows(batch * count, columns, seed).reshape(batch, count, columns)
    wanted = plain(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization, "UNPACKED", numbers)
        found = other(x)
        assert found.shape == wanted.shape
        assert max_abs(found - wanted) <= 1e-5 * (1 + max_abs(wanted))
    few = x.reshape(-1, columns)[:6]
    assert mx.array_equal(other(few), plain(few))  # the same product: bit for bit


def test_a_large_matrix_is_never_there_as_a_whole_and_has_gradients(monkeypatch):
    monkeypatch.setattr(quantization, "UNPACKED", 1 << 16)
    plain = nn.QuantizedLinear(512, 8192, bits=4)
    mx.eval(plain.parameters())
    layer = nn.Sequential(nn.QuantizedLinear(512, 8192, bits=4))
    layer.layers[0].update(plain.parameters())
    unpack_for_many_rows(layer)
    x = rows(8, 512)
    mx.eval(x)
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    y = layer(x)
    mx.eval(y)
    mx.synchronize()
    assert mx.get_peak_memory() - before < 2 * y.nbytes + 4 * (4 << 16)  # of 16 MB
    slopes = [mx.grad(lambda x, one=one: (one(x) ** 2).sum())(x) for one in (layer, plain)]
    assert max_abs(slopes[0] - slopes[1]) <= 1e-5 * max_abs(slopes[1])


def test_only_affine_codes_with_float32_scales_are_unpacked():
    model = Qwen3(replace(SIZES, quantization=Quantization(Scheme(32, 4), {PATHS[1]: Scheme(32, 8, "mxfp8")})))
    model.set_dtype(mx.bfloat16)
    unpack_for_many_rows(model)
    assert not any(isinstance(m, UnpackingLinear) for m in model.modules())
    model.set_dtype(mx.float32)
    unpack_for_many_rows(model)
    changed = {path for path, m in model.named_modules() if isinstance(m, UnpackingLinear)}
    assert changed == {path for path in PATHS if path not in (PATHS[1], "model.embed_tokens")}


def test_many_rows_are_not_multiplied_code_by_code(monkeypatch):
    layer = nn.QuantizedLinear.from_linear(nn.Linear(64, 8), 64, 4)
    unpack_for_many_rows(layer)
    counts = []
    product = mx.quantized_matmul
    monkeypatch.setattr(mx, "quantized_matmul", lambda x, *a, **k: counts.append(x.shape[-2]) or product(x, *a, **k))
    for count in (1, 6, 7, 300):
        layer(rows(count, 64))
    assert counts == [1, 6]
