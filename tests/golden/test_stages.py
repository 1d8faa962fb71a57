"""Every stage against the original code, at tiny sizes with random weights."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qwen4b_asr import features

from . import checks
from .support import compare, golden


@pytest.mark.parametrize("name", checks.WAVEFORMS)
def test_fbank(name: str) -> None:
    checks.check_fbank(name)


@pytest.mark.parametrize("name", checks.WAVEFORMS)
def test_features_with_the_real_statistics(name: str) -> None:
    checks.check_features(name)


def test_fbank_without_the_16_bit_scale() -> None:
    data = golden("features")
    unit = mx.array(np.sin(2 * np.pi * 440 * np.arange(16000) / 16000).astype(np.float32))
    front = features.Frontend(features.FrontendConfig(input_scale=1.0, lfr_m=1, lfr_n=1, cmvn=False))
    compare(front(unit), data["unscaled/sine"], "fbank", "a sine in [-1, 1]")


@pytest.mark.parametrize("count", checks.LFR_COUNTS)
def test_low_frame_rate(count: int) -> None:
    checks.check_lfr(count)


@pytest.mark.parametrize(("m", "n"), checks.LFR_SHAPES)
def test_low_frame_rate_of_other_shapes(m: int, n: int) -> None:
    data = golden("features")
    compare(features.low_frame_rate(mx.array(data["lfr/input"][:23]), m, n), data[f"lfr/{m}x{n}"], "exact", "rows")


@pytest.mark.parametrize("item", range(3))
def test_encoder_layer_by_layer(item: int) -> None:
    checks.check_encoder_layers(item)


def test_encoder_on_a_padded_batch() -> None:
    checks.check_encoder_batch()


@pytest.mark.parametrize("use_itn", [False, True])
@pytest.mark.parametrize("language", checks.LANGUAGES)
def test_encoder_queries(language: str, use_itn: bool) -> None:
    checks.check_encoder_query(language, use_itn)


@pytest.mark.parametrize("name", ["square", "shifted"])
def test_encoder_of_other_shapes(name: str) -> None:
    checks.check_encoder_variant(name)


def test_adaptor_layer_by_layer() -> None:
    checks.check_adaptor_layers()


def test_adaptor_on_zeros() -> None:
    checks.check_adaptor_zeros()


def test_adaptor_on_a_padded_batch() -> None:
    checks.check_adaptor_batch()


@pytest.mark.parametrize("name", checks.DECODERS)
class TestDecoder:
    def test_token_ids(self, name: str) -> None:
        checks.check_decoder_ids(name)

    def test_embeddings(self, name: str) -> None:
        checks.check_decoder_embeds(name)

    def test_padded_batch(self, name: str) -> None:
        checks.check_decoder_padded(name)

    def test_chunks_through_the_cache(self, name: str) -> None:
        checks.check_decoder_steps(name)

    def test_chunks_through_a_plain_cache(self, name: str) -> None:
        checks.check_decoder_steps(name, checks.Cache)

    def test_far_positions(self, name: str) -> None:
        checks.check_decoder_far(name)
