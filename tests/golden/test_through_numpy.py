"""The same goldens with what stands in for MLX on a CPU: products, the encoder's and the decoder's layers in NumPy.

A stage that quietly kept to MLX would pass as well, so each test also says what NumPy is to have multiplied.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import pytest

from qwen4b_asr.cpu import arithmetic, columns, listening, products
from qwen4b_asr.cpu.decoder import NumpyDecoderLayer, use_numpy_layers

from . import checks
from .support import GoldenMismatch, fill, golden

ENCODER_PRODUCTS = 4  # of a layer
DECODER_PRODUCTS = 4  # queries, keys and values are one, and so are the two halves of the MLP


@pytest.fixture(autouse=True)
def used(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Make every model ready for NumPy as `prepare` does; counts products, and layers of each kind."""
    counts: Counter[str] = Counter()

    def filled(module: Any, weights: Any) -> Any:
        fill(module, weights)
        columns.lay_out_for_numpy(module)
        products.multiply_by_numpy(module)
        counts["listening layers"] += len(listening.listen_with_numpy(module))
        counts["decoder layers"] += len(use_numpy_layers(module))
        return module

    def counted(function: Any) -> Any:
        def call(*args: Any) -> Any:
            counts["products"] += 1
            return function(*args)

        return call

    monkeypatch.setattr(checks, "fill", filled)
    for module in (columns, products):  # whatever this BLAS does: these weights would be too small for most
        monkeypatch.setattr(module, "joins_exactly", lambda *_, **__: True)
    for module, name in ((products, "multiply_rows"), (listening, "multiply_columns")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return counts


@pytest.mark.parametrize("item", range(3))
def test_encoder_layer_by_layer(item: int, used: Counter[str]) -> None:
    checks.check_encoder_layers(item)
    assert used["listening layers"] == 5
    assert used["products"] >= 5 * ENCODER_PRODUCTS


def test_encoder_on_a_padded_batch(used: Counter[str]) -> None:
    checks.check_encoder_batch()
    assert used["products"] >= 5 * ENCODER_PRODUCTS


@pytest.mark.parametrize("name", ["square", "shifted"])
def test_encoder_of_other_shapes(name: str, used: Counter[str]) -> None:
    checks.check_encoder_variant(name)
    assert used["listening layers"]


def test_adaptor_layer_by_layer(used: Counter[str]) -> None:
    checks.check_adaptor_layers()
    layers = golden("adaptor").fact("config")["num_layers"]
    assert used["listening layers"] == layers
    assert used["products"] == 4 * layers + 2


def test_adaptor_on_a_padded_batch(used: Counter[str]) -> None:
    checks.check_adaptor_batch()
    assert used["products"]


@pytest.mark.parametrize("name", checks.DECODERS)
class TestDecoder:
    def test_token_ids(self, name: str, used: Counter[str]) -> None:
        checks.check_decoder_ids(name)
        assert used["products"] == DECODER_PRODUCTS * used["decoder layers"] + 1

    def test_embeddings(self, name: str, used: Counter[str]) -> None:
        checks.check_decoder_embeds(name)
        assert used["decoder layers"]

    def test_padded_batch(self, name: str, used: Counter[str]) -> None:
        checks.check_decoder_padded(name)
        assert used["decoder layers"]

    def test_chunks_through_the_cache(self, name: str, used: Counter[str]) -> None:
        checks.check_decoder_steps(name)
        assert used["decoder layers"]

    def test_far_positions(self, name: str, used: Counter[str]) -> None:
        checks.check_decoder_far(name)
        assert used["decoder layers"]


@pytest.mark.parametrize("name", ["greedy", "penalty", "ngram", "both", "stop"])
def test_generated_ids(name: str, used: Counter[str]) -> None:
    checks.check_generation(name)
    assert used["decoder layers"]


@pytest.mark.parametrize("name", checks.run_names())
def test_sound_to_ids(name: str, used: Counter[str]) -> None:
    checks.check_pipeline(name)
    assert used["decoder layers"]
    assert used["listening layers"]


def interleaved(x: Any, offsets: Any, theta: float) -> Any:
    """Turn neighbours instead of halves."""
    y = mx.fast.rope(mx.array(x), x.shape[3], traditional=True, base=theta, scale=1.0, offset=offsets[0])
    return products.view(y)


DEFECTS = {
    "the memory block looks one row too far": (
        checks.check_encoder_batch,
        (listening, "memory", lambda v, w, m, left: arithmetic_memory(v, w, m, left - 1)),
    ),
    "padding is seen by the encoder": (
        checks.check_encoder_batch,
        (listening, "attention", lambda q, k, v, scale, mask: arithmetic.attention(q, k, v, scale)),
    ),
    "padding is seen by the adaptor": (
        checks.check_adaptor_batch,
        (listening, "attention", lambda q, k, v, scale, mask: arithmetic.attention(q, k, v, scale)),
    ),
    "the epsilon of the layer norms is left out": (
        lambda: checks.check_encoder_layers(0),
        (listening, "layer_norm", lambda x, w, b, eps, out: arithmetic.layer_norm(x, w, b, 1e-2, out)),
    ),
    "the bias is left out": (
        checks.check_adaptor_layers,
        (products, "multiply", lambda x, weight, bias=None: arithmetic_multiply(x, weight)),
    ),
    "neighbours are turned": (
        lambda: checks.check_decoder_ids("generation"),
        ("qwen4b_asr.cpu.decoder", "rotate", interleaved),
    ),
    "what comes later is seen": (
        lambda: checks.check_decoder_ids("generation"),
        ("qwen4b_asr.cpu.decoder", "attention", lambda q, k, v, s, m, causal: arithmetic.attention(q, k, v, s, m)),
    ),
    "steps begin at position 0": (
        lambda: checks.check_decoder_steps("generation"),
        ("qwen4b_asr.cpu.decoder", "rotate", lambda x, offsets, theta: arithmetic.rotate(x, [0], theta)),
    ),
    "the mask is left out": (
        lambda: checks.check_decoder_padded("generation"),
        ("qwen4b_asr.cpu.decoder", "attention", lambda q, k, v, s, m, causal: arithmetic.attention(q, k, v, s)),
    ),
}
arithmetic_memory, arithmetic_multiply = listening.memory, products.multiply


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_noticed(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, (module, name, changed) = DEFECTS[defect]
    if isinstance(module, str):
        monkeypatch.setattr(f"{module}.{name}", changed)
    else:
        monkeypatch.setattr(module, name, changed)
    with pytest.raises(GoldenMismatch):
        check()


def test_other_types_keep_to_mlx() -> None:
    decoder = checks.build_decoder("generation")
    assert all(type(layer) is NumpyDecoderLayer for layer in decoder.model.layers)
    decoder.set_dtype(mx.bfloat16)
    y = decoder(decoder.embed(mx.array([[1, 2, 3]])))
    assert y.dtype == mx.bfloat16
    assert bool(mx.all(mx.isfinite(y)))
