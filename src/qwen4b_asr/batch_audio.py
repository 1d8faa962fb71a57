"""Windows of many recordings through front end and encoder: those of similar length together, padded at the end.

Shapes: B windows, N samples, L feature rows, R audio states, D encoder width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .features import pad_features
from .listen import Listener, Stopwatch

# Padding of a group at most, as a part of all its samples.
_MOST_PADDING = 0.125
# Samples of a group at most, padding included. On the CPU a window of thirty seconds fills the matrix products by
# itself; short ones do not.
_MOST_SECONDS = {"cpu": 30.0, "gpu": 240.0}


class HasSamples(Protocol):
    """What is grouped."""

    @property
    def samples(self) -> npt.NDArray[np.float32]:
        """Waveform (N,)."""
        ...


T = TypeVar("T", bound=HasSamples)


def similar_lengths(windows: Iterable[T], most: int, sample_rate: int) -> Iterator[list[T]]:
    """Part windows into groups that are encoded together, the longest first.

    Args:
        windows: In any order.
        most: Windows of a group at most.
        sample_rate: Samples per second.
    """
    device = "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"
    room = _MOST_SECONDS[device] * sample_rate
    group: list[T] = []
    for window in sorted(windows, key=lambda window: -window.samples.size):
        longer = [*group, window]
        size = len(longer) * longer[0].samples.size
        padding = size - sum(one.samples.size for one in longer)
        if group and (len(group) == most or size > room or padding > _MOST_PADDING * size):
            yield group
            longer = [window]
        group = longer
    if group:
        yield group


@dataclass(frozen=True)
class AudioBatch:
    """Audio states of several windows.

    Args:
        states: (B, R, D), query frames first where the encoder has some.
        mask: (B, R), bool, True on real rows, which come first.
        rows: Real rows of each window.
    """

    states: mx.array
    mask: mx.array
    rows: tuple[int, ...]


def encode_together(
    listener: Listener, waveforms: Sequence[npt.NDArray[np.float32]], language: str, use_itn: bool, watch: Stopwatch
) -> AudioBatch:
    """Encode windows side by side; arguments and errors as those of `Listener.audio_states`.

    Args:
        listener: The model.
        waveforms: Samples (N,) of each window, 16 kHz.
        language: For the encoder's query frames.
        use_itn: Likewise.
        watch: Gets the seconds of ``features`` and ``encoder``.
    """
    queries: dict[str, Any] = listener.queries(language, use_itn)
    with watch.stage("features"):
        each = [listener.model.frontend(mx.array(waveform)) for waveform in waveforms]
        features, mask = pad_features(each)
        mx.eval(features, mask)
    with watch.stage("encoder"):
        # Without padding there is nothing to hide, which costs less where masks are dear.
        padded = len({len(one) for one in each}) > 1
        states, mask = listener.model.audio_encoder(features, mask if padded else None, **queries)
        rows = mx.sum(mask.astype(mx.int32), axis=1)
        mx.eval(states, mask, rows)
    counts: list[int] = rows.tolist()  # type: ignore[assignment]
    return AudioBatch(states, mask, tuple(counts))
