"""``qwen4b-asr download``: fetch a model by name and make it ready to use."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .convert import add_quantize_arguments, print_check, print_remarks, recipe_of

if TYPE_CHECKING:
    from ..weights.conversion import Conversion


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``download``."""
    parser.add_argument("model", metavar="NAME", help="a name that `qwen4b-asr models` lists, or owner/name of the hub")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="the model directory to make (default: one of that name in the folder of models, used by --model NAME)",
    )
    parser.add_argument("--no-convert", action="store_true", help="only fetch the published files")
    parser.add_argument("--update", action="store_true", help="ask the hub for newer files although there are some")
    parser.add_argument("--force", action="store_true", help="replace the model directory if it exists")
    add_quantize_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Fetch; print where the model is, or with --no-convert where each of its parts is; return the exit status.

    Raises:
        AsrError: If it cannot be had; the caller prints it.
    """
    from ..config import ModelConfig
    from ..weights.catalog import find_known, parse_repo
    from ..weights.obtain import CONVERSIONS, fetch_sources, obtain_model
    from ._progress import byte_progress

    known = find_known(args.model)
    source = parse_repo(args.model) if known is None else None
    sources = {"model": source} if source is not None else dict(known.parts) if known is not None else {}
    ready = known is not None and known.recipe in CONVERSIONS
    recipe = recipe_of(args)
    if recipe is not None and args.no_convert:
        raise ConfigError("--quantize is for what is converted: not with --no-convert")
    if not sources or recipe is not None or (ready and not args.no_convert):
        planned: list[Conversion] = []
        model = obtain_model(
            args.model,
            output=args.output,
            update=args.update,
            force=args.force,
            quantise=recipe,
            on_done=planned.append,
            progress=byte_progress,
        )
        print(model)
        print_remarks(ModelConfig.load(model))
        if planned and recipe is not None and not args.no_check:
            print_check(planned[0], model)
        return 0
    folders = fetch_sources(sources, update=args.update, progress=byte_progress)
    for role, folder in folders.items():
        print(folder if len(folders) == 1 else f"{role}\t{folder}")
    if known is not None and not ready and not args.no_convert:
        print(f"{known.name}: fetched; qwen4b-asr convert --help tells how to use it", file=sys.stderr)
    return 0
