"""Waveform to features: log-mel spectrogram, each bin normalised over the utterance.

The recipe is that of NeMo's ``FilterbankFeatures`` (``nemo/collections/asr/parts/preprocessing/features.py``) with
``normalize: per_feature``, without dither; Hugging Face has it as ``ParakeetFeatureExtractor``.
Shapes: N samples, T 10-ms frames, F mel bins, W window samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class MelConfig:
    """Sizes and constants of the front end; the defaults are Canary-Qwen's.

    Args:
        kind: Names this front end in a model's configuration.
        sample_rate: Samples per second of the waveform.
        num_mel_bins: Mel bins F.
        frame_length_ms: Window length in milliseconds.
        frame_shift_ms: Hop in milliseconds.
        fft_size: Samples of the Fourier transform; at least the window's.
        low_freq: Lower edge of the first triangle, Hz.
        high_freq: Upper edge of the last triangle, Hz; 0 means half the sample rate.
        preemphasis: Coefficient of the first-order pre-emphasis.
        log_guard: Added to the mel energies before the logarithm.
        norm_guard: Added to the standard deviation before the division.
    """

    kind: str = "mel"
    sample_rate: int = 16000
    num_mel_bins: int = 128
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    fft_size: int = 512
    low_freq: float = 0.0
    high_freq: float = 0.0
    preemphasis: float = 0.97
    log_guard: float = 2.0**-24
    norm_guard: float = 1e-5

    def __post_init__(self) -> None:
        if self.kind != "mel":
            raise ValueError(f"[MelConfig] kind must be 'mel' but got {self.kind!r}")
        for name in ("sample_rate", "num_mel_bins"):
            if getattr(self, name) < 1:
                raise ValueError(f"[MelConfig] {name} must be at least 1 but got {getattr(self, name)}")
        if not 0 <= self.low_freq < self.upper_freq <= self.sample_rate / 2:
            raise ValueError(
                f"[MelConfig] the mel range must lie within 0..{self.sample_rate / 2} Hz "
                f"but got {self.low_freq}..{self.upper_freq}"
            )
        if self.frame_shift < 1 or self.frame_length < 2 or self.frame_length % 2:
            raise ValueError(
                f"[MelConfig] frames must hold an even number of samples but got {self.frame_length_ms} ms every "
                f"{self.frame_shift_ms} ms"
            )
        if self.fft_size < self.frame_length:
            raise ValueError(f"[MelConfig] fft_size must be at least {self.frame_length} but got {self.fft_size}")
        if self.log_guard <= 0 or self.norm_guard <= 0:
            raise ValueError(
                f"[MelConfig] log_guard and norm_guard must be positive but got {self.log_guard} and {self.norm_guard}"
            )

    @property
    def frame_length(self) -> int:
        """Window length W in samples."""
        return int(self.sample_rate * self.frame_length_ms / 1000)

    @property
    def frame_shift(self) -> int:
        """Hop in samples."""
        return int(self.sample_rate * self.frame_shift_ms / 1000)

    @property
    def upper_freq(self) -> float:
        """Upper edge of the mel range, Hz."""
        return self.high_freq if self.high_freq > 0 else self.sample_rate / 2

    @property
    def output_size(self) -> int:
        """Width of a frame, F."""
        return self.num_mel_bins

    def frames(self, num_samples: int) -> int:
        """Return the number of frames T in `num_samples` samples.

        The transform has one more, centred on the end; the original cuts it off before it normalises.
        """
        return num_samples // self.frame_shift


# Slaney's scale: linear up to 1 kHz, where 15 mel are reached, and logarithmic above, 27 mel for a factor of 6.4.
_LINEAR_HERTZ, _LINEAR_MEL = 1000.0, 15.0
_LOG_STEP = math.log(6.4) / 27.0


def hertz_to_mel(hertz: float) -> float:
    """Return the mel of a frequency on Slaney's scale (Auditory Toolbox, 1998)."""
    if hertz < _LINEAR_HERTZ:
        return hertz * _LINEAR_MEL / _LINEAR_HERTZ
    return _LINEAR_MEL + math.log(hertz / _LINEAR_HERTZ) / _LOG_STEP


def mel_to_hertz(mel: float) -> float:
    """Invert `hertz_to_mel`."""
    if mel < _LINEAR_MEL:
        return mel * _LINEAR_HERTZ / _LINEAR_MEL
    return _LINEAR_HERTZ * math.exp((mel - _LINEAR_MEL) * _LOG_STEP)


def mel_filters(config: MelConfig) -> mx.array:
    """Return triangles of equal area, linear in hertz between corners equidistant in mel, (F, fft_size / 2 + 1)."""
    low, bins = hertz_to_mel(config.low_freq), config.num_mel_bins
    step = (hertz_to_mel(config.upper_freq) - low) / (bins + 1)
    corners = [mel_to_hertz(low + step * i) for i in range(bins + 2)]
    hertz = [k * config.sample_rate / config.fft_size for k in range(config.fft_size // 2 + 1)]
    rows = []
    for left, top, right in zip(corners, corners[1:], corners[2:], strict=False):
        height = 2.0 / (right - left)
        rows.append([height * max(0.0, min((f - left) / (top - left), (right - f) / (right - top))) for f in hertz])
    return mx.array(rows)


def hann_window(length: int) -> mx.array:
    """Return the symmetric Hann window (length,): zero at both ends."""
    return mx.array([0.5 - 0.5 * math.cos(2 * math.pi * i / (length - 1)) for i in range(length)])


class MelFrontend(nn.Module):
    """Waveform to log-mel frames with zero mean and unit deviation in each bin.

    Window and triangles are parameters, ``window`` (W,) and ``fb`` (1, F, fft_size / 2 + 1), since the published file
    holds them in the rounding that its model heard: bfloat16. A new module has the exact ones.

    Args:
        config: Front-end constants.
    """

    def __init__(self, config: MelConfig) -> None:
        super().__init__()
        self.config = config
        self.window = hann_window(config.frame_length)
        self.fb = mel_filters(config)[None]

    def __call__(self, samples: mx.array) -> mx.array:
        """Turn a waveform into normalised frames.

        Args:
            samples: Waveform (N,), float, in [-1, 1], at ``config.sample_rate``.

        Returns:
            (T, F), float32, with T = N // frame_shift. Zeros where nothing deviates: in silence, in a single frame.

        Raises:
            ValueError: If the waveform is not one-dimensional or shorter than one hop.
        """
        frames = self.log_mel(samples)
        # Counted from the first frame the mean is exact where nothing changes: digital silence becomes zeros. By the
        # plain mean its rounding, divided by no more than the guard, became a constant that no two devices agree on.
        changes = frames - frames[:1]
        centred = changes - mx.mean(changes, axis=0)
        variance = mx.sum(mx.square(centred), axis=0) / max(frames.shape[0] - 1, 1)
        return centred / (mx.sqrt(variance) + self.config.norm_guard)

    def log_mel(self, samples: mx.array) -> mx.array:
        """Compute the log-mel energies (T, F), float32, before normalisation; arguments and errors as above."""
        config = self.config
        if samples.ndim != 1:
            raise ValueError(f"[MelFrontend] samples must have shape (N,) but got {samples.shape}")
        frames = config.frames(samples.size)
        if frames == 0:
            raise ValueError(f"[MelFrontend] at least {config.frame_shift} samples are needed but got {samples.size}")
        x = samples.astype(mx.float32)
        x = mx.concatenate([x[:1], x[1:] - config.preemphasis * x[:-1]])
        # Frame t is centred on sample t · shift. Where the window lies within the transform does not change the power.
        length, half = config.frame_length, config.frame_length // 2
        x = mx.as_strided(mx.contiguous(mx.pad(x, (half, half))), (frames, length), (config.frame_shift, 1))
        spectrum = mx.fft.rfft(x * self.window.astype(mx.float32), n=config.fft_size, axis=1)
        power = mx.square(mx.real(spectrum)) + mx.square(mx.imag(spectrum))
        return mx.log(power @ self.fb[0].T.astype(mx.float32) + config.log_guard)
