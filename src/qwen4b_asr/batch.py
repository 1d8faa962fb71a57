"""Many recordings at once: windows of similar length are encoded together, and the decoder's steps are shared.

Recordings are taken a few batches at a time, so that memory does not grow with their number. Among these the windows
are sorted by length, the longest first: little padding, and whoever is done makes room for one who fits in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .audio import SAMPLE_RATE, Source, load_audio
from .batch_audio import AudioBatch, encode_together, similar_lengths
from .batch_generate import BatchGeneration, Prompt
from .errors import AudioError, BatchError
from .listen import Listener, Stopwatch
from .nano_adaptor import NanoAdaptorConfig, rows_kept
from .pass_costs import pass_cost
from .recognise import HeardWindow, Recogniser
from .segment import split_at_pauses
from .transcript import TranscribeOptions, Transcript
from .written import WrittenWindow

if TYPE_CHECKING:
    from .transcribe import Transcriber

BatchResult: TypeAlias = "Transcript | AudioError"
OnTranscript: TypeAlias = Callable[[int, BatchResult], None]

# Windows that are sorted by length at a time, in batches: the more, the less padding, and the more audio is held.
_BATCHES_AHEAD = 8
_USUAL = 8
# A pass for several that costs so much of theirs alone leaves too little to share.
_MOST_COST = 0.75


def transcribe_batch(
    listener: Transcriber | Recogniser,
    sources: Iterable[Source],
    *,
    batch_size: int | None = None,
    on_transcript: OnTranscript | None = None,
    errors: str = "raise",
    sample_rate: int | None = None,
    **options: Any,
) -> list[BatchResult]:
    """Transcribe many recordings, several at once.

    Each text is the one that `transcribe` gives: see `batch_generate.BatchGeneration` for what that means in 16 bits.
    A recording that cannot be read does not keep the others from being transcribed.

    Args:
        listener: The model.
        sources: As `Transcriber.transcribe` takes them; read a few batches ahead, so a generator may open files late.
        batch_size: Windows decoded side by side. With 1, one recording is transcribed after the other. None: 8, or 1
            where the device multiplies the model's weights row by row, so that nothing is saved.
        on_transcript: Called with place and result of each recording, in their order, as soon as it and all before
            it are there; the result of a recording that cannot be read is its error.
        errors: ``raise`` raises at the end if there were any, with all results in the error; ``return`` leaves them
            in the list.
        sample_rate: Of sources that are arrays; None means 16 kHz.
        **options: Fields of `TranscribeOptions`, for all of them.

    Returns:
        One result for each source, in their order.

    Raises:
        BatchError: If recordings could not be read, after all others are done, unless errors are returned.
        PromptError: If the options do not fit the model.
        TypeError: On an unknown option.
        ValueError: If `batch_size` is below 1, or above it with ``draft=True``, since a draft is verified for one text
            at a time; or if `errors` is neither of the two.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"[transcribe_batch] batch_size must be at least 1 but got {batch_size}")
    if errors not in ("raise", "return"):
        raise ValueError(f"[transcribe_batch] errors must be 'raise' or 'return' but got {errors!r}")
    chosen = TranscribeOptions.of(options)
    stages: _Stages
    if isinstance(listener, Recogniser):
        stages = _Recognising(listener, chosen)
    elif chosen.decoder not in (None, "llm"):
        stages = _Recognising(listener.recogniser(), chosen)
    else:
        stages = _Writing(listener, chosen, batch_size)
    results = _Batch(stages, chosen, batch_size, on_transcript).run(sources, sample_rate)
    failed = [result for result in results if isinstance(result, AudioError)]
    if failed and errors == "raise":
        raise BatchError(f"{len(failed)} of {len(results)} recordings failed; the first: {failed[0]}", results)
    return results


@dataclass
class Recording:
    """One of the sources.

    Args:
        number: Its place among them.
        samples: (N,), 16 kHz.
        watch: Seconds spent on it, its shares of what was done for several at once included.
        windows: The stretches that it is cut into.
        waiting: How many of them nobody has heard yet.
    """

    number: int
    samples: npt.NDArray[np.float32]
    watch: Stopwatch
    windows: list[Window] = field(default_factory=list)
    waiting: int = 0


@dataclass
class Window:
    """A stretch of a recording, `first` and `last` in samples, and what was found there."""

    recording: Recording
    first: int
    last: int
    found: Any = None

    @property
    def samples(self) -> npt.NDArray[np.float32]:
        """Waveform (N,)."""
        return self.recording.samples[self.first : self.last]


class _Stages(Protocol):
    """What is done with windows: one kind for language models, one for CTC heads."""

    batch_size: int
    """What pays."""

    def alone(self, recording: Recording) -> Transcript:
        """Transcribe a recording by itself."""
        ...

    def together(self, pools: Iterable[list[Window]], batch_size: int) -> Iterator[Window]:
        """Fill `found` of all windows, several at once; yield each when it is done."""
        ...

    def joined(self, recording: Recording) -> Transcript:
        """Join what was found in the windows of a recording."""
        ...


class _Recognising:
    """The CTC head writes."""

    batch_size = _USUAL

    def __init__(self, recogniser: Recogniser, options: TranscribeOptions) -> None:
        recogniser.refuse(options)
        self.recogniser = recogniser
        self.options = options

    def alone(self, recording: Recording) -> Transcript:
        return self.recogniser.transcribe_window_by_window(recording.samples, self.options, None, recording.watch)

    def together(self, pools: Iterable[list[Window]], batch_size: int) -> Iterator[Window]:
        for pool in pools:
            for group in similar_lengths(pool, batch_size, SAMPLE_RATE):
                audio = _encode(self.recogniser, group, self.options)
                for place, (window, rows) in enumerate(zip(group, audio.rows, strict=True)):
                    states = audio.states[place : place + 1, :rows]
                    found = self.recogniser.decode_states(states, self.options, window.recording.watch)
                    window.found = HeardWindow(window.first, window.last, found)
                    yield window

    def joined(self, recording: Recording) -> Transcript:
        return self.recogniser.joined([w.found for w in recording.windows], self.options, recording.watch)


class _Writing:
    """The language model writes."""

    def __init__(self, transcriber: Transcriber, options: TranscribeOptions, batch_size: int | None) -> None:
        if options.draft is True and (batch_size or 1) > 1:
            raise ValueError(f"[transcribe_batch] batch_size must be 1 with a draft but got {batch_size}")
        transcriber.check(options)
        self.transcriber = transcriber
        self.options = options
        # A draft is verified for one text at a time.
        alone = options.draft is True or pass_cost(transcriber.model.decoder).of(_USUAL) > _MOST_COST * _USUAL
        self.batch_size = 1 if alone else _USUAL

    def alone(self, recording: Recording) -> Transcript:
        return self.transcriber.transcribe_window_by_window(recording.samples, self.options, None, recording.watch)

    def together(self, pools: Iterable[list[Window]], batch_size: int) -> Iterator[Window]:
        asked: dict[int, Window] = {}

        def prompts() -> Iterator[Prompt]:
            number = -1
            groups = (group for pool in pools for group in similar_lengths(pool, batch_size, SAMPLE_RATE))
            for group in groups:
                for window, rows in zip(group, self._prompts(group), strict=True):
                    asked[number := number + 1] = window
                    options = self.transcriber.generation_options(window.samples.size / SAMPLE_RATE, self.options)
                    yield rows, options, partial(self._prompt_alone, window)

        known = self.transcriber.known_prefix(self.options)
        for row in BatchGeneration(self.transcriber.model.decoder, prompts(), batch_size, **known):
            window = asked.pop(row.number)
            window.recording.watch.add("prefill", row.prefill_seconds)
            window.recording.watch.add("decode", row.decode_seconds)
            text = self.transcriber.text(row.tokens)
            tokens = tuple(row.tokens)
            window.found = WrittenWindow(window.first, window.last, text, tokens, row.finish_reason, row.decoder_passes)
            yield window

    def joined(self, recording: Recording) -> Transcript:
        return self.transcriber.joined([w.found for w in recording.windows], self.options, recording.watch)

    def _prompts(self, group: Sequence[Window]) -> list[mx.array]:
        """Return the prompt rows (S, H) of each window of a group."""
        audio = _encode(self.transcriber, group, self.options)
        with _shared(group) as watch, watch.stage("adaptor"):
            adapted = self.transcriber.adapt(audio.states, audio.mask, self.options)
            mx.eval(adapted)
        counts = [self._rows_kept(rows) for rows in audio.rows]
        return [
            self.transcriber.prompt(adapted[place, :count], self.options, window.recording.watch)
            for place, (window, count) in enumerate(zip(group, counts, strict=True))
        ]

    def _prompt_alone(self, window: Window) -> mx.array:
        return self._prompts([window])[0]

    def _rows_kept(self, rows: int) -> int:
        """Return how many rows for the decoder a window's audio states become."""
        config, rows = self.transcriber.config, rows - self.transcriber.config.dropped_rows
        if not isinstance(config.adaptor, NanoAdaptorConfig):
            return rows
        low = self.options.low_frame_rate
        return rows_kept(rows) if (config.adaptor.low_frame_rate if low is None else low) else rows


class _Batch:
    """One call: what was read and waits, what is done and may be handed on."""

    def __init__(
        self, stages: _Stages, options: TranscribeOptions, batch_size: int | None, on_transcript: OnTranscript | None
    ) -> None:
        self.stages = stages
        self.options = options
        self.batch_size = stages.batch_size if batch_size is None else batch_size
        self.on_transcript = on_transcript
        self.results: dict[int, BatchResult] = {}
        self.handed_on = 0

    def run(self, sources: Iterable[Source], sample_rate: int | None) -> list[BatchResult]:
        recordings = self._read(sources, sample_rate)
        if self.batch_size == 1:
            for recording in recordings:
                self._settle(recording.number, self.stages.alone(recording))
        else:
            pools = self._pools(recordings)
            first = next(pools, [])
            if len(first) == 1:  # all there is: a pool is smaller than a batch only at the end
                self._settle(first[0].recording.number, self.stages.alone(first[0].recording))
            elif first:
                for window in self.stages.together(chain([first], pools), self.batch_size):
                    self._heard(window)
        return [self.results[number] for number in range(len(self.results))]

    def _read(self, sources: Iterable[Source], sample_rate: int | None) -> Iterator[Recording]:
        """Load recordings one after the other; those that cannot be read are settled at once."""
        for number, source in enumerate(sources):
            watch = Stopwatch()
            try:
                with watch.stage("audio"):
                    samples = load_audio(source, sample_rate if hasattr(source, "dtype") else None)
            except AudioError as error:
                self._settle(number, error)
                continue
            yield Recording(number, samples, watch)

    def _pools(self, recordings: Iterator[Recording]) -> Iterator[list[Window]]:
        """Cut recordings into windows, and hand these out so many at a time that sorting them is worth it."""
        pool: list[Window] = []
        for recording in recordings:
            ranges = split_at_pauses(recording.samples, SAMPLE_RATE, self.options.segment_seconds)
            recording.windows = [Window(recording, first, last) for first, last in ranges]
            recording.waiting = len(recording.windows)
            pool += recording.windows
            if len(pool) >= self.batch_size * _BATCHES_AHEAD:
                yield pool
                pool = []
        if pool:
            yield pool

    def _heard(self, window: Window) -> None:
        recording = window.recording
        recording.waiting -= 1
        if recording.waiting:
            return
        transcript = self.stages.joined(recording)
        recording.watch.add("total", sum(recording.watch.seconds.values()))
        recording.samples, recording.windows = recording.samples[:0], []
        self._settle(recording.number, transcript)

    def _settle(self, number: int, result: BatchResult) -> None:
        """Note what became of a recording, and hand on all that nothing before is missing for."""
        self.results[number] = result
        while self.handed_on in self.results:
            if self.on_transcript is not None:
                self.on_transcript(self.handed_on, self.results[self.handed_on])
            self.handed_on += 1


def _encode(listener: Listener, group: Sequence[Window], options: TranscribeOptions) -> AudioBatch:
    with _shared(group) as watch:
        waveforms = [window.samples for window in group]
        return encode_together(listener, waveforms, options.language, bool(options.use_itn), watch)


@contextmanager
def _shared(group: Sequence[Window]) -> Iterator[Stopwatch]:
    """Time something that is done for several windows, and give each recording its part, by length."""
    watch = Stopwatch()
    yield watch
    whole = sum(window.samples.size for window in group)
    for window in group:
        for stage, seconds in watch.seconds.items():
            window.recording.watch.add(stage, seconds * window.samples.size / whole)
