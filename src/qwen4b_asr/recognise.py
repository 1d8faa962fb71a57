"""From a recording to its words by the CTC head alone: no language model, one pass, times for each word.

waveform (N,) → features (L, 560) → audio states (1, R, D) → scores (R, V) → symbols → text, tags and times.
SenseVoiceSmall is such a model by itself; the 4B system and Fun-ASR-Nano have the head beside their language model.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from .batch import BatchResult

# What only a language model can do something with.
_NOT_HERE = ("prompt_profile", "translate", "max_tokens", "hotwords", "history", "low_frame_rate", "kv_bits")


@dataclass(frozen=True)
class HeardWindow:
    """What the CTC head found in one window; `first` and `last` in samples."""

    first: int
    last: int
    found: RichRecognition


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
        self.refuse(chosen)
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
        heard: list[HeardWindow] = []
        for first, last in split_at_pauses(samples, SAMPLE_RATE, options.segment_seconds):
            states = self.audio_states(samples[first:last], options.language, bool(options.use_itn), watch)
            found = self.decode_states(states, options, watch)
            if on_token is not None and found.rich.text:
                before = join_segments([window.found.rich.text for window in heard])
                on_token(join_segments([before, found.rich.text])[len(before) :])
            heard.append(HeardWindow(first, last, found))
        transcript = self.joined(heard, options, watch)
        watch.add("total", watch.seconds.get("audio", 0.0) + time.perf_counter() - begun)
        return transcript

    def decode_states(self, states: mx.array, options: TranscribeOptions, watch: Stopwatch) -> RichRecognition:
        """Recognise what the audio states (1, R, D) of one window say."""
        with watch.stage("ctc"):
            logits = self.model.ctc_logits(states)[0]
            mx.eval(logits)
            return self.decode(logits, CtcOptions(options.beam_size if options.decoder == "ctc-beam" else 1))

    def joined(self, heard: Sequence[HeardWindow], options: TranscribeOptions, watch: Stopwatch) -> Transcript:
        """Join the windows of one recording, in order."""
        segments: list[Segment] = []
        words: list[Word] = []
        for window in heard:
            start = window.first / SAMPLE_RATE
            segments.append(Segment(start, window.last / SAMPLE_RATE, window.found.rich.text))
            words += [Word(start + word.start, start + word.end, word.text) for word in window.found.words]
        asked = None if options.language == "auto" else options.language
        rich = [window.found.rich for window in heard]
        return Transcript(
            text=join_segments([s.text for s in segments]),
            tokens=tuple(i for window in heard for i in window.found.ids),
            language=asked or _most([one.language for one in rich]),
            duration_seconds=heard[-1].last / SAMPLE_RATE,
            segments=tuple(segments),
            timings=watch.seconds,
            model=self.config.name,
            emotion=_most([one.emotion for one in rich]),
            events=tuple(dict.fromkeys(event for one in rich for event in one.events)),
            words=tuple(words),
        )

    def transcribe_batch(
        self, sources: Iterable[Source], *, batch_size: int | None = None, **options: Any
    ) -> list[BatchResult]:
        """Transcribe many recordings, several at once; see `batch.transcribe_batch` for all of this."""
        from .batch import transcribe_batch  # here, since it needs this class

        return transcribe_batch(self, sources, batch_size=batch_size, **options)

    def refuse(self, options: TranscribeOptions) -> None:
        """Refuse options that only a language model can do something with.

        Raises:
            PromptError: If there are such.
        """
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
