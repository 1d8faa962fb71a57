"""The front end: Kaldi's definitions spelled out slowly, and the laws that any correct version obeys."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.features import Frontend, FrontendConfig, fbank, frame_count, low_frame_rate, pad_features

CONFIG = FrontendConfig(cmvn=False)
FLOOR = math.log(1.1920928955078125e-07)


def noise(samples: int, seed: int, gain: float = 0.1) -> mx.array:
    return mx.random.normal((samples,), key=mx.random.key(seed)) * gain


def slow_fbank(x: np.ndarray) -> np.ndarray:
    """Kaldi's recipe in float64, frame by frame, triangles by their edges."""
    x = x.astype(np.float64) * 32768
    mel = lambda f: 1127 * math.log(1 + f / 700)  # noqa: E731
    edges = np.linspace(mel(20), mel(8000), 82)
    window = 0.54 - 0.46 * np.cos(2 * np.pi * np.arange(400) / 399)
    out = []
    for start in range(0, len(x) - 399, 160):
        frame = x[start : start + 400] - x[start : start + 400].mean()
        frame = np.array([frame[i] - 0.97 * frame[max(i - 1, 0)] for i in range(400)]) * window
        power = np.abs(np.fft.fft(frame, 512)[:257]) ** 2
        row = []
        for left, centre, right in zip(edges, edges[1:], edges[2:], strict=False):
            energy = 0.0
            for k in range(256):
                m = mel(k * 16000 / 512)
                if left < m < right:
                    energy += power[k] * min((m - left) / (centre - left), (right - m) / (right - centre))
            row.append(math.log(max(energy, 1.1920928955078125e-07)))
        out.append(row)
    return np.array(out)


@given(st.integers(400, 1500), st.integers(0, 99))
def test_fbank_equals_the_slow_definition(samples, seed):
    x = noise(samples, seed)
    ours, slow = np.array(fbank(x, CONFIG)), slow_fbank(np.array(x))
    assert ours.shape == slow.shape
    assert np.abs(ours - slow).max() < 5e-3
    assert np.abs(ours - slow).mean() < 5e-5


@given(st.integers(1, 400))
def test_low_frame_rate_equals_the_slow_definition(frames):
    x = np.arange(frames * 2, dtype=np.float32).reshape(frames, 2)
    slow = np.array(
        [
            np.concatenate([x[min(max(6 * t + j - 3, 0), frames - 1)] for j in range(7)])
            for t in range(math.ceil(frames / 6))
        ]
    )
    assert np.array_equal(np.array(low_frame_rate(mx.array(x), 7, 6)), slow)


@given(st.integers(400, 9000))
def test_row_count(samples):
    rows = Frontend(CONFIG)(mx.zeros(samples))
    assert rows.shape == (math.ceil(frame_count(samples, CONFIG) / 6), 560)


def test_silence_is_the_floor():
    assert np.allclose(np.array(fbank(mx.zeros(4000), CONFIG)), FLOOR, atol=1e-6)


@given(st.floats(0.05, 20.0), st.integers(0, 99))
def test_gain_shifts_the_log_energies(gain, seed):
    x = noise(2000, seed)
    shift = np.array(fbank(x * gain, CONFIG)) - np.array(fbank(x, CONFIG))
    assert np.abs(shift - 2 * math.log(gain)).max() < 2e-3


@given(st.integers(0, 5), st.integers(0, 99))
def test_a_frame_depends_on_its_window_alone(frame, seed):
    x = noise(2000, seed)
    start = frame * 160
    alone = fbank(x[start : start + 400], CONFIG)
    assert np.allclose(np.array(alone[0]), np.array(fbank(x, CONFIG)[frame]), atol=1e-4)


def test_a_constant_offset_is_removed():
    x = noise(2000, 1)
    assert np.abs(np.array(fbank(x + 0.25, CONFIG)) - np.array(fbank(x, CONFIG))).max() < 5e-3


def test_the_published_row_of_a_sine():
    x = mx.sin(2 * math.pi * 440 * mx.arange(16000) / 16000)
    rows = Frontend(FrontendConfig(cmvn=False, input_scale=1.0))(x)
    wanted = [-7.515916, -6.506824, -6.296969, -6.987014, -7.677636, -7.169872, -5.736084, -4.967820]
    assert rows.shape == (17, 560)
    assert np.abs(np.array(rows[0, :8]) - wanted).max() < 1e-3


def test_cmvn_shifts_before_it_scales():
    front = Frontend(FrontendConfig())
    plain = Frontend(CONFIG)(noise(2000, 3))
    front.cmvn_shift = mx.full(560, 2.0)
    front.cmvn_scale = mx.full(560, 0.5)
    assert np.allclose(np.array(front(noise(2000, 3))), (np.array(plain) + 2) * 0.5, atol=1e-5)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_padding_keeps_rows_and_marks_the_rest(lengths):
    items = [mx.full((n, 3), float(i + 1)) for i, n in enumerate(lengths)]
    batch, mask = pad_features(items)
    assert np.array(mask).sum(axis=1).tolist() == lengths
    for i, n in enumerate(lengths):
        assert np.all(np.array(batch[i, :n]) == i + 1)
        assert np.all(np.array(batch[i, n:]) == 0)
        assert np.array(mask[i, :n]).all()


@pytest.mark.parametrize("samples", [0, 1, 399])
def test_less_than_a_frame_is_refused(samples):
    with pytest.raises(ValueError, match=r"\[fbank\] at least 400 samples are needed but got"):
        fbank(mx.zeros(samples), CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lfr_m": 0}, "lfr_m must be at least 1"),
        ({"high_freq": 9000.0}, "mel range"),
        ({"frame_shift_ms": 0.0}, "frames must hold samples"),
    ],
)
def test_bad_constants_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        FrontendConfig(**change)
