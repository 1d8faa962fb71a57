"""Changes to log-mel frames that leave the words alone: voice, pace, room, noise, level, holes.

Everything works on natural-log energies (T, F) in NumPy and takes its randomness from the caller.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ..features import FrontendConfig

Floats = npt.NDArray[np.float32]

FLOOR = math.log(2.0**-23)
"""The front end's log energy of digital silence."""


def warp_time(frames: Floats, factor: float) -> Floats:
    """Change the pace: `factor` times as many frames, linearly interpolated."""
    total = frames.shape[0]
    count = max(1, round(total * factor))
    if count == total:
        return frames
    place = (np.arange(count, dtype=np.float32) + 0.5) * (total / count) - 0.5
    low = np.clip(np.floor(place).astype(np.int64), 0, total - 1)
    high = np.minimum(low + 1, total - 1)
    weight = np.clip(place - low, 0.0, 1.0)[:, None].astype(np.float32)
    return frames[low] * (1 - weight) + frames[high] * weight


def warp_frequency(frames: Floats, factor: float, config: FrontendConfig) -> Floats:
    """Stretch the frequency axis by `factor`, as a shorter (above 1) or longer vocal tract does."""
    bins = config.num_mel_bins
    low = 1127.0 * np.log1p(config.low_freq / 700.0)
    step = (1127.0 * np.log1p(config.upper_freq / 700.0) - low) / (bins + 1)
    hertz = 700.0 * np.expm1((low + step * np.arange(1, bins + 1)) / 1127.0)
    source = (1127.0 * np.log1p(hertz / factor / 700.0) - low) / step - 1
    source = np.clip(source, 0, bins - 1)
    left = np.minimum(source.astype(np.int64), bins - 2)
    weight = (source - left).astype(np.float32)
    return frames[:, left] * (1 - weight) + frames[:, left + 1] * weight


def reverberate(frames: Floats, decay: float, level: float) -> Floats:
    """Add a room's tail: earlier frames' energy, `decay` a frame, `level` (log) below them."""
    tail = np.exp(frames)
    echo = np.zeros_like(tail)
    carried = np.zeros(frames.shape[1], dtype=np.float32)
    for t in range(1, frames.shape[0]):
        carried = decay * (carried + tail[t - 1])
        echo[t] = carried
    return np.log(tail + np.exp(np.float32(level)) * echo)


def noise_library(config: FrontendConfig, seed: int, seconds: float = 20.0) -> list[Floats]:
    """Make log-mel frames of stationary noises, mean energy 0 in log units: white to brown, hiss, hum."""
    import mlx.core as mx

    from ..features import fbank

    draw = np.random.default_rng(seed)
    count = int(seconds * config.sample_rate)
    hertz = np.fft.rfftfreq(count, 1 / config.sample_rate)
    out = []
    for slope, lowest, highest in ((0, 20, 8000), (-3, 20, 8000), (-6, 50, 8000), (3, 100, 8000), (-3, 100, 1000)):
        shape = np.where((hertz >= lowest) & (hertz <= highest), np.maximum(hertz, 20.0) ** (slope / 6.0), 0.0)
        spectrum = shape * (draw.normal(size=hertz.size) + 1j * draw.normal(size=hertz.size))
        out.append(np.fft.irfft(spectrum, count))
    times = np.arange(count) / config.sample_rate
    for mains in (50.0, 60.0):
        hum = sum(np.sin(2 * np.pi * mains * k * times + k) / k for k in (1, 2, 3, 4, 6))
        out.append(np.asarray(hum) + 0.02 * draw.normal(size=count))
    frames = []
    for wave in out:
        wave = (0.1 * wave / np.sqrt(np.mean(wave**2))).astype(np.float32)
        log_mel = np.array(fbank(mx.array(wave), config))
        frames.append((log_mel - np.log(np.exp(log_mel).mean())).astype(np.float32))
    return frames


def add_noise(frames: Floats, noise: Floats, level: float, start: int) -> Floats:
    """Add a noise of the library at log energy `level`, from its frame `start` on, around and around."""
    piece = np.take(noise, np.arange(start, start + frames.shape[0]), axis=0, mode="wrap")
    return np.logaddexp(frames, piece + np.float32(level))


def tilt(bins: int, rng: np.random.Generator, strength: float) -> Floats:
    """Draw a smooth spectral colouring (F,), log energy, as microphones and lines have it."""
    axis = np.linspace(0.0, np.pi, bins)
    weights = rng.normal(size=4) * strength * np.array([0.0, 1.0, 0.7, 0.5])
    return (weights @ np.cos(np.arange(4)[:, None] * axis)).astype(np.float32)


def mask_blocks(frames: Floats, rng: np.random.Generator, widest: int, longest: int, fill: Floats) -> Floats:
    """SpecAugment (Park et al., 2019): replace up to two bands and two short spans by `fill` (F,)."""
    out = frames.copy()
    total, bins = frames.shape
    for _ in range(int(rng.integers(0, 3))):
        width = int(rng.integers(0, widest + 1))
        at = int(rng.integers(0, bins - width + 1))
        out[:, at : at + width] = fill[at : at + width]
    for _ in range(int(rng.integers(0, 3)) if total > 30 else 0):
        length = int(rng.integers(0, longest + 1))
        at = int(rng.integers(0, total - length + 1))
        out[at : at + length] = fill
    return out
