"""What the command line shows while it works, and how it writes: complaints, progress, whole files."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAM = "qwen4b-asr"

PATIENCE_SECONDS = 0.4
"""What is done sooner needs no progress bar."""

TICK_SECONDS = 0.2
"""Time between two drawings of the progress bar."""


class OutputError(Exception):
    """Standard output cannot be written; the cause says why."""


def complain(message: str) -> None:
    """Write one message to standard error, under the program's name."""
    print(f"{PROGRAM}: {message}", file=sys.stderr, flush=True)


def unexpected(error: BaseException) -> str:
    """Describe an exception that no one foresaw, in one line, and how to see where it came from."""
    first = next(iter(str(error).splitlines()), "")
    return f"unexpected {type(error).__name__}: {first} (--debug shows where)"


def load_blas(parser: argparse.ArgumentParser) -> None:
    """Load a fast BLAS before anything imports MLX; a setting that names none is wrong usage."""
    from .._blas import preload_openblas

    try:
        preload_openblas()
    except ValueError as error:
        parser.error(str(error))


def write_stdout(text: str) -> None:
    """Write text to standard output at once.

    Raises:
        OutputError: It is closed, its reader went away, or its disk is full.
    """
    if sys.stdout is None:
        raise OutputError("standard output is closed")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise OutputError(f"standard output: {error.strerror}") from error


def discard_stdout() -> None:
    """Let what is still buffered go nowhere, so that Python's own flush at exit has nothing to complain about."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError, AttributeError):  # no descriptor behind it, as in tests
        pass


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name beside it and rename it, so that nobody meets half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # Not a private temporary file: the result should have the permissions that any new file gets.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def hushed_libraries() -> Iterator[None]:
    """Send what C code prints to standard error nowhere: libmpg123 reports every oddity of an MP3 there."""
    try:
        saved = os.dup(2)
    except OSError:  # closed
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


class Progress:
    """A line on standard error that shows what is being done and for how long; nothing unless that is a terminal.

    Args:
        total: Number of files to come.
        quiet: Show nothing in any case.
    """

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self._total = total
        self._enabled = not quiet and sys.stderr is not None and sys.stderr.isatty()
        self._bar: Any = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._activity = ""
        self._tokens = 0
        self._drawn = False

    def __enter__(self) -> Progress:
        if self._enabled:
            from tqdm import tqdm

            layout = "{desc} [{elapsed}]"
            if self._total > 1:
                layout = "{n_fmt}/{total_fmt} |{bar:20}| [{elapsed}<{remaining}] {desc}"
            # delay keeps tqdm itself from drawing before the ticker below does
            self._bar = tqdm(total=self._total, bar_format=layout, leave=False, dynamic_ncols=True, delay=1e9)
            threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def show(self, activity: str) -> None:
        """Name what is being done."""
        with self._lock:
            self._tokens = 0
            self._activity = activity
            if self._bar is not None:
                self._bar.set_description_str(activity, refresh=False)

    def count_token(self) -> None:
        """Count one more piece of text."""
        with self._lock:
            self._tokens += 1
            if self._bar is not None:
                self._bar.set_description_str(f"{self._activity}: {self._tokens} tokens", refresh=False)

    def advance(self) -> None:
        """Count one file as done."""
        with self._lock:
            if self._bar is not None:
                self._bar.n += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Clear the line for what is written meanwhile."""
        with self._lock:
            self._wipe()
            yield

    def close(self) -> None:
        """Take the line away for good."""
        self._stop.set()
        with self._lock:
            self._wipe()
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    def _tick(self) -> None:
        wait = PATIENCE_SECONDS
        while not self._stop.wait(wait):
            wait = TICK_SECONDS
            with self._lock:
                if self._bar is not None and self._activity:
                    self._bar.refresh()
                    self._drawn = True

    def _wipe(self) -> None:
        if self._bar is not None and self._drawn:  # else not even a carriage return
            self._bar.clear()
            self._drawn = False
