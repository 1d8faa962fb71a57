"""Recordings in, a waveform out: (N,) float32 samples, one channel, at the model's rate.

WAV, FLAC, OGG (Vorbis, Opus) and MP3 are read through libsndfile (the
`soundfile` package); whatever else it opens works too. Other rates are
resampled by libsoxr (the `soxr` package), a band-limited resampler whose HQ
setting is flat to 0.9 of the new Nyquist frequency and keeps what lies above it
out by more than 120 dB.
"""

import operator
import os
import stat
import struct
import sys
from collections.abc import Iterator
from io import BytesIO, RawIOBase
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import AudioError

if TYPE_CHECKING:
    import mlx.core as mx

SAMPLE_RATE = 16_000
"""Hertz that the models' front ends expect."""

MINIMUM_SECONDS = 0.025
"""The front end's one window: anything shorter holds no frame."""

RATES = range(1_000, 1_000_001)
"""Sample rates in Hz that are believed; a header outside it is damaged, and would ask for absurd amounts of memory."""

Samples: TypeAlias = npt.NDArray[np.float32]
Source: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO | npt.NDArray[Any] | mx.array"

_BLOCK = 1 << 16  # frames decoded at a time, so that memory is bounded by the result
# A writer that cannot seek back leaves the length at a number near 2 or 4 GiB: it promises nothing.
_WAV_LENGTH_UNKNOWN = 0x7FFF_0000
_CONVERT = "convert it first, for example with `ffmpeg -i IN -ar 16000 OUT.wav`"


def load_audio(source: Source, sample_rate: int | None = None, *, target_rate: int = SAMPLE_RATE) -> Samples:
    """Read a recording as one channel of float32 samples at `target_rate`.

    Several channels are averaged. Integers are scaled by their full range to [-1, 1]; floating-point samples are
    taken as they are, also beyond [-1, 1]: nothing is clipped or normalised.

    Args:
        source: a path; the bytes of an audio file; a binary file object; or samples as a NumPy or MLX array, (N,) or
            (N, channels) as `soundfile` has them, floating-point or 8-, 16- or 32-bit integers (uint8 centred on 128).
        sample_rate: Hz of an array; None says that it is at `target_rate` already. A file knows its own rate: leave
            None, or the file is refused when it differs.
        target_rate: Hz of the result.

    Returns:
        (N,) float32, N = floor(frames · target_rate / rate + 1/2).

    Raises:
        AudioError: the recording is missing, unreadable, not audio, cut short, empty, shorter than 25 ms, or holds
            NaN or infinity.
        TypeError: a source or an array type that is not audio.
        ValueError: an array of more than two dimensions, or a rate outside `RATES`.
    """
    target_rate = _rate("target_rate", target_rate)
    sample_rate = None if sample_rate is None else _rate("sample_rate", sample_rate)
    if isinstance(source, (str, os.PathLike)):
        return _from_path(os.fspath(source), sample_rate, target_rate)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_file(BytesIO(source), "audio bytes", sample_rate, target_rate)
    if hasattr(source, "read"):
        data = source.read()  # whole: libsndfile seeks, pipes and sockets cannot
        if not isinstance(data, bytes):
            raise TypeError(f"[load_audio] a file object must be opened in binary mode but read() gave {type(data)}")
        name = getattr(source, "name", None)
        return _from_file(BytesIO(data), name if isinstance(name, str) else "audio stream", sample_rate, target_rate)
    return _from_array(_as_numpy(source), sample_rate or target_rate, target_rate)


def resample(samples: Samples, rate_in: int, rate_out: int) -> Samples:
    """Change the rate of a waveform with a band-limited filter (libsoxr, HQ).

    Args:
        samples: (N,) float32.
        rate_in: its rate in Hz.
        rate_out: the wanted rate in Hz.

    Returns:
        (M,) float32, M = floor(N · rate_out / rate_in + 1/2); the samples themselves when the rates are equal.
    """
    rate_in, rate_out = _rate("rate_in", rate_in), _rate("rate_out", rate_out)
    if samples.ndim != 1:
        raise ValueError(f"[resample] samples must be (N,) but got shape {samples.shape}")
    return _resample_blocks(iter([samples.astype(np.float32, copy=False)]), rate_in, rate_out)


# --- where the bytes come from ---------------------------------------------------------------------------------------


def _from_path(path: str, sample_rate: int | None, target_rate: int) -> Samples:
    if "\0" in path:
        raise AudioError(f"{path!r}: no file can be named so; check the path")
    try:
        # Unbuffered, because libsndfile continues on the descriptor where Python's own position is.
        with open(path, "rb", buffering=0) as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            return _from_file(file if regular else BytesIO(file.readall()), path, sample_rate, target_rate)
    except FileNotFoundError as error:
        raise AudioError(f"{path}: no such file; check the path") from error
    except IsADirectoryError as error:
        raise AudioError(f"{path}: is a directory; name the recordings in it") from error
    except PermissionError as error:
        raise AudioError(f"{path}: no permission to read it") from error
    except OSError as error:
        raise AudioError(f"{path}: cannot be read: {error.strerror or error}") from error


def _from_file(file: RawIOBase | BytesIO, name: str, sample_rate: int | None, target_rate: int) -> Samples:
    import soundfile  # here, because it loads a shared library

    _refuse_cut(file, name)
    stated = _mp3_length_is_stated(file)
    file.seek(0)
    try:
        with soundfile.SoundFile(file if isinstance(file, BytesIO) else file.fileno(), closefd=False) as sound:
            if sample_rate not in (None, sound.samplerate):
                raise AudioError(
                    f"{name}: is at {sound.samplerate} Hz, not at the given {sample_rate} Hz; "
                    "leave sample_rate out for files"
                )
            if sound.samplerate not in RATES:
                raise AudioError(f"{name}: its header says {sound.samplerate} Hz, which cannot be; {_CONVERT}")
            if sound.frames > 1 << 62:
                raise AudioError(f"{name}: its header does not say how long it is; {_CONVERT}")
            promised = 0 if sound.format in ("MP3", "MPEG") and not stated else sound.frames
            blocks = _decode(sound, name, promised)
            return _checked(_resample_blocks(blocks, sound.samplerate, target_rate), name, target_rate)
    except soundfile.LibsndfileError as error:
        if error.code == 1:  # SF_ERR_UNRECOGNISED_FORMAT
            message = f"is not audio in a format that can be read (WAV, FLAC, OGG, MP3); {_CONVERT}"
        else:
            message = f"is damaged or cut short; fetch or record it again, or {_CONVERT}"
        raise AudioError(f"{name}: {message}") from error


def _decode(sound: Any, name: str, promised: int) -> Iterator[Samples]:
    """Yield the mean over channels, block by block; complain when fewer frames come than the header promised."""
    count = 0
    while len(block := sound.read(_BLOCK, dtype="float32", always_2d=True)):
        count += len(block)
        yield _mono(block)
    if count < promised:
        raise AudioError(
            f"{name}: is cut short: {count / sound.samplerate:.2f} s of {promised / sound.samplerate:.2f} s are there; "
            "fetch or record it again"
        )


def _as_numpy(source: Any) -> npt.NDArray[Any]:
    if isinstance(source, np.ndarray):
        return source
    mlx = sys.modules.get("mlx.core")  # an MLX array exists only where MLX is imported
    if mlx is not None and isinstance(source, mlx.array):
        if source.dtype == mlx.bfloat16:  # NumPy has no such type
            source = source.astype(mlx.float32)
        return np.array(source)
    raise TypeError(
        "[load_audio] source must be a path, bytes, a binary file object, or a NumPy or MLX array "
        f"but got {type(source).__name__}"
    )


def _from_array(samples: npt.NDArray[Any], rate: int, target_rate: int) -> Samples:
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and samples.shape[1] == 0):
        raise ValueError(f"[load_audio] samples must be (N,) or (N, channels) but got shape {samples.shape}")
    kind, bits = samples.dtype.kind, 8 * samples.dtype.itemsize
    if kind == "f":
        with np.errstate(over="ignore"):  # too large for float32 becomes infinity, which is refused below
            scaled = samples.astype(np.float32)
    elif (kind == "i" and bits <= 32) or (kind == "u" and bits == 8):
        centred = samples.astype(np.float64) - (128 if kind == "u" else 0)
        scaled = (centred / 2.0 ** (bits - 1)).astype(np.float32)
    else:
        raise TypeError(
            "[load_audio] samples must be floating-point, int8, int16, int32 or uint8 "
            f"but got {samples.dtype} (its full scale is not known)"
        )
    waveform = _resample_blocks(iter([_mono(scaled)]), rate, target_rate)
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:  # only its own channels long: not worth a guess
        return _checked(waveform, f"samples {samples.shape} as (N, channels)", target_rate)
    return _checked(waveform, "samples", target_rate)


# --- what is done with the samples -----------------------------------------------------------------------------------


def _rate(name: str, value: int) -> int:
    try:
        rate = operator.index(value)
    except TypeError:
        rate = 0
    if rate not in RATES:
        raise ValueError(
            f"[load_audio] {name} must be a whole number of Hz from {RATES[0]} to {RATES[-1]} but got {value!r}"
        )
    return rate


def _mono(block: npt.NDArray[np.float32]) -> Samples:
    if block.ndim == 1:
        return block
    if block.shape[1] == 1:
        return block[:, 0]
    return block.mean(axis=1, dtype=np.float64).astype(np.float32)


def _resample_blocks(blocks: Iterator[Samples], rate_in: int, rate_out: int) -> Samples:
    """Join blocks, resampled on the way; equal to resampling their join."""
    if rate_in == rate_out:
        parts = list(blocks)
    else:
        import soxr  # here, because it loads a shared library

        stream = soxr.ResampleStream(rate_in, rate_out, 1, dtype="float32", quality="HQ")
        parts = [stream.resample_chunk(block) for block in blocks]
        parts.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.float32), *parts])


def _checked(samples: Samples, name: str, rate: int) -> Samples:
    if samples.size == 0:
        raise AudioError(f"{name}: holds no samples; record it again")
    if not np.isfinite(samples).all():
        raise AudioError(f"{name}: holds NaN or infinite samples; export it again from its source")
    if samples.size < round(MINIMUM_SECONDS * rate):
        raise AudioError(
            f"{name}: lasts {1000 * samples.size / rate:.1f} ms; at least {1000 * MINIMUM_SECONDS:.0f} ms are needed"
        )
    return samples


# --- cut files that libsndfile passes in silence ---------------------------------------------------------------------


def _refuse_cut(file: RawIOBase | BytesIO, name: str) -> None:
    """Refuse an empty file, and a WAV or OGG file that ends before its own headers say."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise AudioError(f"{name}: is empty (0 bytes); record or fetch it again")
    magic = _at(file, 0, 12)
    missing = 0
    if magic[:4] in (b"RIFF", b"RF64") and magic[8:] == b"WAVE":
        missing = _wav_missing(file, size)
    elif magic[:4] == b"OggS":
        missing = _ogg_missing(file, size)
    if missing > 0:
        raise AudioError(f"{name}: is cut short: at least {missing} bytes are missing; fetch or record it again")


def _wav_missing(file: RawIOBase | BytesIO, size: int) -> int:
    """Count the bytes that the `data` chunk lacks (RIFF, and RF64 with its 64-bit length in `ds64`)."""
    position, length64 = 12, 0
    while len(header := _at(file, position, 8)) == 8:
        chunk, length = struct.unpack("<4sI", header)
        if chunk == b"ds64" and len(body := _at(file, position + 8, 16)) == 16:
            length64 = struct.unpack("<8xQ", body)[0]
        if chunk == b"data":
            length = length64 if length64 and length == 0xFFFF_FFFF else length
            unknown = not length64 and length >= _WAV_LENGTH_UNKNOWN
            return 0 if unknown else position + 8 + length - size
        position += 8 + length + length % 2
    return 0


def _ogg_missing(file: RawIOBase | BytesIO, size: int) -> int:
    """Count the bytes that the last Ogg page lacks (RFC 3533, section 6)."""
    position = 0
    while position < size:
        header = _at(file, position, 27)
        if header[:4] != b"OggS"[: len(header)]:
            return 0  # something else behind the last page, such as a tag
        table = _at(file, position + 27, header[26]) if len(header) == 27 else b""
        if len(header) < 27 or len(table) < header[26]:
            return 1
        position += 27 + len(table) + sum(table)
    return position - size


def _mp3_length_is_stated(file: RawIOBase | BytesIO) -> bool:
    """Tell whether an MP3 starts with a Xing, Info or VBRI frame: without one, its length is the decoder's guess."""
    start, tag = 0, _at(file, 0, 10)
    if tag[:3] == b"ID3" and len(tag) == 10:  # ID3v2: four bytes of seven bits each
        start = 10 + sum((byte & 127) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
    frame = _at(file, start, 64)
    return any(mark in frame for mark in (b"Xing", b"Info", b"VBRI"))


def _at(file: RawIOBase | BytesIO, position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count) or b""
