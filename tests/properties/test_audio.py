"""Laws of reading and resampling that hold for every recording."""

import io

import numpy as np
import soundfile
from hypothesis import assume, example, given
from hypothesis import strategies as st

from qwen4b_asr.audio import SAMPLE_RATE, load_audio, resample
from qwen4b_asr.errors import AudioError

RATES = st.sampled_from([8000, 11_025, 12_000, 16_000, 22_050, 44_100, 48_000]) | st.integers(1000, 200_000)


@st.composite
def waveforms(draw, least: int = 1100, most: int = 6000, channels: int = 0) -> np.ndarray:
    """Noise of any length: (N,) float32, or (N, channels)."""
    seed, count = draw(st.integers(0, 2**32 - 1)), draw(st.integers(least, most))
    shape = (count, channels) if channels else (count,)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def peak(samples: np.ndarray) -> float:
    return float(np.abs(samples).max(initial=0.0))


@given(waveforms(least=0), RATES, RATES)
@example(np.zeros(1, np.float32), 48_000, 16_000)
def test_length(samples, rate_in, rate_out):
    got = resample(samples, rate_in, rate_out)
    assert got.size == (2 * samples.size * rate_out + rate_in) // (2 * rate_in)
    assert got.dtype == np.float32


@given(waveforms(), RATES)
def test_same_rate_is_identity(samples, rate):
    assume(samples.size > rate / 40)
    assert np.array_equal(resample(samples, rate, rate), samples)
    assert np.array_equal(load_audio(samples, rate, target_rate=rate), samples)


@given(waveforms(), RATES, st.floats(-8, 8, allow_subnormal=False))
def test_gain_is_linear(samples, rate, gain):
    want = np.float32(gain) * resample(samples, rate, SAMPLE_RATE)
    got = resample(np.float32(gain) * samples, rate, SAMPLE_RATE)
    assert peak(got - want) <= 1e-5 * (1 + abs(gain))


@given(waveforms(), waveforms(), RATES)
def test_sums_resample_to_sums(a, b, rate):
    size = min(a.size, b.size)
    a, b = a[:size], b[:size]
    want = resample(a, rate, SAMPLE_RATE) + resample(b, rate, SAMPLE_RATE)
    assert peak(resample(a + b, rate, SAMPLE_RATE) - want) <= 2e-5


@given(waveforms(least=2000), RATES)
def test_up_and_down_again_is_identity_inside_the_band(samples, rate):
    assume(rate <= SAMPLE_RATE)
    samples = np.convolve(samples, np.hanning(33) / 16, "same").astype(np.float32)  # nothing near the Nyquist frequency
    back = resample(resample(samples, rate, 3 * rate), 3 * rate, rate)
    inside = slice(200, -200)
    assert back.size == samples.size
    assert peak(back[inside] - samples[inside]) <= 1e-3


@given(waveforms(channels=4), st.permutations(range(4)), RATES)
def test_channel_order_does_not_matter(samples, order, rate):
    assume(samples.shape[0] * SAMPLE_RATE > 410 * rate)
    assert peak(load_audio(samples[:, order], rate) - load_audio(samples, rate)) <= 1e-6


@given(waveforms(), st.integers(1, 6))
def test_equal_channels_are_one(samples, channels):
    assert np.array_equal(load_audio(np.tile(samples[:, None], (1, channels))), samples)


@given(waveforms(), st.sampled_from([np.int8, np.int16, np.int32]), RATES)
def test_integers_equal_their_fractions_of_full_scale(samples, dtype, rate):
    assume(samples.size * SAMPLE_RATE > 410 * rate)
    info = np.iinfo(dtype)
    integers = (samples.astype(np.float64) * info.max).astype(dtype)
    assert np.array_equal(load_audio(integers, rate), load_audio(integers / -float(info.min), rate))


@given(waveforms(), RATES, st.sampled_from(["WAV", "FLAC"]), st.integers(1, 3))
def test_files_equal_arrays(samples, rate, container, channels):
    assume(container != "FLAC" or rate < 65_536)  # what libFLAC writes
    assume(samples.size * SAMPLE_RATE > 410 * rate)
    integers = (samples * 32767).astype(np.int16)
    frames = np.stack([np.roll(integers, k) for k in range(channels)], axis=1)
    file = io.BytesIO()
    soundfile.write(file, frames, rate, format=container, subtype="PCM_16")
    assert np.array_equal(load_audio(file.getvalue()), load_audio(frames, rate))


@given(waveforms(most=3000), st.sampled_from([("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")]), st.data())
def test_no_cut_is_silent(samples, form, data):
    """However many bytes are missing, and wherever, nobody gets a part of the recording for the whole."""
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE, format=form[0], subtype=form[1])
    whole = file.getvalue()
    cut = whole[: data.draw(st.integers(0, len(whole) - 1), label="bytes left")]
    try:
        got = load_audio(cut)
    except AudioError:
        return
    assert np.array_equal(got, load_audio(whole))


MAGICS = st.sampled_from([b"", b"RIFF\x40\0\0\0WAVE", b"fLaC\0\0\0\x22", b"OggS", b"\xff\xfb\x90"])


@given(st.binary(max_size=300), MAGICS)
def test_any_bytes_give_samples_or_an_audio_error(noise, magic):
    try:
        got = load_audio(magic + noise)
    except AudioError:
        return
    assert np.isfinite(got).all()
    assert got.size >= 400
