"""Speech to text with a language model on MLX.

SenseVoiceSmall's SANM encoder, a post-norm adaptor and Qwen3, written from scratch::

    import qwen4b_asr

    transcriber = qwen4b_asr.load("demo")
    print(transcriber.transcribe("talk.wav").text)

Nothing heavy is imported until one of the names below is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    AsrError,
    AudioError,
    BatchError,
    CheckpointError,
    ConfigError,
    DownloadError,
    ModelNotFoundError,
    PromptError,
)
from .version import __version__

if TYPE_CHECKING:
    from .loading import load
    from .recognise import Recogniser
    from .transcribe import Transcriber
    from .transcript import Segment, TranscribeOptions, Transcript, Turn, Word

__all__ = [
    "AsrError",
    "AudioError",
    "BatchError",
    "CheckpointError",
    "ConfigError",
    "DownloadError",
    "ModelNotFoundError",
    "PromptError",
    "Recogniser",
    "Segment",
    "TranscribeOptions",
    "Transcriber",
    "Transcript",
    "Turn",
    "Word",
    "__version__",
    "load",
]

_PIPELINE = frozenset({"Recogniser", "Transcriber", "load"})
_RESULTS = frozenset({"Segment", "TranscribeOptions", "Transcript", "Turn", "Word"})


def __getattr__(name: str) -> Any:
    """Import the names that need MLX when they are first asked for (PEP 562)."""
    if name not in _PIPELINE | _RESULTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ._blas import preload_openblas

    preload_openblas()
    from . import loading, recognise, transcribe, transcript

    homes = {"load": loading, "Transcriber": transcribe, "Recogniser": recognise}
    return getattr(homes.get(name, transcript), name)


def __dir__() -> list[str]:
    return sorted(__all__)
