"""Rows times quantised matrices on NumPy: what MLX's own product gives, for any form, size and number of rows."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.batch_generate import BatchGeneration
from qwen4b_asr.cpu import codes, products
from qwen4b_asr.cpu.decoder import NumpyDecoderLayer
from qwen4b_asr.decoder import Qwen3
from qwen4b_asr.generate import Generation, GenerationOptions
from qwen4b_asr.pass_costs import PassCost, Stakes
from qwen4b_asr.prepare import prepare_decoder
from qwen4b_asr.quantization import Quantization, Scheme, quantize_modules, unpack_for_many_rows
from qwen4b_asr.sampling import SamplingOptions
from qwen4b_asr.speculate import DraftedGeneration
from tests.helpers.tiny import CONFIG, max_abs, randomise, rows


@given(
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([32, 64, 128]),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 33),
    st.sampled_from([1, 300, 1 << 19]),
    st.integers(0, 99),
)
def test_codes_times_rows(bits, size, outputs, groups, count, block, seed):
    weight, scales, biases = mx.quantize(rows(outputs, size * groups, seed), size, bits)
    x = rows(count, size * groups, seed + 1)
    wanted = np.array(mx.quantized_matmul(x, weight, scales, biases, group_size=size, bits=bits, stream=mx.cpu))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codes, "_BLOCK", block)
        found = codes.multiply_codes(*(np.array(array) for array in (x, weight, scales, biases)), bits)
    assert found.shape == wanted.shape
    # The sums of codes and the biases cancel: what is left of rounding goes by the size of either.
    size_of_terms = np.abs(np.array(x)) @ np.abs(np.array(mx.dequantize(weight, scales, biases, size, bits))).T
    assert (np.abs(found - wanted) <= 2e-6 * (size_of_terms + np.abs(wanted))).all()


def layer(kind: str, bits: int, mode: str = "affine", dtype: mx.Dtype = mx.float32) -> nn.Module:
    """A module with a quantised child, made ready as a loaded model is."""
    size = 64 if mode == "affine" else 32
    dense = nn.Linear(128, 24) if kind == "linear" else nn.Embedding(24, 128)
    dense.set_dtype(dtype)
    whole = nn.Sequential(dense)
    nn.quantize(whole, size, bits, mode=mode)
    whole.eval()
    unpack_for_many_rows(whole)
    products.multiply_by_numpy(whole)
    return whole.layers[0]


@pytest.fixture
def counted(monkeypatch):
    """Rows of the products that NumPy computed with codes."""
    counts: list[int] = []
    multiply = products.multiply_codes
    monkeypatch.setattr(products, "multiply_codes", lambda x, *rest: counts.append(len(x)) or multiply(x, *rest))
    return counts


def plainly(module: nn.Module, x: mx.array) -> mx.array:
    form = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    y = mx.quantized_matmul(x, module.weight, module.scales, module.get("biases"), **form, stream=mx.cpu)
    return y + module.bias if "bias" in module else y


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("bits", [4, 8])
def test_layers_leave_few_rows_to_numpy(counted, kind, bits):
    module = layer(kind, bits)
    product = module if kind == "linear" else module.as_linear
    assert module.computes_at_once
    for shape in ((128,), (1, 1, 128), (2, 3, 128), (4, 8, 128), (33, 128)):
        x = mx.random.normal(shape, key=mx.random.key(len(shape)))
        wanted = plainly(module, x)
        assert product(x).shape == wanted.shape
        assert max_abs(product(x) - wanted) <= 1e-5 * max_abs(wanted)
    assert counted == [1, 1, 1, 1, 6, 6, 32, 32]  # 33 are too many
    module.train()
    slope = mx.grad(lambda x: (product(x) ** 2).sum())(x[:1])
    assert max_abs(slope) > 0
    assert len(counted) == 8


def test_embeddings_are_looked_up_by_mlx(counted):
    module = layer("embedding", 8)
    wanted = mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
    assert mx.array_equal(module(mx.array([3, 0])), wanted[mx.array([3, 0])])
    assert not counted


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("linear", {"bits": 6}),
        ("embedding", {"bits": 3}),
        ("linear", {"bits": 8, "mode": "mxfp8"}),
        ("embedding", {"bits": 4, "mode": "mxfp4"}),
        ("linear", {"bits": 4, "dtype": mx.bfloat16}),
        ("embedding", {"bits": 4, "dtype": mx.bfloat16}),
    ],
)
def test_other_forms_are_left_to_mlx(counted, kind, form):
    module = layer(kind, **form)
    x = rows(3, 128).astype(form.get("dtype", mx.float32))
    assert mx.array_equal(module(x) if kind == "linear" else module.as_linear(x), plainly(module, x))
    assert not counted
    assert not getattr(module, "computes_at_once", False)


@given(
    st.sampled_from([4, 8]), st.lists(st.integers(0, 23), max_size=5), st.sampled_from([1.0, 1.2]), st.integers(0, 9)
)
def test_drafts_and_batches_change_nothing(bits, wrong, penalty, seed):
    sizes = replace(CONFIG.decoder, hidden_size=64, intermediate_size=96)
    decoder = randomise(Qwen3(sizes), seed)
    quantize_modules(decoder, Quantization(Scheme(32, bits)))
    decoder.eval()  # the quantised layers are new
    unpack_for_many_rows(decoder)
    prepare_decoder(decoder)
    if products.numpy_multiplies():
        assert type(decoder.model.layers[0]) is NumpyDecoderLayer
        assert decoder.computes_at_once
        assert not any(module.training for module in decoder.modules())
    options = GenerationOptions(24, (), SamplingOptions(repetition_penalty=penalty))
    prompts = [rows(count, 64, seed + count) for count in (5, 9, 2)]
    alone = [list(Generation(decoder, prompt, options)) for prompt in prompts]
    draft = [299 if i in wrong else token for i, token in enumerate(alone[0])]
    reckless = Stakes(PassCost(0.03), 24)
    drafted = DraftedGeneration(decoder, prompts[0], options, draft, stakes=reckless)
    assert list(drafted) == alone[0]
    assert drafted.drafted
    batch = BatchGeneration(decoder, [(prompt, options) for prompt in prompts], 3)
    assert {row.number: row.tokens for row in batch} == dict(enumerate(alone))
