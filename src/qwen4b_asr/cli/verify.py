"""``qwen4b-asr verify``: check a model directory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``verify``."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="the model directory to check")


def run(args: argparse.Namespace) -> int:
    """Check; returns 0 if all is well and 1 if anything is wrong.

    Raises:
        AsrError: If there is no such directory; the caller prints it.
    """
    from ..weights.verify import verify
    from ._progress import byte_progress

    with byte_progress("checking") as on_progress:
        report = verify(args.directory, on_progress=on_progress)
    for problem in report.problems:
        print(f"{report.directory}: {problem}", file=sys.stderr)
    if report.ok:
        print(
            f"{report.directory}: ok ({report.files} files, {report.tensors} tensors, {report.parameters:,} "
            f"parameters, {report.nbytes / 1e9:.2f} GB)"
        )
    return 0 if report.ok else 1
