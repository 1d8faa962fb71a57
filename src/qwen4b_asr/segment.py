"""Cuts long recordings where they are quietest, so that no window outgrows what the models were made for.

Shapes: N samples.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# A pause between words lasts longer than this; the quietest stretch of this length is where a cut hurts least.
_PAUSE_SECONDS = 0.2
_STEP_SECONDS = 0.02
_SHORTEST_SECONDS = 1.0


def split_at_pauses(
    samples: npt.NDArray[np.float32], sample_rate: int, max_seconds: float = 30.0
) -> list[tuple[int, int]]:
    """Divide a recording into windows of at most `max_seconds`, cut in the quietest part of each last third.

    A recording that fits into one window is left whole.

    Args:
        samples: Waveform (N,).
        sample_rate: Samples per second.
        max_seconds: Longest window, in seconds; at least 3.

    Returns:
        Half-open sample ranges, in order, that cover 0..N without gaps; each is at least a second long
        (unless the recording is shorter).

    Raises:
        ValueError: If `max_seconds` is below 3 or the waveform is not (N,).
    """
    if samples.ndim != 1:
        raise ValueError(f"[split_at_pauses] samples must have shape (N,) but got {samples.shape}")
    if not max_seconds >= 3 * _SHORTEST_SECONDS:
        raise ValueError(f"[split_at_pauses] max_seconds must be at least 3 but got {max_seconds}")
    longest = int(max_seconds * sample_rate)
    shortest = int(_SHORTEST_SECONDS * sample_rate)
    windows = []
    start = 0
    while samples.size - start > longest:
        first = start + longest * 2 // 3
        last = min(start + longest, samples.size - shortest)
        cut = first + _quietest(samples[first:last], sample_rate)
        windows.append((start, cut))
        start = cut
    windows.append((start, samples.size))
    return windows


def _quietest(samples: npt.NDArray[np.float32], sample_rate: int) -> int:
    """Return the middle of the stretch with the least energy; the latest one among equals."""
    step = max(1, int(_STEP_SECONDS * sample_rate))
    width = round(_PAUSE_SECONDS / _STEP_SECONDS)
    blocks = samples[: samples.size // step * step].reshape(-1, step).astype(np.float64)
    if blocks.shape[0] < width:
        return samples.size // 2
    energy = np.convolve((blocks**2).sum(axis=1), np.ones(width), mode="valid")
    # Rounding in the convolution must not decide between stretches of silence.
    latest = int(np.flatnonzero(energy <= energy.min() + 1e-9)[-1])
    return latest * step + width * step // 2
