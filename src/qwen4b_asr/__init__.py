"""Speech to text with a language model on MLX.

SenseVoiceSmall's SANM encoder, a post-norm adaptor and Qwen3, written from scratch::

    import qwen4b_asr

    transcriber = qwen4b_asr.load("demo")
    print(transcriber.transcribe("talk.wav").text)

Nothing heavy is imported until one of the names below is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import AsrError, AudioError, CheckpointError, ConfigError, ModelNotFoundError, PromptError
from .version import __version__

if TYPE_CHECKING:
    from .transcribe import Segment, Transcriber, Transcript, load

__all__ = [
    "AsrError",
    "AudioError",
    "CheckpointError",
    "ConfigError",
    "ModelNotFoundError",
    "PromptError",
    "Segment",
    "Transcriber",
    "Transcript",
    "__version__",
    "load",
]

_LAZY = frozenset({"Segment", "Transcriber", "Transcript", "load"})


def __getattr__(name: str) -> Any:
    """Import the names that need MLX when they are first asked for (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import _blas

    _blas.preload_openblas()
    from . import transcribe

    return getattr(transcribe, name)


def __dir__() -> list[str]:
    return sorted(__all__)
