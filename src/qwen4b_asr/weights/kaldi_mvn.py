"""Read ``am.mvn``, the mean and variance normalisation of SenseVoiceSmall, in Kaldi's nnet text format.

The file is a stack of blocks such as ``<AddShift> 560 560 <LearnRateCoef> 0 [ -8.31 ... ]``.
Blocks are found by name: ``<Splice>`` has brackets of its own, so counting brackets takes
the wrong ones. Upstream: ``load_cmvn`` in ``funasr/frontends/wav_frontend.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError

_BLOCK = re.compile(
    r"<(?P<name>\w+)>\s*(?P<rows>\d+)\s+(?P<columns>\d+)\s*(?:<LearnRateCoef>\s*\S+\s*)?\[(?P<values>[^\]\[]*)\]"
)
_MAX_BYTES = 4 << 20


@dataclass(frozen=True, eq=False)
class KaldiMvn:
    """Normalisation of a feature row: y = (x + shift) · scale, both (m*F,) float32."""

    shift: np.ndarray[Any, Any]
    scale: np.ndarray[Any, Any]


def read_kaldi_mvn(path: Path) -> KaldiMvn:
    """Read shift and scale from an ``am.mvn``.

    Args:
        path: The file.

    Raises:
        CheckpointError: If the file is missing or damaged; the message names the block.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        text = raw.decode("ascii")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: this is no Kaldi text file; am.mvn is plain text") from error
    if len(raw) > _MAX_BYTES:
        raise CheckpointError(f"{path}: an am.mvn has a few kB, this file more than {_MAX_BYTES} bytes")
    blocks: dict[str, np.ndarray[Any, Any]] = {}
    for match in _BLOCK.finditer(text):
        name = match["name"]
        if name in blocks:
            raise CheckpointError(f"{path}: the block <{name}> occurs twice")
        if name in ("AddShift", "Rescale"):
            blocks[name] = _values(path, name, int(match["rows"]), match["values"])
    for name in ("AddShift", "Rescale"):
        if name not in blocks:
            raise CheckpointError(f"{path}: there is no complete block <{name}> N N [ ... ]; is the file cut short?")
    shift, scale = blocks["AddShift"], blocks["Rescale"]
    if shift.shape != scale.shape:
        raise CheckpointError(f"{path}: <AddShift> has {shift.size} values but <Rescale> has {scale.size}")
    return KaldiMvn(shift, scale)


def _values(path: Path, name: str, count: int, text: str) -> np.ndarray[Any, Any]:
    try:
        values = np.array([float(word) for word in text.split()], np.float64)
    except ValueError as error:
        raise CheckpointError(f"{path}: the block <{name}> holds something that is not a number ({error})") from error
    if values.size != count:
        raise CheckpointError(f"{path}: the block <{name}> announces {count} values but holds {values.size}")
    if not (np.abs(values) <= np.finfo(np.float32).max).all():  # false for NaN too
        raise CheckpointError(f"{path}: the block <{name}> holds a value that is not finite in float32")
    return values.astype(np.float32)
