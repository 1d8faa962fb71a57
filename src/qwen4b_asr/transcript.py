"""What can be asked of a transcription, and what comes back: frozen, checked, plain to print."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .encoder import LANGUAGE_QUERIES
from .errors import PromptError


@dataclass(frozen=True)
class TranscribeOptions:
    """How to transcribe. None leaves a choice to the model's configuration.

    Args:
        language: Language query of the encoder: auto, zh, en, yue, ja, ko, nospeech.
        prompt_profile: plain, raw, instruct or chatml.
        task: ``transcribe``, or ``translate`` for English from speech (instruct and chatml only).
        translate: Also translate the transcript to English, as `Transcript.translation`.
        use_itn: Ask the encoder for inverse text normalisation.
        max_tokens: Budget of each segment; None lets it grow with the segment's duration.
        temperature: 0 is greedy; above 0 tokens are drawn.
        top_k: See `sampling.SamplingOptions`.
        top_p: See `sampling.SamplingOptions`.
        repetition_penalty: See `sampling.SamplingOptions`.
        no_repeat_ngram: See `sampling.SamplingOptions`.
        seed: Seed of the draws.
        segment_seconds: Longest window; longer recordings are cut at their quietest points.
    """

    language: str = "auto"
    prompt_profile: str | None = None
    task: str = "transcribe"
    translate: bool = False
    use_itn: bool = False
    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float | None = None
    no_repeat_ngram: int | None = None
    seed: int | None = None
    segment_seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.language not in LANGUAGE_QUERIES:
            raise PromptError(f"unknown language {self.language!r}; choose one of {', '.join(LANGUAGE_QUERIES)}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"[TranscribeOptions] max_tokens must be at least 1 but got {self.max_tokens}")

    @classmethod
    def of(cls, options: dict[str, Any]) -> TranscribeOptions:
        """Build from keyword arguments.

        Raises:
            TypeError: On an unknown option.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(f"[Transcriber] options must be among {', '.join(known)} but got {', '.join(unknown)}")
        return cls(**options)


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording and its text; `start` and `end` in seconds."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """What was heard.

    Args:
        text: The words.
        tokens: Token ids behind them, all segments in order.
        language: The language asked for; None if it was left to the model.
        duration_seconds: Length of the recording.
        segments: Stretches with their texts; one, unless the recording had to be cut.
        timings: Seconds spent per stage.
        finish_reason: ``stop``, or ``length`` if the token budget cut a text off.
        model: Name of the model.
        translation: English translation, if it was asked for.
    """

    text: str
    tokens: tuple[int, ...]
    language: str | None
    duration_seconds: float
    segments: tuple[Segment, ...]
    timings: dict[str, float] = field(default_factory=dict)
    finish_reason: str = "stop"
    model: str = ""
    translation: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = dataclasses.asdict(self)
        values["tokens"] = list(self.tokens)
        values["segments"] = [dataclasses.asdict(s) for s in self.segments]
        return values
