"""``python -m qwen4b_asr.training``: train the demo, ``evaluate`` a model, ``join`` a recording."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from ..errors import AsrError
from .command import add_arguments, add_evaluate_arguments, add_join_arguments, run, run_evaluate, run_join

_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "train": (
        "Train the demo model on spoken numbers. As the first word, `evaluate` tests a model instead, and `join` makes "
        "a test recording.",
        add_arguments,
        run,
    ),
    "evaluate": (
        "Print the word errors of a model on recordings that training does not hear.",
        add_evaluate_arguments,
        run_evaluate,
    ),
    "join": (
        "Join recordings that training does not hear to a string of digits in a WAV file.",
        add_join_arguments,
        run_join,
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    name = given[0] if given and given[0] in _COMMANDS else ""
    about, add, act = _COMMANDS[name or "train"]
    parser = argparse.ArgumentParser(prog=f"python -m qwen4b_asr.training {name}".rstrip(), description=about)
    add(parser)
    args = parser.parse_args(given[1:] if name else given)
    try:
        return act(args)
    except AsrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
