"""Entry point of `qwen4b-asr`: picks the command, and turns every failure into one line and an exit status."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType

from ..errors import AsrError, PromptError
from ._terminal import PROGRAM, OutputError, complain, discard_stdout, load_blas, unexpected

COMMANDS = ("download", "models", "info", "plan", "convert", "verify", "train", "doctor")
"""Modules beside this one with `add_arguments(parser)` and `run(args) -> int`, called by the first word; a recording
of such a name is given as ./convert."""

INTERRUPTED = 130
BROKEN_PIPE = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What stands behind the program's name; None takes it from `sys.argv`.

    Returns:
        The exit status: 0, 1 if something failed, 2 for wrong usage, 130 after Ctrl-C, 141 when the reader of standard
        output went away.

    Raises:
        SystemExit: From argparse, after `--help`, `--version` and wrong usage.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = words[: words.index("--")] if "--" in words else words
    debug = "--debug" in options
    if debug:
        words.remove("--debug")
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that cannot show a character is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    return _guarded(lambda: _run(words, debug), debug)


def _run(words: list[str], debug: bool) -> int:
    if not words or words[0] not in COMMANDS:
        from .transcribe import run

        return run(words, debug)
    module = _command(words[0])
    description = (module.__doc__ or "").partition(": ")[2].strip()
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {words[0]}", description=description[:1].upper() + description[1:], allow_abbrev=False
    )
    module.add_arguments(parser)
    options = parser.parse_args(words[1:])
    load_blas(parser)
    return int(module.run(options))


def _command(name: str) -> ModuleType:
    """Import one of `COMMANDS` alone; written out, so that whoever reads the imports finds them (tools/vendor.py)."""
    if name == "download":
        from . import download

        return download
    if name == "models":
        from . import models

        return models
    if name == "info":
        from . import info

        return info
    if name == "plan":
        from . import plan

        return plan
    if name == "convert":
        from . import convert

        return convert
    if name == "verify":
        from . import verify

        return verify
    if name == "doctor":
        from . import doctor

        return doctor
    from . import train

    return train


def _guarded(action: Callable[[], int], debug: bool) -> int:
    """Run the action; say in one line what went wrong, with a traceback only for `--debug`."""
    try:
        return action()
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except OutputError as error:
        discard_stdout()
        if isinstance(error.__cause__, BrokenPipeError):  # `| head -1` has seen enough
            return BROKEN_PIPE
        complain(str(error))
        return 1
    except BrokenPipeError:
        discard_stdout()
        return BROKEN_PIPE
    except AsrError as error:
        if debug:
            traceback.print_exc()
        complain(str(error))
        return 2 if isinstance(error, PromptError) else 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        complain(unexpected(error))
        return 1
