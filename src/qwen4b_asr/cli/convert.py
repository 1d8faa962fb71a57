"""``qwen4b-asr convert``: make a model directory from the published parts."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``convert``."""
    parser.add_argument(
        "--encoder",
        type=Path,
        required=True,
        metavar="DIR",
        help="SenseVoiceSmall: a directory with model.pt (or model.safetensors), am.mvn and config.yaml",
    )
    parser.add_argument(
        "--adaptor", type=Path, required=True, metavar="FILE", help="the adaptor's weights, .pt or .safetensors"
    )
    parser.add_argument(
        "--llm",
        type=Path,
        required=True,
        metavar="DIR",
        help="Qwen3: a Hugging Face directory with config.json, model*.safetensors and tokenizer.json",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the model directory to make")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="how to store the language model (default: what loses nothing; float16 is refused); "
        "encoder and adaptor are always float32",
    )
    parser.add_argument(
        "--shard-size",
        type=byte_count,
        default="4G",
        metavar="SIZE",
        help="largest file, such as 500M or 4G (default: 4G)",
    )
    parser.add_argument("--force", action="store_true", help="replace the model directory if it exists")
    parser.add_argument(
        "--encoder-heads", type=int, metavar="N", help="attention heads of the encoder, if config.yaml is not there"
    )
    parser.add_argument("--adaptor-heads", type=int, metavar="N", help="attention heads of the adaptor (default: 8)")


def byte_count(text: str) -> int:
    """Read a size such as ``500M``; K, M and G are powers of 1024.

    Raises:
        ArgumentTypeError: If it is not a positive size.
    """
    match = re.fullmatch(r"([1-9]\d*)([KMG]?)B?", text.strip().upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500M or 4G")
    return int(match[1]) * _UNITS[match[2]]


def run(args: argparse.Namespace) -> int:
    """Convert; returns the exit status.

    Raises:
        AsrError: If the parts are not as they should be; the caller prints it.
    """
    from ..weights.convert import convert
    from ._progress import byte_progress

    with byte_progress("converting") as on_progress:
        config = convert(
            encoder=args.encoder,
            adaptor=args.adaptor,
            llm=args.llm,
            output=args.output,
            dtype=args.dtype,
            shard_bytes=args.shard_size,
            force=args.force,
            encoder_heads=args.encoder_heads,
            adaptor_heads=args.adaptor_heads,
            on_progress=on_progress,
        )
    print(f"{args.output}: {config.name}. Transcribe with --model {args.output}", file=sys.stderr)
    return 0
