"""The same goldens with every kernel's Metal text run on the CPU in place of MLX's own operations.

A stage that quietly kept to the plain operations would pass as well, so each test also says which kernels it wants to
have been launched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest

from qwen4b_asr import features
from qwen4b_asr.kernels import _loader, fsmn
from tests.helpers import metal_host

from . import checks
from .support import GoldenMismatch, compare, golden

ENCODER = {"fsmn", "attention"}
DECODER = {"add_rms_norm", "qk_norm_rope", "attention"}
STEPS = {"add_rms_norm", "qk_norm_rope"}  # of up to 8 rows, whose attention is MLX's own on every device
GENERATION = {"add_rms_norm", "qk_norm_rope", "logits_argmax"}


@pytest.fixture(autouse=True)
def launches() -> Iterator[Counter[str]]:
    """Route all kernels through the host runner; counts their launches by name."""
    if reason := metal_host.unavailable():
        pytest.skip(reason)
    counts: Counter[str] = Counter()

    def build(*, name: str, **options: Any) -> Any:
        kernel = metal_host.metal_kernel(name=name, **options)
        known = next(word for word in (*ENCODER, *DECODER, *GENERATION, "lfr_cmvn") if f"_{word}_" in name)

        def launch(**call: Any) -> Any:
            counts[known] += 1
            return kernel(**call)

        return launch

    with _loader.override("metal", build):
        yield counts


@pytest.mark.parametrize("name", checks.WAVEFORMS)
def test_features(name: str, launches: Counter[str]) -> None:
    checks.check_features(name)
    assert launches == {"lfr_cmvn": 1}


@pytest.mark.parametrize("count", checks.LFR_COUNTS)
def test_stacked_frames(count: int, launches: Counter[str]) -> None:
    data = golden("features")
    frames = mx.array(data["lfr/input"][:count])
    width = 7 * frames.shape[1]
    rows = features.lfr_cmvn(frames, mx.zeros(width), mx.ones(width), m=7, n=6)
    compare(rows, data[f"lfr/{count}"], "exact", "rows")
    assert launches == {"lfr_cmvn": 1}


@pytest.mark.parametrize("item", range(3))
def test_encoder_layer_by_layer(item: int, launches: Counter[str]) -> None:
    checks.check_encoder_layers(item)
    layers = 5
    assert launches["fsmn"] == layers
    rows = golden("encoder")[f"single/{item}/states"].shape[0]
    assert launches["attention"] == (layers if rows > 8 else 0)


def test_encoder_on_a_padded_batch(launches: Counter[str]) -> None:
    checks.check_encoder_batch()
    assert set(launches) == ENCODER


@pytest.mark.parametrize("language", ["auto", "ko"])
def test_encoder_queries(language: str, launches: Counter[str]) -> None:
    checks.check_encoder_query(language, use_itn=True)
    assert set(launches) >= {"fsmn"}


@pytest.mark.parametrize("name", ["square", "shifted"])
def test_encoder_of_other_shapes(name: str, launches: Counter[str]) -> None:
    checks.check_encoder_variant(name)
    assert set(launches) == ENCODER


def test_adaptor_layer_by_layer(launches: Counter[str]) -> None:
    checks.check_adaptor_layers()
    assert set(launches) == {"attention"}


def test_adaptor_on_a_padded_batch(launches: Counter[str]) -> None:
    checks.check_adaptor_batch()
    assert set(launches) == {"attention"}


@pytest.mark.parametrize("name", checks.DECODERS)
class TestDecoder:
    def test_token_ids(self, name: str, launches: Counter[str]) -> None:
        checks.check_decoder_ids(name)
        assert set(launches) == DECODER

    def test_padded_batch(self, name: str, launches: Counter[str]) -> None:
        checks.check_decoder_padded(name)
        assert set(launches) >= STEPS

    def test_chunks_through_the_cache(self, name: str, launches: Counter[str]) -> None:
        checks.check_decoder_steps(name)
        assert set(launches) == STEPS

    def test_far_positions(self, name: str, launches: Counter[str]) -> None:
        checks.check_decoder_far(name)
        assert set(launches) == DECODER


@pytest.mark.parametrize("name", ["greedy", "penalty", "ngram", "both", "stop"])
def test_generated_ids(name: str, launches: Counter[str]) -> None:
    checks.check_generation(name)
    assert set(launches) == GENERATION


@pytest.mark.parametrize("name", checks.run_names())
def test_sound_to_ids(name: str, launches: Counter[str]) -> None:
    checks.check_pipeline(name)
    assert set(launches) == {"lfr_cmvn", *ENCODER, *GENERATION}


def test_a_defect_in_a_kernel_is_noticed(launches: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    header, body = fsmn._KERNEL.parts
    assert "float sum = x[i + LEFT]" in body
    monkeypatch.setattr(fsmn._KERNEL, "parts", (header, body.replace("float sum = x[i + LEFT]", "float sum = 0.0f")))
    with pytest.raises(GoldenMismatch):
        checks.check_encoder_layers(0)
    assert set(launches) == ENCODER
