"""Canary-Qwen's front end, encoder and projection against transformers, and folding of the batch norms."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from qwen4b_asr import fastconformer, mel

from . import canary
from .support import compare, golden


@pytest.mark.parametrize("name", canary.MEL_INPUTS)
def test_mel_frames(name: str) -> None:
    canary.check_mel(name)


def test_mel_energies_near_the_guard() -> None:
    canary.check_log_mel()


def test_mel_frames_by_the_published_files_rounding() -> None:
    canary.check_mel_rounded()


def test_the_rounding_of_the_published_file_is_heard() -> None:
    data = golden("canary")
    difference = data["mel/speech_rounded"] - data["mel/speech"]
    assert np.abs(difference).max() > 1e-3


def test_the_triangles_are_the_originals_to_the_last_bits() -> None:
    wanted = golden("canary")["mel/fb"]
    found = np.array(mel.mel_filters(mel.MelConfig()))
    assert np.abs(found - wanted).max() <= 2 * np.spacing(wanted.max())
    assert ((found > 0) == (wanted > 0)).all()


def test_encoder_part_by_part() -> None:
    canary.check_encoder_parts()


@pytest.mark.parametrize("item", range(4))
def test_encoder_items(item: int) -> None:
    canary.check_encoder_item(item)


def test_encoder_on_a_padded_batch() -> None:
    canary.check_encoder_batch()


def test_encoder_of_another_shape() -> None:
    canary.check_odd_encoder()


def test_recording_to_audio_rows() -> None:
    canary.check_speech()


@pytest.mark.parametrize("adapters", ["keep", "merge", "fuse"])
def test_recording_to_token_ids(adapters: str) -> None:
    canary.check_ids(adapters)


def test_folded_batch_norms_give_the_same() -> None:
    encoder = canary.build_encoder()
    before = len(tree_flatten(encoder.parameters()))
    encoder.fold_batch_norms()
    assert before - len(tree_flatten(encoder.parameters())) == 4 * len(encoder.layers)
    canary.check_encoder_batch(encoder)
    weights = [np.array(layer.conv.depthwise_conv.weight) for layer in encoder.layers]
    encoder.fold_batch_norms()  # once more changes nothing
    for layer, weight in zip(encoder.layers, weights, strict=True):
        assert np.array_equal(np.array(layer.conv.depthwise_conv.weight), weight)


def test_a_folded_encoder_can_be_built_and_filled() -> None:
    encoder = canary.build_encoder()
    encoder.fold_batch_norms()
    other = fastconformer.FastConformerEncoder(encoder.config)
    other.load_weights(tree_flatten(encoder.parameters()), strict=True)
    assert not other.config.batch_norm
    canary.check_encoder_item(0, other)


def test_the_convolution_and_the_sum_of_shifts_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = canary.build_encoder().layers[0].conv.depthwise_conv
    x = mx.random.normal((2, 13, 48), key=mx.random.key(3))
    shifts = np.array(conv(x))
    wanted = mx.conv1d(x, conv.weight, padding=4, groups=48) + conv.bias
    compare(shifts, np.array(wanted), "encoder", "sum of shifts")
    monkeypatch.setattr(fastconformer.mx, "default_device", lambda: mx.Device(mx.gpu))
    compare(conv(x), shifts, "encoder", "convolution")


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_stays_near(dtype: mx.Dtype) -> None:
    data, encoder = golden("canary"), canary.build_encoder()
    encoder.set_dtype(dtype)
    states, _ = encoder(mx.array(data["batch/features"][:1]))
    assert states.dtype == dtype
    wanted = data["single/0/states"]
    error = np.linalg.norm(np.array(states[0].astype(mx.float32)) - wanted) / np.linalg.norm(wanted)
    assert 1e-5 < error < (3e-2 if dtype == mx.float16 else 5e-2)
