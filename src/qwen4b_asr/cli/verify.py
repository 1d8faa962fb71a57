"""``qwen4b-asr verify``: check a model directory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``verify``."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="the model directory to check")
    parser.add_argument(
        "--against",
        metavar="ORIGINAL",
        help="also compare a quantised model's scores with its original's: a model directory, the name of one that is "
        "on this machine, or the published checkpoint that is a whole model",
    )


def run(args: argparse.Namespace) -> int:
    """Check; returns 0 if all is well and 1 if anything is wrong.

    Raises:
        AsrError: If there is no such directory, or the other is not its original; the caller prints it.
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
    if not report.ok or args.against is None:
        return 0 if report.ok else 1
    from ..weights.fidelity import compare_directories
    from .convert import local_model

    with byte_progress("comparing") as on_progress:
        found = compare_directories(args.directory, local_model(Path(args.against)), on_progress=on_progress)
    for line in found.lines():
        print(f"{report.directory}: {line}")
    if found.problem:
        print(f"{report.directory}: {found.problem}", file=sys.stderr)
    return 1 if found.problem else 0
