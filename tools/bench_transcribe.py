#!/usr/bin/env python3
"""Time every stage from sound to text, and the same stages of other implementations on the same weights and inputs.

    python tools/bench_transcribe.py                                              random weights, this project alone
    python tools/bench_transcribe.py --model demo --against torch --torch-python REF/bin/python
    python tools/bench_transcribe.py --against mlx-lm,mlx-audio,funasr-mlx --json run.json
    python tools/bench_transcribe.py --shape qwen3-4b --sections listen --against mlx-audio,torch --record

Each implementation is a process of its own interpreter that loads its model once; they take turns, stage by stage and
round by round, one computing at a time, and results are compared before anything is timed. The environments of the
others are made on the first call, from pinned versions, and kept. Ratios are of neighbours in time: on a busy machine
trust them more than the milliseconds. Random weights cost the same time as trained ones, and the output says so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.session import Plan

SECTIONS = ("listen", "write", "draft", "batch", "grow")
DOCUMENT = Path(__file__).resolve().parent / "README.md"


def arguments() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--model", metavar="NAME", help="a model's name or directory; without it, random weights")
    add("--shape", default="qwen3-0.6b", metavar="NAME", help="of the random weights: qwen3-0.6b, -1.7b or -4b")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the decoder (%(default)s)")
    add("--bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="of the random decoder's matrices, in groups of 64")
    add("--decoder-layers", type=int, metavar="N", help="only so many layers of the random decoder")
    add("--sections", type=names, default=SECTIONS, metavar="A,B", help=f"of {', '.join(SECTIONS)} (all)")
    add("--against", type=names, default=(), metavar="A,B", help="mlx-lm, mlx-audio, funasr-mlx, torch")
    add("--env-dir", type=Path, metavar="DIR", help="where the others' environments are kept")
    add("--torch-python", type=Path, metavar="PYTHON", help="an interpreter that has torch and funasr")
    add("--plain-blas", action="store_true", help="leave the others on MLX the BLAS of MLX's own wheel")
    add("--threads", type=int, default=2, metavar="N", help="of OpenBLAS and of torch (%(default)s)")
    add("--seconds", type=numbers, default=(5.0, 10.0, 20.0, 30.0), metavar="A,B", help="lengths of the audio")
    add("--compare-seconds", type=float, default=10.0, metavar="S", help="length beside the others (%(default)s)")
    add("--tokens", type=int, default=32, metavar="N", help="to decode beside the others (%(default)s)")
    add("--tokens-per-second", type=float, default=4.0, metavar="N", help="of audio, for the whole (%(default)s)")
    add("--draft-errors", type=numbers, default=(0.05, 1.0), metavar="A,B", help="shares of a draft that are wrong")
    add("--batch", type=numbers, default=(1.0, 2.0, 4.0, 8.0), metavar="A,B", help="utterances side by side (1,2,4,8)")
    add("--rounds", type=int, default=7, metavar="N", help="of each stage, at most (%(default)s)")
    add("--budget", type=float, default=60.0, metavar="S", help="begin no round of a stage later (%(default)s)")
    add("--work-dir", type=Path, metavar="DIR", help="for the weights while it runs (a temporary one)")
    add("--json", type=Path, metavar="FILE", help="append the run as a JSON object")
    add("--record", action="store_true", help="write the tables into tools/README.md")
    return parser


def names(text: str) -> tuple[str, ...]:
    """Read names between commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def numbers(text: str) -> tuple[float, ...]:
    """Read numbers above 0 between commas."""
    values = tuple(float(part) for part in text.split(","))
    if not all(0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"must be above 0 but got {text}")
    return values


def make_plan(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Plan:
    """Return what to run; the parser refuses what does not exist."""
    from importlib.metadata import version

    from bench.model_files import SHAPES
    from bench.session import Plan
    from bench.sides import peers

    known = peers(version("mlx"))
    for name in options.against:
        if name not in known:
            parser.error(f"--against {name}: must be one of {', '.join(known)}")
    for name in options.sections:
        if name not in SECTIONS:
            parser.error(f"--sections {name}: must be one of {', '.join(SECTIONS)}")
    if options.shape not in SHAPES:
        parser.error(f"--shape {options.shape}: must be one of {', '.join(SHAPES)}")
    if options.tokens < 2 or options.rounds < 1 or options.threads < 1 or options.compare_seconds <= 0:
        parser.error("--tokens must be at least 2; --rounds, --threads and --compare-seconds above 0")
    return Plan(
        model=options.model,
        shape=options.shape,
        dtype=options.dtype,
        bits=options.bits,
        layers=options.decoder_layers,
        sections=tuple(name for name in SECTIONS if name in options.sections),
        peers=tuple(known[name] for name in known if name in options.against),
        lengths=options.seconds,
        seconds=options.compare_seconds,
        tokens=options.tokens,
        tokens_per_second=options.tokens_per_second,
        draft_errors=options.draft_errors,
        batches=tuple(int(size) for size in options.batch),
        rounds=options.rounds,
        budget=options.budget,
        threads=options.threads,
        preload=not options.plain_blas,
        pythons={"torch": options.torch_python} if options.torch_python else {},
        folder=options.env_dir or cache_folder(),
    )


def cache_folder() -> Path:
    """Return where environments are kept without ``--env-dir``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen4b-asr" / "bench"


def command_line(words: Sequence[str]) -> str:
    """Return the command as it can be shown to others: files by name, not by their place on this machine."""
    shown = []
    for word in words:
        option, equals, value = word.partition("=")
        if equals and os.path.isabs(value):
            word = f"{option}={Path(value).name}"
        shown.append(Path(word).name if os.path.isabs(word) else word)
    return shlex.join(["python", "tools/bench_transcribe.py", *shown])


def slug(text: str) -> str:
    """Return a name for marks in a document."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    words = list(sys.argv[1:] if words is None else words)
    parser = arguments()
    options = parser.parse_args(words)
    from qwen4b_asr._blas import preload_openblas

    blas = preload_openblas()  # before MLX, which only describes the machine in this process
    from bench.facts import about, default_device, load_average
    from bench.record import SPEECH_AREA_BEGIN, RecordError, write_block
    from bench.session import run
    from bench.sides import SideError
    from bench.speech_table import block

    plan = make_plan(parser, options)
    facts = about(datetime.now(timezone.utc).isoformat(timespec="seconds"), command_line(words), blas)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=options.work_dir) as folder:
            result = run(plan, Path(folder))
    except SideError as error:
        print(error, file=sys.stderr)
        return 1
    facts["load_average_after"] = load_average()
    device = default_device()
    what = Path(plan.model).name if plan.model else plan.shape
    text = block(result, plan, facts, f"{what}, {device.title}")
    print(text)
    if options.json:
        with options.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**facts, "result": result.as_json()}, default=str) + "\n")
    if options.record:
        try:
            write_block(DOCUMENT, slug(f"{what} {device.title}"), text, SPEECH_AREA_BEGIN)
        except (RecordError, OSError) as error:
            print(f"{DOCUMENT.name} was not written: {error}", file=sys.stderr)
            return 1
        print(f"written to {DOCUMENT.parent.name}/{DOCUMENT.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
