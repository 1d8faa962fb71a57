"""``python -m qwen4b_asr.training``: train the demo, or ``evaluate`` a model directory."""

from __future__ import annotations

import argparse
import sys

from ..errors import AsrError
from .command import add_arguments, add_evaluate_arguments, run, run_evaluate


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    evaluating = given[:1] == ["evaluate"]
    if given[:1] in (["evaluate"], ["train"]):
        given = given[1:]
    parser = argparse.ArgumentParser(
        prog=f"python -m qwen4b_asr.training{' evaluate' if evaluating else ''}",
        description=(
            "Print the word errors of a model on recordings that training does not hear."
            if evaluating
            else "Train the demo model on spoken numbers. `evaluate` as the first word tests a model instead."
        ),
    )
    (add_evaluate_arguments if evaluating else add_arguments)(parser)
    args = parser.parse_args(given)
    try:
        return run_evaluate(args) if evaluating else run(args)
    except AsrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
