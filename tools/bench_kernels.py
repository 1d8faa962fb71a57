#!/usr/bin/env python3
"""Time every kernel beside what MLX gives without it, and say which part of the device's roofline each reaches.

    python tools/bench_kernels.py --record                    check all, time all, write the table of this device
    python tools/bench_kernels.py --check --json rows.jsonl   the same without writing kernels/README.md
    python tools/bench_kernels.py --kernel fsmn --dtype float16 --seconds 1
    python tools/bench_kernels.py --list                      what there is to time

For each case of each kernel: the kernel, its plain reference, ``mx.compile`` of that, and MLX's own fused operation,
taking turns in one run. Without a GPU there is no kernel to time: the others are timed, and ``--host-counts`` adds
what the kernel's text does when it is run thread by thread on the CPU, in counts and never in seconds.
``bench/rows.py`` says what the JSON rows hold. The exit status is 1 if something failed or computed something else
than the reference.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.rows import Row
    from qwen4b_asr.kernels._cases import Case
    from qwen4b_asr.kernels._dispatch import Operation

DTYPES = ("float32", "float16", "bfloat16")
DOCUMENT = Path(__file__).resolve().parents[1] / "kernels" / "README.md"


@dataclass(frozen=True)
class Job:
    """One row to be: an operation, one of its cases, an element type."""

    operation: Operation
    case: Case
    dtype: str


class UsageError(Exception):
    """What was asked for does not exist here."""


def arguments() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "gpu"), help="without it, the GPU if there is one")
    add("--kernel", action="append", default=[], metavar="NAME", help="only this one; repeatable, as are the next two")
    add("--case", action="append", default=[], metavar="NAME", help="only this one")
    add("--dtype", action="append", default=[], metavar="NAME", help=f"only this of {', '.join(DTYPES)}")
    add("--list", action="store_true", help="name kernels, cases and types, time nothing")
    add("--check", action="store_true", help="compare with the reference before timing; what differs is not timed")
    add("--repeat", type=positive_int, default=15, metavar="N", help="rounds of a case, at most (%(default)s)")
    add("--seconds", type=positive_float, default=5.0, metavar="S", help="begin no round of a case later (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="append a JSON object per row")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--host-counts", action="store_true", help="count what the kernels do, run on the CPU by a C++ compiler")
    add("--record", action="store_true", help="check and time all, write this device's table into kernels/README.md")
    return parser


def positive_int(text: str) -> int:
    """Read a number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1 but got {value}")
    return value


def positive_float(text: str) -> float:
    """Read a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0 but got {text}")
    return value


def choose_device(wanted: str | None) -> None:
    """Make the wanted device MLX's default; the GPU, if there is one, where none is wanted.

    Raises:
        UsageError: If there is no such device.
    """
    import mlx.core as mx

    from bench.facts import gpu_backend

    if wanted == "gpu" and gpu_backend() is None:
        raise UsageError("--device gpu: MLX finds none; it takes Apple silicon, or NVIDIA with the extra [cuda]")
    mx.set_default_device(mx.gpu if wanted != "cpu" and gpu_backend() else mx.cpu)


def choose_jobs(
    operations: dict[str, Operation], kernels: Sequence[str], cases: Sequence[str], dtypes: Sequence[str]
) -> list[Job]:
    """Return what to time: the cases of the role ``bench``, narrowed down by names; no names mean all.

    Raises:
        UsageError: If a name is not among them.
    """
    for name in dtypes:
        if name not in DTYPES:
            raise UsageError(f"--dtype {name}: must be one of {', '.join(DTYPES)}")
    for name in kernels:
        if name not in operations:
            raise UsageError(f"--kernel {name}: must be one of {', '.join(operations)}")
    chosen = [operations[name] for name in operations if name in kernels or not kernels]
    benches = [(operation, case) for operation in chosen for case in operation.cases if "bench" in case.roles]
    known = list(dict.fromkeys(case.name for _, case in benches))
    for name in cases:
        if name not in known:
            raise UsageError(f"--case {name}: must be one of {', '.join(known)}")
    jobs = [
        Job(operation, case, dtype)
        for operation, case in benches
        if case.name in cases or not cases
        for dtype in case.dtypes
        if dtype in dtypes or not dtypes
    ]
    if not jobs:
        raise UsageError(f"there is no case of {', '.join(kernels)} in {', '.join(dtypes)}")
    return jobs


def run(
    jobs: Sequence[Job], options: argparse.Namespace, command: str, blas: str | None
) -> tuple[list[Row], dict[str, Any]]:
    """Measure the roofline and every job.

    Returns:
        The rows, and what each of them says of the run.
    """
    from bench import host_counts
    from bench.check import self_check
    from bench.facts import about, default_device, load_average
    from bench.measure import Effort, first_line, measure
    from bench.roofline import measure_roofline
    from bench.rows import Outcome

    device = default_device()
    facts = about(datetime.now(timezone.utc).isoformat(timespec="seconds"), command, blas)
    roofline = measure_roofline(device.type, list(dict.fromkeys(job.dtype for job in jobs)))
    facts["roofline"] = {"bytes_per_second": roofline.bytes_per_second, "flops_per_second": roofline.flops_per_second}
    effort = Effort(options.repeat, options.seconds, check=options.check)
    untrusted: dict[str, Outcome | None] = {}
    rows = []
    for number, job in enumerate(jobs, 1):
        name = job.operation.name
        progress(f"{number}/{len(jobs)} {name} {job.case.name} {job.dtype}")
        if options.check and device.backend and name not in untrusted:
            try:
                said = self_check(job.operation)
                untrusted[name] = Outcome("wrong", said) if said else None
            except Exception as error:  # the other kernels are still to be timed
                untrusted[name] = Outcome("failed", f"{type(error).__name__}: {first_line(error)}")
        row = measure(job.operation, job.case, job.dtype, device, roofline, effort, instead=untrusted.get(name))
        if options.host_counts:
            row = replace(row, host_counts=host_counts.count(job.operation, job.case, job.dtype))
        rows.append(row)
    progress("")
    facts["load_average_after"] = load_average()
    return rows, facts


def progress(text: str) -> None:
    """Say what is being timed, in one line that the next replaces, if somebody is watching."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def command_line(words: Sequence[str]) -> str:
    """Return the command as it can be shown to others: files by name, not by their place on this machine."""
    shown = [str(Path(word).name) if os.path.isabs(word) else word for word in words]
    return shlex.join(["python", "tools/bench_kernels.py", *shown])


def listing(jobs: Sequence[Job]) -> str:
    """Return kernels, cases and element types as lines."""
    found: dict[tuple[str, str], list[str]] = {}
    for job in jobs:
        found.setdefault((job.operation.name, job.case.name), []).append(job.dtype)
    return "\n".join(f"{kernel:<16}{case:<20}{', '.join(dtypes)}" for (kernel, case), dtypes in found.items())


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    words = list(sys.argv[1:] if words is None else words)
    parser = arguments()
    options = parser.parse_args(words)
    if options.record:
        if options.kernel or options.case or options.dtype:
            parser.error("--record writes the table of a device as a whole: it goes without --kernel, --case, --dtype")
        options.check = True
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # read when MLX starts: float32 is to mean float32 on both sides
    from qwen4b_asr._blas import preload_openblas

    blas = preload_openblas()  # before MLX
    from bench import host_counts
    from bench.facts import default_device
    from bench.record import RecordError, write_block
    from bench.rows import as_json
    from bench.table import block, markdown, terminal
    from qwen4b_asr.kernels import operations

    try:
        choose_device(options.device)
        jobs = choose_jobs(operations(), options.kernel, options.case, options.dtype)
        if options.host_counts and (reason := host_counts.unavailable()):
            raise UsageError(f"--host-counts: {reason}")
    except UsageError as error:
        parser.error(str(error))
    if options.list:
        print(listing(jobs))
        return 0
    device = default_device()
    print(f"{device.title}" + ("" if device.backend else ": no GPU in use, so no kernel is timed or checked here"))
    rows, facts = run(jobs, options, command_line(words), blas)
    lines = [json.dumps(as_json(row, facts)) + "\n" for row in rows]
    print(markdown(rows) if options.markdown else terminal(rows, facts))
    if options.json:
        with options.json.open("a", encoding="utf-8") as file:
            file.writelines(lines)
    if options.record:
        try:
            write_block(DOCUMENT, device.slug, block(rows, facts, device.title))
        except (RecordError, OSError) as error:
            print(f"{DOCUMENT.name} was not written: {error}", file=sys.stderr)
            return 1
        print(f"written to {DOCUMENT.parent.name}/{DOCUMENT.name}")
    return 1 if any(row.broken for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
