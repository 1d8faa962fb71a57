"""The encoder: padding and its contents invisible, a batch equals its items, the memory block by definition."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.encoder import LANGUAGE_QUERIES, EncoderConfig, SenseVoiceEncoder, sinusoidal_positions
from qwen4b_asr.features import pad_features
from qwen4b_asr.kernels.fsmn import fsmn
from tests.helpers.tiny import CONFIG, max_abs, ragged_lengths, randomise, rows, tiny_model

WIDTH = CONFIG.encoder.input_size


@given(ragged_lengths(), st.integers(0, 99))
def test_a_batch_equals_its_items(lengths, seed):
    encoder = tiny_model().audio_encoder
    items = [rows(n, WIDTH, seed + i) for i, n in enumerate(lengths)]
    states, mask = encoder(*pad_features(items))
    assert np.array(mask).sum(axis=1).tolist() == [n + 4 for n in lengths]
    for i, (item, n) in enumerate(zip(items, lengths, strict=True)):
        alone, _ = encoder(item[None])
        assert max_abs(states[i, : n + 4] - alone[0]) < 2e-5 * max(1.0, max_abs(alone))


@given(st.integers(1, 20), st.integers(1, 12), st.floats(-1e4, 1e4), st.integers(0, 99))
def test_the_contents_of_padding_are_invisible(length, padding, junk, seed):
    encoder = tiny_model().audio_encoder
    x = rows(length, WIDTH, seed)[None]
    mask = mx.arange(length + padding)[None] < length
    zeros = mx.concatenate([x, mx.zeros((1, padding, WIDTH))], axis=1)
    dirty = mx.concatenate([x, mx.full((1, padding, WIDTH), junk)], axis=1)
    clean_states, dirty_states = (encoder(f, mask)[0][:, : length + 4] for f in (zeros, dirty))
    assert np.array_equal(np.array(clean_states), np.array(dirty_states))


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 11), st.integers(0, 10), st.booleans(), st.integers(0, 99))
def test_the_memory_block_equals_its_definition(length, size, taps, left, shifted_adds, seed):
    left = min(left, taps - 1)
    v = np.array(rows(length, size, seed))
    weight = np.array(rows(size, taps, seed + 1))
    mask = np.array(rows(length, 1, seed + 2)) > -0.5
    slow = np.zeros_like(v)
    for t in range(length):
        for d in range(size):
            total = v[t, d] * mask[t, 0]
            for k in range(taps):
                source = t + k - left
                if 0 <= source < length:
                    total += v[source, d] * mask[source, 0] * weight[d, k]
            slow[t, d] = total * mask[t, 0]
    packed = np.concatenate([np.full_like(v, np.nan), v], axis=1)
    ours = fsmn(
        mx.array(packed)[None],
        mx.array(weight)[:, :, None],
        mx.array(mask[:, 0])[None],
        left=left,
        shifted_adds=shifted_adds,
    )
    assert np.abs(np.array(ours[0]) - slow).max() < 1e-5


def test_positions_count_from_one_as_sines_then_cosines():
    p = np.array(sinusoidal_positions(3, 560))
    assert p.dtype == np.float32
    assert p[0, 0] == pytest.approx(math.sin(1.0), abs=1e-6)
    assert p[2, 280] == pytest.approx(math.cos(3.0), abs=1e-6)
    assert p[1, 279] == pytest.approx(math.sin(2e-4), abs=1e-8)


def test_training_and_inference_agree():
    encoder = tiny_model().audio_encoder
    x = rows(9, WIDTH, 5)[None]
    quick, _ = encoder(x)
    encoder.train()
    slow, _ = encoder(x)
    encoder.eval()
    assert max_abs(quick - slow) < 1e-4 * max_abs(quick)


def test_language_and_text_norm_reach_the_query_frames():
    encoder = tiny_model().audio_encoder
    x = rows(5, WIDTH, 6)[None]
    outputs = [np.array(encoder(x, language=name)[0]) for name in LANGUAGE_QUERIES]
    outputs.append(np.array(encoder(x, use_itn=True)[0]))
    for i, a in enumerate(outputs):
        for b in outputs[i + 1 :]:
            assert np.abs(a - b).max() > 1e-3


def test_each_utterance_may_have_its_language():
    encoder = tiny_model().audio_encoder
    x = rows(5, WIDTH, 7)
    both, _ = encoder(mx.stack([x, x]), language=["zh", "en"])
    assert max_abs(both[0] - encoder(x[None], language="zh")[0][0]) < 1e-4
    assert max_abs(both[1] - encoder(x[None], language="en")[0][0]) < 1e-4


def test_ctc_logits_have_one_score_per_symbol():
    encoder = tiny_model().audio_encoder
    states, _ = encoder(rows(5, WIDTH)[None])
    assert encoder.ctc_logits(states).shape == (1, 9, CONFIG.encoder.vocab_size)


def test_without_query_frames_a_row_goes_in_and_a_row_comes_out():
    config = replace(CONFIG.encoder, num_queries=0, vocab_size=0)
    encoder = randomise(SenseVoiceEncoder(config), 7)
    assert "embed" not in encoder
    assert (config.query_frames, CONFIG.encoder.query_frames) == (0, 4)
    x = rows(6, WIDTH)[None]
    states, mask = encoder(x)
    assert states.shape == (1, 6, CONFIG.encoder.output_size)
    assert mask.shape == (1, 6)
    # What a language model is told in its prompt, such an encoder cannot be told.
    assert mx.array_equal(states, encoder(x, language="Klingon", use_itn=True)[0])
    with pytest.raises(ValueError, match="no CTC head"):
        encoder.ctc_logits(states)


def test_features_that_nobody_normalised_lose_no_digits():
    """Row means of many deviations, as in the pauses of Fun-ASR-Nano's features, drop out of the result."""
    config = EncoderConfig(input_size=560, output_size=32, linear_units=48, num_blocks=1, tp_blocks=0, num_queries=0)
    encoder = randomise(SenseVoiceEncoder(config), 8)
    centred = mx.round(rows(20, 560) * 64) / 64  # the offset below is added without rounding
    wanted, _ = encoder(centred[None])
    states, _ = encoder(centred[None] + 256.0)
    assert max_abs(states - wanted) < 4e-5 * max_abs(wanted)


def test_bad_input_is_refused():
    encoder = tiny_model().audio_encoder
    with pytest.raises(ValueError, match="features must be 56 wide but got 55"):
        encoder(mx.zeros((1, 3, 55)))
    with pytest.raises(ValueError, match="language must be one of"):
        encoder(mx.zeros((1, 3, 56)), language="fr")
    with pytest.raises(ValueError, match="2 languages are needed but got 1"):
        encoder(mx.zeros((2, 3, 56)), language=["zh"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_heads": 3}, "attention_heads must divide"),
        ({"kernel_size": 0}, "kernel_size must be at least 1"),
        ({"input_size": 561}, "input_size must be even"),
        ({"sanm_shift": 6}, "sanm_shift"),
        ({"num_queries": 15}, "num_queries"),
    ],
)
def test_bad_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**change)
