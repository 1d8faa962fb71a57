#!/usr/bin/env python3
"""Print what quantisation does to a model's word errors, as a table; the demo model's README has it.

    python tools/quantised_word_error.py --archive fsdd.tar.gz --archive audio-cmn.tar --strings 100

Each row is the model under one recipe of `qwen4b-asr convert` or, after a plus, with that many bits for encoder and
adaptor besides. Sizes are those of the file, the comparison is `qwen4b-asr verify --against`'s, and the recordings are
those of `python -m qwen4b_asr.training evaluate`, the Mandarin ones left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

RECIPES = ("none", "8", "6", "5", "4", "4-all", "mxfp8", "mxfp4", "none+8", "8+8", "4+6", "4+4")


def main() -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--archive", action="append", required=True, type=Path, metavar="TAR", help="as in evaluate")
    parser.add_argument("--model", type=Path, help="model directory; the demo by default")
    parser.add_argument("--strings", type=int, default=100, help="strings of 3 to 7 digits per speaker (100)")
    parser.add_argument("--group-size", type=int, choices=(32, 64, 128), help="64 by default")
    parser.add_argument(
        "recipes", nargs="*", metavar="RECIPE", help=f"such as 4 or 4+8; by default {' '.join(RECIPES)}"
    )
    args = parser.parse_args()
    from qwen4b_asr._blas import preload_openblas

    preload_openblas()
    from qwen4b_asr.training.corpus import read_corpus
    from qwen4b_asr.weights.paths import weights_data

    corpus, original = read_corpus(args.archive), args.model or weights_data() / "demo"
    print(
        "| language model | encoder, adaptor | decoder, kB | all, kB | mean KL, nats | same token | digits | strings |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in args.recipes or RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            print(_row(name, original, Path(folder) / "model", args.group_size, corpus, args.strings), flush=True)
    return 0


def _row(name: str, original: Path, output: Path, group_size: int | None, corpus: Any, strings: int) -> str:
    from qwen4b_asr.loading import load
    from qwen4b_asr.training.evaluate import evaluate
    from qwen4b_asr.transcribe import Transcriber
    from qwen4b_asr.weights.convert import convert_checkpoint
    from qwen4b_asr.weights.fidelity import compare_directories
    from qwen4b_asr.weights.recipes import read_recipe, stored_bytes

    words, _, bits = name.partition("+")
    stages = int(bits) if bits else None
    asked = None if words == "none" else words
    recipe = read_recipe(asked, group_size=group_size, encoder=stages, adaptor=stages) if asked or bits else None
    config = convert_checkpoint(original, output, recipe=recipe)
    near = compare_directories(output, original)
    dtype = "BF16" if asked else "F32"
    sizes = stored_bytes(config, decoder_dtype=dtype)
    transcriber = load(output, "float32")
    assert isinstance(transcriber, Transcriber)
    scores = evaluate(transcriber, corpus, strings=strings, progress=lambda _: lambda items, _: items)
    both = [score for score in scores if score.name.startswith("**all")]
    errors = [f"{100 * score.text_errors / score.words:.1f} % ({score.text_errors} of {score.words})" for score in both]
    cells = [
        "float32" if asked is None else words,
        f"{stages} bits" if stages else "float32",
        f"{sizes['decoder'] / 1000:,.0f}",
        f"{sum(sizes.values()) / 1000:,.0f}",
        f"{near.mean_kl:.4f}",
        f"{100 * near.agreement:.1f} %",
        *errors,
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
