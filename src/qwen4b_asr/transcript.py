"""What can be asked of a transcription, and what comes back: frozen, checked, plain to print."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .audio import Source
from .errors import PromptError

OnToken = Callable[[str], None]

DECODERS = ("llm", "ctc", "ctc-beam")


@dataclass(frozen=True)
class Turn:
    """An earlier turn of a conversation, for models that read several: a recording and what was written of it.

    Args:
        source: As `Transcriber.transcribe` takes it; at most one window long.
        text: The answer.
        sample_rate: Of an array.
    """

    source: Source
    text: str
    sample_rate: int | None = None


@dataclass(frozen=True)
class TranscribeOptions:
    """How to transcribe. None leaves a choice to the model's configuration.

    Args:
        language: ``auto``, or a language that the model knows: zh, en, yue, ja, ko, nospeech with SenseVoice's encoder.
        decoder: ``llm`` (the language model), ``ctc`` (the CTC head, best path) or ``ctc-beam`` (prefix beam search);
            None is the language model where there is one.
        beam_size: Texts that the beam search keeps.
        prompt_profile: plain, raw, instruct or chatml.
        task: ``transcribe``, or ``translate`` for English from speech (instruct and chatml only).
        translate: Also translate the transcript to English, as `Transcript.translation`.
        use_itn: Ask for inverse text normalisation: digits and punctuation as they are read. None: as the model was
            published, off with SenseVoice's encoder and on with Fun-ASR-Nano.
        hotwords: Words and names that are likely to be heard (Fun-ASR-Nano).
        history: Earlier turns, oldest first (Fun-ASR-Nano).
        low_frame_rate: Give the decoder an eighth of the audio rows (Fun-ASR-Nano); None: as the model is configured.
        max_tokens: Budget of each segment; None lets it grow with the segment's duration.
        temperature: 0 is greedy; above 0 tokens are drawn.
        top_k: See `sampling.SamplingOptions`.
        top_p: See `sampling.SamplingOptions`.
        repetition_penalty: See `sampling.SamplingOptions`.
        no_repeat_ngram: See `sampling.SamplingOptions`.
        seed: Seed of the draws.
        draft: Let the language model verify the CTC head's text, many tokens at a time, rather than write it token by
            token; the result is the same. True, False, or ``auto``: wherever it can be done and is likely to save time.
        segment_seconds: Longest window; longer recordings are cut at their quietest points.
        kv_bits: Keep the language model's keys and values in 8 or 4 bits, to save memory; None keeps them as they are.
    """

    language: str = "auto"
    decoder: str | None = None
    beam_size: int = 10
    prompt_profile: str | None = None
    task: str = "transcribe"
    translate: bool = False
    use_itn: bool | None = None
    hotwords: tuple[str, ...] = ()
    history: tuple[Turn, ...] = ()
    low_frame_rate: bool | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float | None = None
    no_repeat_ngram: int | None = None
    seed: int | None = None
    draft: bool | str = "auto"
    segment_seconds: float = 30.0
    kv_bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("hotwords", "history"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.decoder is not None and self.decoder not in DECODERS:
            raise PromptError(f"unknown decoder {self.decoder!r}; choose one of {', '.join(DECODERS)}")
        if self.beam_size < 1:
            raise ValueError(f"[TranscribeOptions] beam_size must be at least 1 but got {self.beam_size}")
        if self.kv_bits not in (None, 4, 8):
            raise ValueError(f"[TranscribeOptions] kv_bits must be 4, 8 or None but got {self.kv_bits}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"[TranscribeOptions] max_tokens must be at least 1 but got {self.max_tokens}")
        if self.draft not in (True, False, "auto"):
            raise ValueError(f"[TranscribeOptions] draft must be True, False or 'auto' but got {self.draft!r}")
        if self.draft is True and self.temperature > 0:
            raise PromptError("a draft is for greedy decoding: set temperature to 0, or ask for no draft")
        if self.draft is True and self.kv_bits is not None:
            raise PromptError("a draft needs keys and values as they are: leave kv_bits out, or ask for no draft")

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
class Word:
    """A word, or a character of a script without spaces; `start` and `end` in seconds."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """What was heard.

    Args:
        text: The words.
        tokens: Token ids behind them, all segments in order.
        language: The language asked for, or the one that the model heard where it says so; None if neither is known.
        duration_seconds: Length of the recording.
        segments: Stretches with their texts; one, unless the recording had to be cut.
        timings: Seconds spent per stage.
        finish_reason: ``stop``, or ``length`` if the token budget cut a text off.
        model: Name of the model.
        translation: English translation, if it was asked for.
        emotion: How it was said, where the model tells: neutral, happy, sad, angry, ...
        events: What else was heard, where the model tells: speech, bgm, laughter, ...
        words: Words with their times, from a CTC head.
        decoder_passes: Passes of the language model after it has read the prompts.
        drafted: Tokens of drafts that passes have verified.
        accepted: How many of them were right.
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
    emotion: str | None = None
    events: tuple[str, ...] = ()
    words: tuple[Word, ...] = ()
    decoder_passes: int = 0
    drafted: int = 0
    accepted: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = dataclasses.asdict(self)
        values["tokens"] = list(self.tokens)
        values["events"] = list(self.events)
        for name in ("segments", "words"):
            values[name] = list(values[name])
        return values
