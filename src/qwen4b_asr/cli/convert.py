"""``qwen4b-asr convert``: make a model directory from a published checkpoint, or from the 4B system's three parts."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AsrError, ConfigError

if TYPE_CHECKING:
    from ..config import ModelConfig
    from ..weights.conversion import Conversion
    from ..weights.recipes import Recipe

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``convert``."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="a published checkpoint that is a whole model: SenseVoiceSmall, Fun-ASR-Nano and MLT-Nano (model.pt, or "
        "transformers' layout), Canary-Qwen; which it is, its tensors tell. Or a model directory, or the name of one "
        "that is on this machine, to store it in another type or --quantize it",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="with --checkpoint: the language model's folder, where the checkpoint has no tokenizer.json",
    )
    parser.add_argument(
        "--lora",
        choices=("keep", "merge"),
        default="keep",
        help="with --checkpoint: keep low-rank adapters apart, or merge them into the weights (default: keep)",
    )
    parser.add_argument(
        "--encoder",
        type=Path,
        metavar="DIR",
        help="of the 4B system: SenseVoiceSmall, a directory with model.pt (or model.safetensors), am.mvn, config.yaml",
    )
    parser.add_argument(
        "--adaptor", type=Path, metavar="FILE", help="of the 4B system: the adaptor's weights, .pt or .safetensors"
    )
    parser.add_argument(
        "--llm",
        type=Path,
        metavar="DIR",
        help="of the 4B system: Qwen3, a Hugging Face or MLX directory with config.json, model*.safetensors and "
        "tokenizer.json",
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
    add_quantize_arguments(parser)
    parser.add_argument(
        "--encoder-heads", type=int, metavar="N", help="attention heads of the encoder, if config.yaml is not there"
    )
    parser.add_argument("--adaptor-heads", type=int, metavar="N", help="attention heads of the adaptor (default: 8)")


def add_quantize_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is quantised."""
    parser.add_argument(
        "--quantize",
        metavar="RECIPE",
        help="quantise the language model: 8, 6, 5 or 4 bits, its embedding and head at 8; 6-all, 4-all, with those; "
        "mixed-4-6, mixed-4-8, mixed-3-6, more bits where errors weigh most; mxfp8, mxfp4; or a .json file of rules",
    )
    parser.add_argument(
        "--group-size", type=int, choices=(32, 64, 128), help="elements that share a scale (default: 64)"
    )
    for part in ("encoder", "adaptor"):
        parser.add_argument(
            f"--quantize-{part}", type=int, choices=(8, 6, 5, 4), metavar="BITS", help=f"quantise the {part} too"
        )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not compare the quantised model with its original (which reads both, a layer at a time)",
    )


def recipe_of(args: argparse.Namespace) -> Recipe | None:
    """Return the recipe that the options of `add_quantize_arguments` ask for, None if they ask for none.

    Raises:
        ConfigError: If there is no such recipe.
    """
    if args.quantize is None and args.quantize_encoder is None and args.quantize_adaptor is None:
        if args.group_size is not None:
            raise ConfigError("--group-size is for --quantize")
        return None
    from ..weights.recipes import read_recipe

    return read_recipe(
        args.quantize, group_size=args.group_size, encoder=args.quantize_encoder, adaptor=args.quantize_adaptor
    )


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
    from ..weights.convert import convert, convert_checkpoint
    from ._progress import byte_progress

    given = sum(part is not None for part in (args.encoder, args.adaptor, args.llm))
    if given != (3 if args.checkpoint is None else 0):
        raise ConfigError("give --checkpoint, or all of --encoder, --adaptor and --llm")
    recipe = recipe_of(args)
    planned: list[Conversion] = []
    common: dict[str, Any] = {
        "dtype": args.dtype,
        "shard_bytes": args.shard_size,
        "force": args.force,
        "recipe": recipe,
        "on_done": planned.append,
    }
    with byte_progress("converting") as on_progress:
        if args.checkpoint is not None:
            config = convert_checkpoint(
                local_model(args.checkpoint),
                args.output,
                tokenizer=args.tokenizer,
                lora=args.lora,
                on_progress=on_progress,
                **common,
            )
        else:
            config = convert(
                encoder=args.encoder,
                adaptor=args.adaptor,
                llm=args.llm,
                output=args.output,
                encoder_heads=args.encoder_heads,
                adaptor_heads=args.adaptor_heads,
                on_progress=on_progress,
                **common,
            )
    parts = {"encoder": config.encoder, "adaptor": config.adaptor, "decoder": config.decoder}
    layers = [f"{count} {name}" for name, part in parts.items() if (count := _layers(part))]
    print(
        f"{args.output}: {config.name} with {', '.join(layers)} layers. Transcribe with --model {args.output}",
        file=sys.stderr,
    )
    print_remarks(config)
    if recipe is not None and not args.no_check:
        print_check(planned[0], args.output)
    return 0


def print_check(original: Conversion, output: Path) -> None:
    """Compare a model directory with what it was quantised from; a model that cannot be compared is no failure."""
    from ..weights.families import plan_checkpoint
    from ..weights.fidelity import compare
    from ._progress import byte_progress

    try:
        with byte_progress("comparing") as on_progress:
            found = compare(original, plan_checkpoint(output), on_progress=on_progress)
    except AsrError as error:
        print(f"{output}: not compared with its original: {error}", file=sys.stderr)
        return
    for line in found.lines():
        print(f"{output}: {line}", file=sys.stderr)
    if found.problem:
        print(f"{output}: warning: {found.problem}", file=sys.stderr)


def local_model(checkpoint: Path) -> Path:
    """Return the directory of a model whose name was given, or else what was given."""
    from ..weights.find import find_local

    return checkpoint if checkpoint.exists() else find_local(str(checkpoint)) or checkpoint


def print_remarks(config: ModelConfig) -> None:
    """Say what a model lacks that others of its family have."""
    from ..nano_adaptor import NO_CTC, NanoAdaptorConfig

    if isinstance(config.adaptor, NanoAdaptorConfig) and not config.ctc_size:
        print(f"{config.name}: {NO_CTC}", file=sys.stderr)


def _layers(part: object) -> int:
    """Count the layers of a stage, under whichever name its configuration has them."""
    return sum(getattr(part, name, 0) for name in ("num_blocks", "tp_blocks", "num_layers", "num_hidden_layers"))
