"""Every format in, every damaged file out with an AudioError that names it."""

import io
import os
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import soundfile

from qwen4b_asr.audio import SAMPLE_RATE, load_audio, resample
from qwen4b_asr.errors import AudioError

FORMATS = [
    ("wav", "WAV", "PCM_16", 1e-4),
    ("wav", "WAV", "PCM_U8", 2e-2),
    ("wav", "WAV", "PCM_24", 1e-6),
    ("wav", "WAV", "FLOAT", 0),
    ("wav", "RF64", "PCM_16", 1e-4),
    ("flac", "FLAC", "PCM_16", 1e-4),
    ("ogg", "OGG", "VORBIS", 0.1),
    ("opus", "OGG", "OPUS", 0.1),
    ("mp3", "MP3", None, 0.1),
]


def tone(frequency: float = 440.0, seconds: float = 1.0, rate: int = SAMPLE_RATE) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int, container: str = "WAV", subtype: str | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=container, subtype=subtype, **options)
    return buffer.getvalue()


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize(("suffix", "container", "subtype", "tolerance"), FORMATS)
def test_formats_give_back_the_samples(tmp_path, suffix, container, subtype, tolerance):
    wanted = tone(seconds=1.5)
    path = tmp_path / f"tone.{suffix}"
    path.write_bytes(encoded(wanted, SAMPLE_RATE, container, subtype))
    got = load_audio(path)
    assert got.dtype == np.float32
    assert got.shape == wanted.shape
    assert relative_error(got, wanted) <= tolerance


@pytest.mark.parametrize(("suffix", "container", "subtype", "_tolerance"), FORMATS)
def test_path_bytes_and_file_object_agree(tmp_path, suffix, container, subtype, _tolerance):
    data = encoded(tone(rate=48_000), 48_000, container, subtype)
    path = tmp_path / f"tone.{suffix}"
    path.write_bytes(data)
    from_path = load_audio(str(path))
    assert np.array_equal(load_audio(data), from_path)
    assert np.array_equal(load_audio(io.BytesIO(data)), from_path)
    with open(path, "rb") as file:
        assert np.array_equal(load_audio(file), from_path)


def test_a_pipe_is_read_to_its_end(tmp_path):
    data = encoded(tone(seconds=0.2), SAMPLE_RATE)
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as file:
        file.write(data)
    try:
        assert np.array_equal(load_audio(f"/dev/fd/{reader}"), load_audio(data))
    finally:
        os.close(reader)


def test_channels_are_averaged():
    left, right, centre = tone(200), tone(300), tone(1000)
    together = np.stack([left, right, centre], axis=1)
    want = (left.astype(np.float64) + right + centre) / 3
    np.testing.assert_allclose(load_audio(together), want, atol=1e-7)
    np.testing.assert_allclose(load_audio(encoded(together, SAMPLE_RATE, "WAV", "FLOAT")), want, atol=1e-7)


def test_long_files_equal_arrays():
    """The decoder works in blocks; seams between them must not be heard."""
    samples = np.random.default_rng(5).uniform(-1, 1, (200_000, 2)).astype(np.float32)
    data = encoded(samples, 44_100, "WAV", "FLOAT")
    for target_rate in (SAMPLE_RATE, 44_100):
        want = load_audio(samples, 44_100, target_rate=target_rate)
        assert np.array_equal(load_audio(data, target_rate=target_rate), want)


def test_strided_views_are_read_in_order():
    pairs = np.random.default_rng(6).uniform(-1, 1, 8000).astype(np.float32)
    for view in (pairs[::2], pairs[::-1]):
        np.testing.assert_array_equal(resample(view, 8000, SAMPLE_RATE), resample(view.copy(), 8000, SAMPLE_RATE))
        np.testing.assert_array_equal(load_audio(view, 8000), load_audio(view.copy(), 8000))


@pytest.mark.parametrize(
    ("dtype", "full_scale", "centre"),
    [(np.int8, 128, 0), (np.int16, 32768, 0), (np.int32, 2**31, 0), (np.uint8, 128, 128), (">i2", 32768, 0)],
)
def test_integer_arrays_are_scaled_by_full_range(dtype, full_scale, centre):
    info = np.iinfo(dtype)
    integers = np.linspace(info.min, info.max, 500).astype(dtype)
    want = (integers.astype(np.float64) - centre) / full_scale
    np.testing.assert_allclose(load_audio(integers), want, atol=1e-7)
    assert load_audio(integers)[0] == -1.0


def test_float_arrays_keep_their_range():
    samples = 3.0 * tone()
    for dtype in (np.float32, np.float64, ">f4", np.longdouble):
        np.testing.assert_array_equal(load_audio(samples.astype(dtype)), samples)
    np.testing.assert_array_equal(load_audio(samples.astype(np.float16)), samples.astype(np.float16).astype(np.float32))


def test_arrays_are_not_changed_or_shared():
    samples = tone()
    samples.flags.writeable = False
    got = load_audio(samples)
    got[:] = 0
    assert samples.any()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.int16])
def test_mlx_arrays(dtype):
    samples = mx.array(tone() * (1000 if dtype == mx.int16 else 1)).astype(dtype)
    want = np.array(samples.astype(mx.float32)) / (32768 if dtype == mx.int16 else 1)
    np.testing.assert_array_equal(load_audio(samples), want)


def test_an_array_without_a_rate_is_at_the_target_rate():
    samples = tone()
    np.testing.assert_array_equal(load_audio(samples), samples)
    assert load_audio(samples, 8000).shape == (2 * samples.size,)
    assert load_audio(samples, 8000, target_rate=8000).shape == samples.shape


# --- resampling ------------------------------------------------------------------------------------------------------


def level_db(frequency: float, rate: int) -> float:
    """Resample a unit sine and give the power of what comes out, in dB of the sine's own, away from both ends."""
    time = np.arange(rate) / rate
    out = resample(np.sin(2 * np.pi * frequency * time).astype(np.float32), rate, SAMPLE_RATE)
    middle = out[out.size // 4 : 3 * out.size // 4].astype(np.float64)
    return 10 * np.log10(np.mean(middle**2) / 0.5 + 1e-30)


@pytest.mark.parametrize("rate", [17_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000])
def test_tones_above_the_new_nyquist_are_gone(rate):
    for frequency in (8010, 8100, 8400, 9000, 11_000, 15_900, 16_100, 23_000, 40_000):
        if frequency < rate / 2:
            assert level_db(frequency, rate) < -120, frequency


@pytest.mark.parametrize("rate", [8000, 11_025, 17_000, 22_050, 44_100, 48_000, 96_000])
def test_the_pass_band_is_flat(rate):
    for frequency in (50, 440, 1000, 3000, 3600, 5000, 7000, 7200):
        if frequency <= 0.45 * rate:
            assert abs(level_db(frequency, rate)) < 0.05, frequency


def test_a_tone_keeps_its_place_in_time():
    for rate in (8000, 22_050, 44_100, 48_000):
        error = resample(tone(1000, 0.5, rate), rate, SAMPLE_RATE) - tone(1000, 0.5)
        assert np.abs(error[200:-200]).max() < 1e-4, rate


def test_resample_wants_one_channel_and_real_rates():
    with pytest.raises(ValueError, match=r"\(N,\) but got shape \(3, 2\)"):
        resample(np.zeros((3, 2), np.float32), 8000, 16_000)
    for rate in (0, -1, 999, 1_000_001, 16_000.0, "16000", None):
        with pytest.raises(ValueError, match="rate_in"):
            resample(np.zeros(9, np.float32), rate, 16_000)


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(source, *args) -> str:
    with pytest.raises(AudioError) as caught:
        load_audio(source, *args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_directory_and_forbidden(tmp_path, monkeypatch):
    assert refusal(tmp_path / "none.wav") == f"{tmp_path / 'none.wav'}: no such file; check the path"
    assert "is a directory" in refusal(tmp_path)
    assert "no file can be named so" in refusal("a\0b.wav")
    assert "cannot be read" in refusal("x" * 5000)
    locked = tmp_path / "locked.wav"
    locked.write_bytes(encoded(tone(), SAMPLE_RATE))
    locked.chmod(0)
    if os.access(locked, os.R_OK):  # the superuser may read everything
        monkeypatch.setattr("builtins.open", _forbid)
    assert "no permission" in refusal(locked)


def _forbid(*_args, **_kwargs):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n", "not audio"),
        (b"hello, this is a text file\n" * 100, "not audio"),
        (bytes(4000), "not audio"),
        (b"RIFF", "not audio|damaged"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "damaged"),
        (b"OggS", "cut short"),
        (b"fLaC", "damaged|not audio"),
        (b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom" + bytes(500), "not audio.*ffmpeg"),
    ],
)
def test_what_is_not_audio(tmp_path, content, words):
    path = tmp_path / "talk.wav"
    path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    with pytest.raises(AudioError, match=words):
        load_audio(path)
    with pytest.raises(AudioError, match=words):
        load_audio(content)


@pytest.mark.parametrize(("suffix", "container", "subtype", "_tolerance"), FORMATS)
@pytest.mark.parametrize("left", [0.999, 0.9, 0.5, 0.1])
def test_cut_files(tmp_path, suffix, container, subtype, _tolerance, left):
    noise = np.random.default_rng(0).normal(0, 0.1, 3 * SAMPLE_RATE).astype(np.float32)
    data = encoded(noise, SAMPLE_RATE, container, subtype)
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(data[: int(len(data) * left)])
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert "cut short" in message


def test_cut_wav_behind_other_chunks():
    data = encoded(tone(), SAMPLE_RATE, "WAV", "PCM_16")
    padded = data[:36] + b"LIST\5\0\0\0abcde\0" + data[36:]  # chunks of odd length have a pad byte
    np.testing.assert_array_equal(load_audio(padded), load_audio(data))
    assert "at least 1 bytes are missing" in refusal(padded[:-1])


def test_cut_wav_above_four_gigabytes():
    data = bytearray(encoded(tone(), SAMPLE_RATE, "RF64", "PCM_16"))
    data[28:36] = struct.pack("<Q", 5 << 30)  # ds64: the length of the data chunk
    assert f"at least {(5 << 30) - 32_000} bytes" in refusal(bytes(data))


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_mp3_without_a_length_is_read_to_its_end(mode):
    """Without the Xing frame the decoder only guesses a length; guessing high is no cut."""
    noise = np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE) * np.repeat([0.0, 1.0], SAMPLE_RATE // 2)
    data = encoded(noise, SAMPLE_RATE, "MP3", bitrate_mode=mode, compression_level=0.5)
    second = data.index(b"\xff\xf3", 4)  # frames of MPEG-2 layer III start with these
    assert abs(load_audio(data[second:]).size - SAMPLE_RATE) < 3000
    tagged = b"ID3\4\0\0" + bytes([0, 0, 2, 0]) + bytes(256) + data
    assert load_audio(tagged).size == SAMPLE_RATE
    with pytest.raises(AudioError, match="cut short"):
        load_audio(tagged[:-20])


@pytest.mark.parametrize("length", [0x7FFF_F000, 0x8000_0000, 0xFFFF_FFFF])
def test_wav_from_a_pipe_has_no_length(length):
    data = encoded(tone(), SAMPLE_RATE, "WAV", "PCM_16")
    assert data[36:40] == b"data"
    piped = data[:4] + struct.pack("<I", min(length + 36, 0xFFFF_FFFF)) + data[8:40] + struct.pack("<I", length)
    np.testing.assert_array_equal(load_audio(piped + data[44:]), load_audio(data))


def test_flac_without_a_length_is_refused_clearly():
    data = bytearray(encoded(tone(), SAMPLE_RATE, "FLAC"))
    data[21] &= 0xF0
    data[22:26] = bytes(4)  # 36 bits of STREAMINFO: total samples, 0 = unknown
    assert "does not say how long" in refusal(bytes(data))


def test_trailing_junk_is_ignored():
    want = load_audio(encoded(tone(), SAMPLE_RATE))
    np.testing.assert_array_equal(load_audio(encoded(tone(), SAMPLE_RATE) + b"junk"), want)
    ogg = encoded(tone(), SAMPLE_RATE, "OGG", "VORBIS")
    np.testing.assert_array_equal(load_audio(ogg + b"TAG" + bytes(125)), load_audio(ogg))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_nan_and_infinity(tmp_path, bad):
    samples = tone().astype(np.float64)
    samples[7000] = bad
    path = tmp_path / "bad.wav"
    path.write_bytes(encoded(samples, 44_100, "WAV", "DOUBLE"))
    for message in (refusal(path), refusal(samples), refusal(samples, 44_100)):
        assert "NaN or infinite" in message


@pytest.mark.parametrize("frames", [0, 1, 399])
def test_too_short(frames):
    words = "needed" if frames else "holds no samples"
    assert words in refusal(np.zeros(frames, np.float32))
    assert words in refusal(np.zeros((frames, 2), np.int16))
    assert words in refusal(encoded(np.zeros(frames, np.float32), SAMPLE_RATE))
    assert words in refusal(np.zeros(min(frames, 199), np.float32), 8000)


def test_one_window_is_enough():
    assert load_audio(np.zeros(400, np.float32)).shape == (400,)
    assert load_audio(np.zeros(200, np.float32), 8000).shape == (400,)


def test_channels_first_is_not_taken_for_samples():
    assert "(2, 16000) as (N, channels)" in refusal(np.stack([tone(), tone()]))


@pytest.mark.parametrize("source", [[0.0] * 500, (0.0,), None, 3, 3.0, object()])
def test_other_sources_are_refused(source):
    with pytest.raises(TypeError, match=f"got {type(source).__name__}$"):
        load_audio(source)


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.uint32, np.bool_, np.complex64, object, "U1"])
def test_types_without_a_full_scale_are_refused(dtype):
    with pytest.raises(TypeError, match="full scale"):
        load_audio(np.zeros(500, dtype))


@pytest.mark.parametrize("shape", [(), (2, 3, 4), (500, 0)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="but got shape"):
        load_audio(np.zeros(shape, np.float32))


def test_text_mode_is_refused():
    with pytest.raises(TypeError, match="binary mode"):
        load_audio(io.StringIO("RIFF"))


def test_a_file_knows_its_own_rate(tmp_path):
    path = tmp_path / "tone.wav"
    path.write_bytes(encoded(tone(rate=8000), 8000))
    np.testing.assert_array_equal(load_audio(path, 8000), load_audio(path))
    assert "is at 8000 Hz, not at the given 16000 Hz" in refusal(path, 16_000)
    data = bytearray(path.read_bytes())
    data[24:28] = struct.pack("<I", 7)
    assert "says 7 Hz" in refusal(bytes(data))


def test_reading_leaves_nothing_open(tmp_path):
    if not Path("/proc/self/fd").exists():
        pytest.skip("counts descriptors in /proc")
    good, bad = tmp_path / "good.flac", tmp_path / "bad.flac"
    good.write_bytes(encoded(tone(), SAMPLE_RATE, "FLAC"))
    bad.write_bytes(good.read_bytes()[:3000])
    before = len(os.listdir("/proc/self/fd"))
    load_audio(good)
    refusal(bad)
    assert len(os.listdir("/proc/self/fd")) == before
