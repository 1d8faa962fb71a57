"""`qwen4b-asr FILE...`: recordings in, text or JSON out."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AsrError, AudioError
from ..text import format_transcript, one_line, texts_of
from ._terminal import (
    PROGRAM,
    OutputError,
    Progress,
    complain,
    hushed_libraries,
    load_blas,
    unexpected,
    write_stdout,
    write_whole,
)
from .transcribe_options import MODEL_VARIABLE, build_parser

if TYPE_CHECKING:
    from ..recognise import Recogniser
    from ..transcribe import Transcriber
    from ..transcript import Transcript


def run(arguments: Sequence[str], debug: bool = False) -> int:
    """Transcribe every file; return 0, or 1 if one failed.

    Args:
        arguments: The command line without the program's name.
        debug: Print tracebacks.

    Raises:
        AsrError: What is wrong for every file: the model, the prompt profile, the language.
        OutputError: Standard output cannot be written.
        SystemExit: Wrong usage, `--help`, `--version`.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.stream and (options.format != "txt" or options.output_dir):
        parser.error("--stream prints text: it does not go with --format json or --output-dir")
    if options.draft and (options.batch_size or 1) > 1:
        parser.error("--draft is for one recording at a time: it does not go with --batch-size")
    if options.stream and (options.batch_size or 1) > 1:
        parser.error("--stream prints one recording after the other: it does not go with --batch-size")
    if options.files.count("-") > 1:
        parser.error("standard input can be read only once")
    if "-" in options.files and (sys.stdin is None or sys.stdin.isatty()):
        parser.error("- reads a recording from standard input: pipe one in")
    if not options.model:
        from ..weights.find import ADVICE

        parser.exit(2, f"{PROGRAM}: no model given. What you can do:\n{ADVICE}\n  - or set {MODEL_VARIABLE}\n")
    load_blas(parser)
    return _Job(options, debug).run()


def output_paths(files: Sequence[str], directory: Path, suffix: str) -> list[Path]:
    """Name one output per input: the input's stem, with -2, -3 … where an earlier input took it.

    Names that differ only in case count as equal, as they do on a Mac's disk.
    """
    taken: set[str] = set()
    paths = []
    for file in files:
        stem = "stdin" if file == "-" else Path(file).stem or "audio"
        name, number = stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        paths.append(directory / f"{name}.{suffix}")
    return paths


class _Job:
    """One run of the command: its options, the model once a recording could be read, what is on the screen."""

    def __init__(self, options: argparse.Namespace, debug: bool) -> None:
        self.options = options
        self.debug = debug
        self.several = len(options.files) > 1
        self.transcriber: Transcriber | Recogniser | None = None
        self.line_begun = False
        self.status = 0
        self.paths: list[Path | None] = []
        self.held: dict[int, tuple[Any, float]] = {}  # waveforms that are still needed, and the time they took to read
        self.order: list[int] = []  # numbers of the files that could be read
        self.outcomes: dict[int, dict[str, Any] | Exception] = {}
        self.next = 0  # the first file that is not written yet
        self.progress = Progress(len(options.files), quiet=options.quiet)

    def run(self) -> int:
        directory = self.options.output_dir
        paths: list[Path | None] = [None] * len(self.options.files)
        if directory:
            paths[:] = output_paths(self.options.files, directory, self.options.format)
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                complain(f"{directory}: {error.strerror}; choose another --output-dir")
                return 1
        self.paths = paths
        with self.progress:
            alone = 1 if self.options.memory_limit else None  # a limit is for one at a time, unless more are asked for
            if self.options.stream or (self.options.batch_size or alone) == 1:
                for number, _ in enumerate(self.options.files):
                    self.settle(number, self.one(number))
            else:
                self.together()
        return self.status

    def together(self) -> None:
        """Transcribe all files, several at once, as many as are ahead of what is written."""
        from ..audio import SAMPLE_RATE
        from ..transcript import TranscribeOptions

        sources = self.readable()
        first = next(sources, None)
        if first is None:
            return
        self.transcriber = self.load()
        self.show_next()
        held = self.held[0] if self.order == [0] else None
        if held is not None and not self.several and len(held[0]) <= TranscribeOptions().segment_seconds * SAMPLE_RATE:
            self.settle(0, self.attempt(0))
            return

        def on_transcript(place: int, result: Transcript | Exception) -> None:
            number = self.order[place]
            if isinstance(result, Exception):
                self.settle(number, result)
            else:
                self.settle(number, self.described(number, result))

        failed = False
        try:
            self.transcriber.transcribe_batch(
                chain([first], sources),
                batch_size=self.options.batch_size,
                on_transcript=on_transcript,
                errors="return",
                **self.chosen(),
            )
        except (AsrError, OutputError):
            raise  # the model or the prompt: no other file would fare better
        except Exception:
            failed = True
        if failed:  # one by one shows whose fault it is, and what the others say
            for number in self.order:
                if number in self.held:
                    self.settle(number, self.attempt(number))
            for _ in sources:
                self.settle(self.order[-1], self.attempt(self.order[-1]))

    def readable(self) -> Iterator[Any]:
        """Read one file after the other; yield the waveforms of those that can be."""
        for number, file in enumerate(self.options.files):
            try:
                self.held[number] = self.read(file)
            except Exception as error:
                self.settle(number, error)
                continue
            self.order.append(number)
            yield self.held[number][0]

    def one(self, number: int) -> dict[str, Any] | Exception:
        """Read and transcribe one file by itself; return what became of it."""
        try:
            self.held[number] = self.read(self.options.files[number])
        except Exception as error:
            return error
        if self.transcriber is None:  # only now: no model is needed to say that no file can be read
            self.transcriber = self.load()
        return self.attempt(number)

    def attempt(self, number: int) -> dict[str, Any] | Exception:
        """Transcribe a file that was read."""
        try:
            return self.transcribe(number)
        except (OutputError, AsrError) as error:
            if isinstance(error, AudioError):
                return error
            raise  # the model or the prompt: no other file would fare better
        except Exception as error:
            return error

    def settle(self, number: int, outcome: dict[str, Any] | Exception) -> None:
        """Note what became of a file, and write everything that nothing before is missing for."""
        self.held.pop(number, None)
        self.outcomes[number] = outcome
        while self.next in self.outcomes:
            self.status |= self.finish(self.next, self.outcomes.pop(self.next))
            self.next += 1
            self.progress.advance()
            self.show_next()

    def show_next(self) -> None:
        if self.next < len(self.options.files):
            self.progress.show(_shown(self.options.files[self.next]))

    def finish(self, number: int, outcome: dict[str, Any] | Exception) -> int:
        """Write the result of one file; return 1 if there is none."""
        file, path = self.options.files[number], self.paths[number]
        if isinstance(outcome, Exception):
            return self.failed(file, outcome)
        text = self.written(file, outcome)
        if path is None:
            with self.progress.paused():
                write_stdout(self.rest_of_line(file, outcome) if self.options.stream else text)
            self.line_begun = False
        else:
            try:
                write_whole(path, text)
            except OSError as error:
                return self.failed(file, AudioError(f"cannot write {path}: {error.strerror or error}"))
        if outcome["finish_reason"] == "length" and not self.options.quiet:
            self.say(f"{_shown(file)}: warning: cut off by the token budget; raise it with --max-tokens")
        return 0

    def read(self, file: str) -> tuple[Any, float]:
        """Return the waveform and the seconds that reading took."""
        from ..audio import load_audio

        self.progress.show(_shown(file))
        start = time.perf_counter()
        source: Any = sys.stdin.buffer if file == "-" else file
        if self.debug:
            return load_audio(source), time.perf_counter() - start
        with hushed_libraries():
            return load_audio(source), time.perf_counter() - start

    def load(self) -> Transcriber | Recogniser:
        self.progress.show(f"loading {self.options.model}")
        from ..loading import load
        from ._progress import byte_progress

        adapters = dict(self.options.adapter or ())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            loaded = load(
                self.options.model,
                dtype=self.options.dtype,
                lora=self.options.lora,
                adapters=adapters,
                memory_limit=self.options.memory_limit,
                batch_size=self.options.batch_size or 1,
                progress=byte_progress,
            )
        for warning in caught if not self.options.quiet else ():
            self.say(f"warning: {warning.message}")
        return loaded

    def chosen(self) -> dict[str, Any]:
        """Return the options of the transcription that were given."""
        names = ("language", "prompt_profile", "task", "max_tokens", "decoder", "low_frame_rate", "draft")
        chosen = {name: getattr(self.options, name) for name in names}
        chosen["translate"] = self.options.translate or None
        chosen |= {"use_itn": self.options.itn, "hotwords": self.options.hotword}
        return {name: value for name, value in chosen.items() if value is not None}

    def transcribe(self, number: int) -> dict[str, Any]:
        assert self.transcriber is not None
        file = self.options.files[number]
        self.progress.show(_shown(file))

        def on_token(piece: str) -> None:
            self.progress.count_token()
            if self.options.stream:
                self.stream(file, piece)

        samples = self.held[number][0]
        return self.described(number, self.transcriber.transcribe(samples, on_token=on_token, **self.chosen()))

    def described(self, number: int, transcript: Transcript) -> dict[str, Any]:
        """Return a transcript as plain values, with the file's name and the time it took to read it."""
        values = transcript.to_dict()
        for stage in ("audio", "total"):  # the file was read here, the samples cost nothing there
            values["timings"][stage] = values["timings"].get(stage, 0.0) + self.held[number][1]
        return {"file": self.options.files[number], **values}

    def written(self, file: str, transcript: dict[str, Any]) -> str:
        if self.options.format == "txt" and self.several and not self.options.output_dir:
            return "\t".join([file, *map(one_line, texts_of(transcript))]) + "\n"
        return format_transcript(transcript, self.options.format)

    def stream(self, file: str, piece: str) -> None:
        """Print a piece of text, in one line per file if there are several."""
        if sys.stdout is not None and sys.stdout.isatty():
            self.progress.close()  # they would write over each other
        if self.several:
            piece = piece.replace("\r", " ").replace("\n", " ")
            if not self.line_begun:
                piece = f"{file}\t{piece}"
        self.line_begun = True
        with self.progress.paused():
            write_stdout(piece)

    def rest_of_line(self, file: str, transcript: dict[str, Any]) -> str:
        begun = self.line_begun or not self.several
        rest = "" if begun else f"{file}\t"  # a recording without a word
        for translation in texts_of(transcript)[1:]:
            rest += f"\t{one_line(translation)}" if self.several else f"\n{translation}"
        return f"{rest}\n"

    def failed(self, file: str, error: Exception) -> int:
        if self.line_begun:
            write_stdout("\n")
            self.line_begun = False
        message = str(error) if isinstance(error, AsrError) else unexpected(error)
        name = _shown(file)
        # What the readers say starts with the file's name already.
        own = file if file != "-" else getattr(sys.stdin.buffer, "name", None)
        message = message.removeprefix(f"{own}: ")
        self.say(f"{name}: {message}")
        if self.debug:
            traceback.print_exception(error)
        return 1

    def say(self, message: str) -> None:
        with self.progress.paused():
            complain(message)


def _shown(file: str) -> str:
    return "standard input" if file == "-" else file
