"""Waveform to features: Kaldi log-mel filter bank, low frame rate, mean and variance normalisation.

The recipe is Kaldi's ``compute-fbank-feats`` as FunASR's ``WavFrontend`` calls it
(``funasr/frontends/wav_frontend.py``, through kaldi-native-fbank), without dither.
Shapes: N samples, T 10-ms frames, F mel bins, L 60-ms rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn

from .kernels.lfr_cmvn import lfr_cmvn, low_frame_rate

# Kaldi floors the mel energies at float32's machine epsilon before the logarithm.
_LOG_FLOOR = 1.1920928955078125e-07


@dataclass(frozen=True)
class FrontendConfig:
    """Sizes and constants of the front end.

    Args:
        sample_rate: Samples per second of the waveform.
        num_mel_bins: Mel bins F.
        frame_length_ms: Window length in milliseconds.
        frame_shift_ms: Hop in milliseconds.
        low_freq: Lower edge of the first triangle, Hz.
        high_freq: Upper edge of the last triangle, Hz; 0 means half the sample rate.
        preemphasis: Coefficient of the first-order pre-emphasis.
        input_scale: Factor from [-1, 1] to the 16-bit range that Kaldi expects.
        lfr_m: Frames stacked into one low-frame-rate row.
        lfr_n: Frames between two rows.
        cmvn: Whether the model carries a mean and variance normalisation.
    """

    sample_rate: int = 16000
    num_mel_bins: int = 80
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    low_freq: float = 20.0
    high_freq: float = 0.0
    preemphasis: float = 0.97
    input_scale: float = 32768.0
    lfr_m: int = 7
    lfr_n: int = 6
    cmvn: bool = True

    def __post_init__(self) -> None:
        for name in ("sample_rate", "num_mel_bins", "lfr_m", "lfr_n"):
            if getattr(self, name) < 1:
                raise ValueError(f"[FrontendConfig] {name} must be at least 1 but got {getattr(self, name)}")
        if not 0 <= self.low_freq < self.upper_freq <= self.sample_rate / 2:
            raise ValueError(
                f"[FrontendConfig] the mel range must lie within 0..{self.sample_rate / 2} Hz "
                f"but got {self.low_freq}..{self.upper_freq}"
            )
        if self.frame_shift < 1 or self.frame_length < 2:
            raise ValueError(
                f"[FrontendConfig] frames must hold samples but got {self.frame_length_ms} ms every "
                f"{self.frame_shift_ms} ms"
            )

    @property
    def frame_length(self) -> int:
        """Window length in samples."""
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
        """Width of a low-frame-rate row, m · F."""
        return self.lfr_m * self.num_mel_bins


def frame_count(num_samples: int, config: FrontendConfig) -> int:
    """Return the number of whole frames T in `num_samples` samples (Kaldi's ``snip_edges``)."""
    if num_samples < config.frame_length:
        return 0
    return 1 + (num_samples - config.frame_length) // config.frame_shift


@lru_cache(maxsize=8)
def _hamming(length: int) -> mx.array:
    step = 2 * math.pi / (length - 1)
    return mx.array([0.54 - 0.46 * math.cos(step * i) for i in range(length)])


@lru_cache(maxsize=8)
def _mel_filters(config: FrontendConfig, fft_size: int) -> mx.array:
    """Return Kaldi's triangles, linear in mel = 1127 · ln(1 + f / 700), as (fft_size / 2 + 1, F)."""

    def mel(hertz: float) -> float:
        return 1127.0 * math.log1p(hertz / 700.0)

    low = mel(config.low_freq)
    step = (mel(config.upper_freq) - low) / (config.num_mel_bins + 1)
    rows = []
    for k in range(fft_size // 2):
        position = (mel(k * config.sample_rate / fft_size) - low) / step  # in units of half a triangle
        rows.append([max(0.0, 1.0 - abs(position - (f + 1))) for f in range(config.num_mel_bins)])
    rows.append([0.0] * config.num_mel_bins)  # Kaldi leaves the Nyquist bin out
    return mx.array(rows)


def fbank(samples: mx.array, config: FrontendConfig) -> mx.array:
    """Compute Kaldi's log-mel filter bank.

    Per frame: subtract the mean, pre-emphasise (the first sample against itself), Hamming window,
    power spectrum, mel triangles, natural logarithm with the energies floored at float32 epsilon.

    Args:
        samples: Waveform (N,), float, in [-1, 1], at ``config.sample_rate``.
        config: Front-end constants.

    Returns:
        Log-mel energies (T, F), float32, with T = 1 + (N - frame_length) // frame_shift.

    Raises:
        ValueError: If the waveform is not one-dimensional or shorter than one frame.
    """
    if samples.ndim != 1:
        raise ValueError(f"[fbank] samples must have shape (N,) but got {samples.shape}")
    frames = frame_count(samples.size, config)
    if frames == 0:
        raise ValueError(f"[fbank] at least {config.frame_length} samples are needed but got {samples.size}")
    x = samples.astype(mx.float32) * config.input_scale
    x = mx.as_strided(mx.contiguous(x), (frames, config.frame_length), (config.frame_shift, 1))
    x = x - mx.mean(x, axis=1, keepdims=True)
    x = x - config.preemphasis * mx.concatenate([x[:, :1], x[:, :-1]], axis=1)
    x = x * _hamming(config.frame_length)
    fft_size = 1 << (config.frame_length - 1).bit_length()
    spectrum = mx.fft.rfft(x, n=fft_size, axis=1)
    power = mx.square(mx.real(spectrum)) + mx.square(mx.imag(spectrum))
    return mx.log(mx.maximum(power @ _mel_filters(config, fft_size), _LOG_FLOOR))


def pad_features(features: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
    """Join utterances into a batch, padded with zeros at the end.

    Args:
        features: Rows (L_i, m · F) of each utterance.

    Returns:
        Features (B, L, m · F) and mask (B, L), bool, True on real rows.

    Raises:
        ValueError: If the list is empty.
    """
    if not features:
        raise ValueError("[pad_features] at least one utterance is needed but got none")
    longest = max(f.shape[0] for f in features)
    batch = mx.stack([mx.pad(f, [(0, longest - f.shape[0]), (0, 0)]) for f in features])
    lengths = mx.array([f.shape[0] for f in features])
    return batch, mx.arange(longest)[None, :] < lengths[:, None]


class Frontend(nn.Module):
    """Waveform to normalised low-frame-rate rows.

    Holds the model's normalisation, y = (x + shift) · scale after stacking, as ``cmvn_shift`` and
    ``cmvn_scale`` (m · F,) when ``config.cmvn`` is set (Kaldi's ``am.mvn``).

    Args:
        config: Front-end constants.
    """

    def __init__(self, config: FrontendConfig) -> None:
        super().__init__()
        self.config = config
        if config.cmvn:
            self.cmvn_shift = mx.zeros(config.output_size)
            self.cmvn_scale = mx.ones(config.output_size)

    def __call__(self, samples: mx.array) -> mx.array:
        """Turn one waveform (N,) in [-1, 1] into rows (L, m · F), float32."""
        frames, m, n = fbank(samples, self.config), self.config.lfr_m, self.config.lfr_n
        if self.config.cmvn:
            return lfr_cmvn(frames, self.cmvn_shift, self.cmvn_scale, m=m, n=n)
        return low_frame_rate(frames, m, n)
