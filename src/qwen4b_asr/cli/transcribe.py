"""`qwen4b-asr FILE...`: recordings in, text or JSON out."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
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
        self.progress = Progress(len(options.files), quiet=options.quiet)

    def run(self) -> int:
        status = 0
        directory = self.options.output_dir
        paths: list[Path | None] = [None] * len(self.options.files)
        if directory:
            paths[:] = output_paths(self.options.files, directory, self.options.format)
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                complain(f"{directory}: {error.strerror}; choose another --output-dir")
                return 1
        with self.progress:
            for file, path in zip(self.options.files, paths, strict=True):
                status |= self.one(file, path)
                self.progress.advance()
        return status

    def one(self, file: str, path: Path | None) -> int:
        """Transcribe one file and write the result; return 1 if that failed for reasons of its own."""
        try:
            samples, seconds = self.read(file)
        except Exception as error:
            return self.failed(file, error)
        if self.transcriber is None:  # only now: no model is needed to say that no file can be read
            self.transcriber = self.load()
        try:
            transcript = self.transcribe(file, samples, seconds)
            text = self.written(file, transcript)
            if path:
                write_whole(path, text)
        except OutputError:
            raise
        except OSError as error:
            return self.failed(file, AudioError(f"cannot write {path}: {error.strerror or error}"))
        except AudioError as error:
            return self.failed(file, error)
        except AsrError:
            raise  # the model or the prompt: no other file would fare better
        except Exception as error:
            return self.failed(file, error)
        if path is None:
            with self.progress.paused():
                write_stdout(self.rest_of_line(file, transcript) if self.options.stream else text)
            self.line_begun = False
        if transcript["finish_reason"] == "length" and not self.options.quiet:
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
            loaded = load(
                self.options.model,
                dtype=self.options.dtype,
                lora=self.options.lora,
                adapters=adapters,
                memory_limit=self.options.memory_limit,
                progress=byte_progress,
            )
        for warning in caught if not self.options.quiet else ():
            self.say(f"warning: {warning.message}")
        return loaded

    def transcribe(self, file: str, samples: Any, seconds: float) -> dict[str, Any]:
        assert self.transcriber is not None
        self.progress.show(_shown(file))
        names = ("language", "prompt_profile", "task", "max_tokens", "decoder", "low_frame_rate", "draft")
        chosen = {name: getattr(self.options, name) for name in names}
        chosen["translate"] = self.options.translate or None
        chosen |= {"use_itn": self.options.itn, "hotwords": self.options.hotword}

        def on_token(piece: str) -> None:
            self.progress.count_token()
            if self.options.stream:
                self.stream(file, piece)

        transcript = self.transcriber.transcribe(
            samples, on_token=on_token, **{name: value for name, value in chosen.items() if value is not None}
        ).to_dict()
        for stage in ("audio", "total"):  # the file was read here, the samples cost nothing there
            transcript["timings"][stage] = transcript["timings"].get(stage, 0.0) + seconds
        return {"file": file, **transcript}

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
