"""From a recording to its words by the CTC head alone: no language model, one pass, times for each word.

waveform (N,) → features (L, 560) → audio states (1, R, D) → scores (R, V) → symbols → text, tags and times.
SenseVoiceSmall is such a model by itself; the 4B system and Fun-ASR-Nano have the head beside their language model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .audio import SAMPLE_RATE, Source, load_audio
from .byte_pieces import read_byte_pieces
from .config import ModelConfig
from .errors import ConfigError, PromptError
from .listen import Listener, Stopwatch
from .model import SpeechModel
from .nano_adaptor import NO_CTC
from .pieces import PIECE_FILES, SPACE, PieceKind, PieceTable, read_pieces
from .rich_decoding import CtcOptions, RichDecoder, RichRecognition
from .segment import split_at_pauses
from .text import join_segments
from .transcript import OnToken, Segment, TranscribeOptions, Transcript, Word

# What only a language model can do something with.
_NOT_HERE = ("prompt_profile", "translate", "max_tokens", "hotwords", "history", "low_frame_rate")


class Recogniser(Listener):
    """A loaded model whose CTC head writes the text.

    Args:
        model: The network, weights filled in.
        config: Its configuration.
        pieces: Text of the CTC symbols; None where the configuration has them.

    Raises:
        ConfigError: If the model has no CTC head, or nothing says what its symbols read as.
    """

    def __init__(self, model: SpeechModel, config: ModelConfig, pieces: PieceTable | None = None) -> None:
        super().__init__(model, config)
        if not config.ctc_size:
            raise ConfigError(NO_CTC)
        if pieces is None and config.ctc_symbols is None:
            raise ConfigError(
                f"{config.name}: has a CTC head, but nothing says what its symbols read as ({' or '.join(PIECE_FILES)})"
            )
        table = pieces or _own_symbols(config)
        if len(table) != config.ctc_size:
            raise ConfigError(
                f"{config.name}: the CTC head has {config.ctc_size} symbols, but the file of pieces {len(table)}"
            )
        self.decode = RichDecoder(table, blank=config.ctc_blank, query_rows=config.query_frames)

    def transcribe(
        self, source: Source, sample_rate: int | None = None, *, on_token: OnToken | None = None, **options: Any
    ) -> Transcript:
        """Transcribe a recording.

        Args:
            source: As in `Transcriber.transcribe`.
            sample_rate: Likewise.
            on_token: Called with the text of each window, which comes in one piece.
            **options: Fields of `TranscribeOptions`: language, use_itn, decoder (``ctc`` or ``ctc-beam``), beam_size,
                segment_seconds; those of language models are refused.

        Raises:
            AudioError: If the recording cannot be read or is too short.
            PromptError: If an option is not for this kind of model.
            TypeError: On an unknown option.
        """
        chosen = TranscribeOptions.of(options)
        self._refuse(chosen)
        watch = Stopwatch()
        with watch.stage("audio"):
            samples = load_audio(source, sample_rate)
        return self.transcribe_window_by_window(samples, chosen, on_token, watch)

    def transcribe_window_by_window(
        self,
        samples: npt.NDArray[np.float32],
        options: TranscribeOptions,
        on_token: OnToken | None,
        watch: Stopwatch,
    ) -> Transcript:
        """Transcribe samples (N,), 16 kHz; see `transcribe`."""
        begun = time.perf_counter()
        found: list[RichRecognition] = []
        segments: list[Segment] = []
        words: list[Word] = []
        for first, last in split_at_pauses(samples, SAMPLE_RATE, options.segment_seconds):
            heard = self._window(samples[first:last], options, watch)
            start = first / SAMPLE_RATE
            if on_token is not None and heard.rich.text:
                before = join_segments([s.text for s in segments])
                on_token(join_segments([before, heard.rich.text])[len(before) :])
            found.append(heard)
            segments.append(Segment(start, last / SAMPLE_RATE, heard.rich.text))
            words += [Word(start + word.start, start + word.end, word.text) for word in heard.words]
        watch.add("total", watch.seconds.get("audio", 0.0) + time.perf_counter() - begun)
        asked = None if options.language == "auto" else options.language
        return Transcript(
            text=join_segments([s.text for s in segments]),
            tokens=tuple(i for heard in found for i in heard.ids),
            language=asked or _most([heard.rich.language for heard in found]),
            duration_seconds=samples.size / SAMPLE_RATE,
            segments=tuple(segments),
            timings=watch.seconds,
            model=self.config.name,
            emotion=_most([heard.rich.emotion for heard in found]),
            events=tuple(dict.fromkeys(event for heard in found for event in heard.rich.events)),
            words=tuple(words),
        )

    def _refuse(self, options: TranscribeOptions) -> None:
        defaults = TranscribeOptions()
        wrong = [name for name in _NOT_HERE if getattr(options, name) != getattr(defaults, name)]
        if options.task != defaults.task:
            wrong.append("task")
        if options.draft is True:
            wrong.append("draft")
        if options.decoder == "llm":
            wrong.append("decoder llm")
        if wrong:
            raise PromptError(f"{self.config.name} writes with its CTC head, which has no {', '.join(wrong)}")

    def _window(
        self, samples: npt.NDArray[np.float32], options: TranscribeOptions, watch: Stopwatch
    ) -> RichRecognition:
        states = self.audio_states(samples, options.language, bool(options.use_itn), watch)
        with watch.stage("ctc"):
            logits = self.model.ctc_logits(states)[0]
            mx.eval(logits)
            return self.decode(logits, CtcOptions(options.beam_size if options.decoder == "ctc-beam" else 1))


def _own_symbols(config: ModelConfig) -> PieceTable:
    """Take the text of the symbols from the configuration; the empty one, the blank, adds nothing."""
    symbols = config.ctc_symbols or ()
    kinds = tuple(PieceKind.NORMAL if symbol else PieceKind.CONTROL for symbol in symbols)
    return PieceTable(tuple(symbol.replace(" ", SPACE) for symbol in symbols), kinds)


def find_pieces(directory: Path, size: int) -> PieceTable | None:
    """Read the text of the CTC symbols from a model directory; None if it has no such file.

    Args:
        directory: The model directory.
        size: Symbols of the CTC head.

    Raises:
        CheckpointError: If the file is damaged.
    """
    path = next((directory / name for name in PIECE_FILES if (directory / name).is_file()), None)
    if path is None:
        return None
    return read_byte_pieces(path, size) if path.suffix == ".tiktoken" else read_pieces(path)


def _most(values: Sequence[str | None]) -> str | None:
    """Return the most frequent value, the first of equals; None if nothing is known."""
    known = [value for value in values if value is not None]
    return max(dict.fromkeys(known), key=known.count) if known else None
