"""What `qwen4b-asr FILE` can be told, and its help."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..text import FORMATS
from ..version import __version__
from ._terminal import PROGRAM
from .convert import byte_count

MODEL_VARIABLE = "QWEN4B_ASR_MODEL"

DESCRIPTION = "Transcribe recordings: WAV, FLAC, OGG, MP3, at any rate, with any number of channels."

EPILOG = f"""\
output:
  one file       its text; with --translate, the translation on a line of its own
  several files  one line each: path, tab, text; with --translate, tab, translation
  --format json  one line per file: an object with file, text, tokens, language, duration_seconds, segments, timings,
                 finish_reason, model, decoder_passes, drafted, accepted, and emotion, events and words where the
                 model tells them
  --output-dir   DIR/STEM.txt or DIR/STEM.json; a second input of the same stem gets STEM-2

other commands (--help after each):
  {PROGRAM} models     list the models that are known: what is here, sizes, licences
  {PROGRAM} download   fetch a model by name and make it ready
  {PROGRAM} info       parameters, sizes and types of a model
  {PROGRAM} plan       memory that a model needs, and what quantisation saves
  {PROGRAM} convert    build a model directory from a published checkpoint
  {PROGRAM} verify     check a model directory
  {PROGRAM} train      train the demonstration model
  {PROGRAM} doctor     show what this machine runs on, and what is wrong with it
  A recording with such a name is given as ./convert.

environment:
  {MODEL_VARIABLE}   model to use without --model
  QWEN4B_ASR_MODELS  folder of the models that download makes
  HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN: as everywhere
  QWEN4B_ASR_BLAS    Linux: BLAS library to load for MLX, or off; an OpenBLAS is found by itself
  QWEN4B_ASR_KERNELS custom kernels on a GPU: on, off, or names separated by commas

exit status:
  0 all done, 1 a file failed (the others are still done), 2 wrong usage, 130 interrupted
"""


def build_parser() -> argparse.ArgumentParser:
    """Describe the options of the transcription command."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a recording; - is standard input")
    parser.add_argument(
        "-m",
        "--model",
        default=os.environ.get(MODEL_VARIABLE) or None,
        help=f"a name that `{PROGRAM} models` lists, such as demo (spoken numbers only), owner/name of the hub, or a "
        f"directory that `{PROGRAM} convert` wrote [env: {MODEL_VARIABLE}]",
    )
    parser.add_argument("-f", "--format", choices=FORMATS, default="txt", help="output format (default: txt)")
    parser.add_argument("-o", "--output-dir", metavar="DIR", type=Path, help="write one file per recording there")
    parser.add_argument(
        "-l", "--language", help="auto, or one that the model knows, such as zh, en, yue, ja, ko (default: auto)"
    )
    parser.add_argument(
        "--itn",
        action=argparse.BooleanOptionalAction,
        help="write numbers and punctuation as they are read (default: as the model was published)",
    )
    parser.add_argument(
        "--decoder",
        choices=("llm", "ctc", "ctc-beam"),
        help="what writes the text: the language model, or the CTC head, by the best path or by prefix beam search "
        "(default: the language model, where there is one)",
    )
    parser.add_argument(
        "--hotword",
        action="append",
        metavar="WORD",
        help="a word or name that is likely to be heard; may be given several times (Fun-ASR-Nano)",
    )
    parser.add_argument(
        "--low-frame-rate",
        action=argparse.BooleanOptionalAction,
        help="give the language model an eighth of the audio rows (Fun-ASR-Nano; default: as configured)",
    )
    parser.add_argument(
        "--prompt-profile", metavar="NAME", help="plain, raw, instruct or chatml (default: the model's)"
    )
    parser.add_argument(
        "--task",
        choices=("transcribe", "translate"),
        help="translate: English straight from the speech, with instruct and chatml (default: transcribe)",
    )
    parser.add_argument("--translate", action="store_true", help="also translate the transcript to English")
    parser.add_argument(
        "--max-tokens", type=_positive, metavar="N", help="budget per utterance (default: grows with its duration)"
    )
    parser.add_argument(
        "--draft",
        action=argparse.BooleanOptionalAction,
        help="let the language model verify the CTC head's text rather than write it token by token: the same text, "
        "sooner (default: wherever it can be done and is likely to save time)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the decoder (default: auto, float32 on a CPU, bfloat16 on a GPU)",
    )
    parser.add_argument(
        "--memory-limit",
        type=byte_count,
        metavar="SIZE",
        help="refuse a model that would take more, such as 12G or 500M, before loading it (default: what the machine "
        f"has; `{PROGRAM} plan` shows what a model takes)",
    )
    parser.add_argument(
        "--lora",
        choices=("keep", "merge"),
        default="keep",
        help="low-rank adapters of the language model: keep them apart, or merge them into its weights (default: keep)",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        type=_adapter,
        metavar="DIR[:STRENGTH]",
        help="a PEFT adapter for the language model; may be given several times",
    )
    parser.add_argument(
        "--batch-size",
        type=_positive,
        metavar="N",
        help="recordings, or windows of a long one, that are decoded side by side (default: 8 where that saves time, "
        "1 with --stream or --memory-limit)",
    )
    parser.add_argument("--stream", action="store_true", help="print the text as it comes")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress and no warnings, only errors")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    return parser


def _adapter(text: str) -> tuple[str, float]:
    """Read ``DIR`` or ``DIR:STRENGTH``."""
    folder, colon, strength = text.rpartition(":")
    try:
        return (folder, float(strength)) if colon and folder else (text, 1.0)
    except ValueError:
        return text, 1.0


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 but got {text!r}")
    return value
