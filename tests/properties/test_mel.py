"""The mel front end: its definition spelled out slowly, and the laws that any correct version obeys."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.mel import MelConfig, MelFrontend, hann_window, hertz_to_mel, mel_filters, mel_to_hertz

CONFIG = MelConfig()
FRONTEND = MelFrontend(CONFIG)


def noise(samples: int, seed: int, gain: float = 0.1) -> mx.array:
    return mx.random.normal((samples,), key=mx.random.key(seed)) * gain


def slow_log_mel(x: np.ndarray) -> np.ndarray:
    """The recipe in float64, frame by frame, the window within the transform as the original has it."""
    emphasised = np.array([x[i] - (0.97 * x[i - 1] if i else 0.0) for i in range(len(x))])
    padded = np.concatenate([np.zeros(256), emphasised, np.zeros(256)])
    window = np.zeros(512)
    window[56:456] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
    mels = np.linspace(0, 15 + 27 * math.log(8) / math.log(6.4), 130)
    corners = [m * 200 / 3 if m < 15 else 1000 * 6.4 ** ((m - 15) / 27) for m in mels]
    out = []
    for t in range(len(x) // 160):
        power = np.abs(np.fft.rfft(padded[160 * t : 160 * t + 512] * window)) ** 2
        row = []
        for left, top, right in zip(corners, corners[1:], corners[2:], strict=False):
            energy = 0.0
            for k in range(257):
                f = k * 31.25
                if left < f < right:
                    slope = (f - left) / (top - left) if f < top else (right - f) / (right - top)
                    energy += power[k] * slope * 2 / (right - left)
            row.append(math.log(energy + 2.0**-24))
        out.append(row)
    return np.array(out)


@given(st.integers(160, 900), st.integers(0, 99))
def test_log_mel_equals_the_slow_definition(samples, seed):
    x = noise(samples, seed)
    ours, slow = np.array(FRONTEND.log_mel(x)), slow_log_mel(np.array(x, np.float64))
    assert ours.shape == slow.shape == (samples // 160, 128)
    assert np.abs(ours - slow).max() < 5e-3
    assert np.abs(ours - slow).mean() < 5e-5


@given(st.integers(1600, 4000), st.integers(0, 99))
def test_every_bin_has_zero_mean_and_unit_deviation(samples, seed):
    frames = np.array(FRONTEND(noise(samples, seed)), np.float64)
    assert np.abs(frames.mean(axis=0)).max() < 1e-5
    assert np.abs(frames.std(axis=0, ddof=1) - 1).max() < 1e-3


@given(st.integers(1600, 4000), st.floats(0.01, 100.0), st.integers(0, 99))
def test_loudness_is_not_heard_but_for_the_guard(samples, gain, seed):
    unguarded, x = MelFrontend(MelConfig(log_guard=1e-30)), noise(samples, seed)
    assert np.abs(np.array(unguarded(x)) - np.array(unguarded(x * gain))).max() < 1e-3


@given(st.integers(1, 6), st.integers(2000, 3000), st.integers(0, 99))
def test_a_hop_of_delay_is_a_frame_of_delay(hops, samples, seed):
    x = noise(samples, seed)
    later = FRONTEND.log_mel(mx.concatenate([mx.zeros(160 * hops), x]))
    frames = FRONTEND.log_mel(x)
    # The first sample is emphasised against nothing, in both alike; edges see zeros in both.
    assert np.abs(np.array(later[hops:]) - np.array(frames)).max() < 1e-3


@pytest.mark.parametrize("frames", [2, 7, 8, 100, 3000])
def test_silence_becomes_zeros(frames):
    assert np.array_equal(np.array(FRONTEND(mx.zeros(160 * frames))), np.zeros((frames, 128)))


def test_normalisation_keeps_its_precision_over_a_long_recording():
    x = noise(16000 * 30, 4)
    log_mel = np.array(FRONTEND.log_mel(x), np.float64)
    wanted = (log_mel - log_mel.mean(axis=0)) / (log_mel.std(axis=0, ddof=1) + 1e-5)
    assert np.abs(np.array(FRONTEND(x)) - wanted).mean() < 2e-6


@pytest.mark.parametrize("samples", [160, 161, 319])
def test_a_single_frame_becomes_zeros(samples):
    assert np.array_equal(np.array(FRONTEND(noise(samples, 1))), np.zeros((1, 128)))


def test_what_is_too_short_or_no_waveform_is_refused():
    with pytest.raises(ValueError, match="at least 160 samples are needed but got 159"):
        FRONTEND(mx.zeros(159))
    with pytest.raises(ValueError, match=r"samples must have shape \(N,\) but got \(1, 400\)"):
        FRONTEND(mx.zeros((1, 400)))


@given(st.floats(0, 8000))
def test_the_mel_scale_is_inverted(hertz):
    assert mel_to_hertz(hertz_to_mel(hertz)) == pytest.approx(hertz, abs=1e-9, rel=1e-12)


def test_the_mel_scale_is_slaneys():
    assert hertz_to_mel(1000) == 15
    assert hertz_to_mel(200) == pytest.approx(3)
    assert hertz_to_mel(6400) == pytest.approx(42)


def test_triangles_have_unit_area():
    config = MelConfig(fft_size=16384)  # narrow ones have room for many points only in a long transform
    areas = np.array(mel_filters(config)).sum(axis=1) * 16000 / 16384
    assert np.abs(areas - 1).max() < 2e-3


def test_the_window_is_symmetric_and_ends_in_zeros():
    window = np.array(hann_window(400))
    assert np.abs(window - window[::-1]).max() < 1e-6
    assert window[0] == 0
    assert window.max() > 0.9999


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "kaldi"}, "kind must be 'mel' but got 'kaldi'"),
        ({"num_mel_bins": 0}, "num_mel_bins must be at least 1"),
        ({"high_freq": 9000.0}, "the mel range must lie within"),
        ({"low_freq": 8000.0}, "the mel range must lie within"),
        ({"frame_shift_ms": 0.0}, "frames must hold"),
        ({"frame_length_ms": 25.0625}, "an even number of samples"),
        ({"fft_size": 256}, "fft_size must be at least 400 but got 256"),
        ({"log_guard": 0.0}, "must be positive"),
        ({"norm_guard": -1.0}, "must be positive"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=r"\[MelConfig\] .*" + message):
        MelConfig(**values)
