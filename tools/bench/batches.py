#!/usr/bin/env python3
"""What decoding side by side gives: tokens a second of a batch, against utterances decoded one after the other.

    python tools/bench/batches.py                              Qwen3-0.6B's shape, random weights, batches of 8
    python tools/bench/batches.py --sizes 2 4 8 16 --rounds 3 --tokens 32
    python tools/bench/batches.py --layers 8 --bits 8          quantised weights

Batches and single runs take turns, round by round, and ratios are of one round: on a busy machine trust them more than
the seconds. A round's single runs are as many as `--singles`, of the same utterances, and their tokens are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

    from qwen4b_asr.decoder import Qwen3
    from qwen4b_asr.generate import GenerationOptions

    Prompt = tuple[mx.array, GenerationOptions]


@dataclass
class Gain:
    """Batches of one size against single runs, one entry a round.

    Attributes:
        size: Utterances side by side.
        batch: Tokens a second of the batch, prompts left out.
        single: Likewise of single runs.
        whole: Times as many tokens a second, prompts included.
        steps: Times as many tokens a second, prompts left out.
        redone: Utterances that were decoded anew alone, all rounds together.
    """

    size: int
    batch: list[float] = field(default_factory=list)
    single: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    redone: int = 0


def make_prompts(decoder: Qwen3, count: int, rows: int, tokens: int) -> list[Prompt]:
    """Return prompts of about `rows` rows (a hundred are some six seconds) and budgets that differ a little."""
    import mlx.core as mx

    from qwen4b_asr.generate import GenerationOptions
    from qwen4b_asr.sampling import SamplingOptions

    sampling = SamplingOptions(repetition_penalty=1.2, no_repeat_ngram=4)
    width = decoder.config.hidden_size
    return [
        (
            mx.random.normal((rows - i * rows // (8 * count), width), key=mx.random.key(i)),
            GenerationOptions(max(1, tokens - i % 3), (), sampling),
        )
        for i in range(count)
    ]


def one_round(decoder: Qwen3, prompts: Sequence[Prompt], singles: Sequence[int], gain: Gain) -> None:
    """Run a batch and some of its utterances alone; add what came of it.

    Raises:
        SystemExit: If the tokens differ.
    """
    from qwen4b_asr.batch_generate import BatchGeneration
    from qwen4b_asr.generate import Generation

    start = time.perf_counter()
    batch = BatchGeneration(decoder, prompts, gain.size)
    rows = {row.number: row for row in batch}
    whole = time.perf_counter() - start
    count = sum(len(row.tokens) for row in rows.values())
    gain.batch.append(count / sum(row.decode_seconds for row in rows.values()))
    gain.redone += batch.redone
    single_count, single_whole, single_steps = 0, 0.0, 0.0
    for number in singles:
        start = time.perf_counter()
        single = Generation(decoder, *prompts[number])
        if list(single) != rows[number].tokens:
            sys.exit(f"utterance {number}: the batch gives other tokens than the single run")
        single_whole += time.perf_counter() - start
        single_steps += single.decode_seconds
        single_count += len(single.tokens)
    gain.single.append(single_count / single_steps)
    gain.steps.append(gain.batch[-1] / gain.single[-1])
    gain.whole.append(count / whole / (single_count / single_whole))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--singles", type=int, default=2, help="single runs of a round")
    parser.add_argument("--tokens", type=int, default=32, help="of an utterance")
    parser.add_argument("--rows", type=int, default=100, help="of a prompt")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--bits", type=int, help="quantise the weights")
    parser.add_argument("--json", type=Path, help="write all rounds there")
    args = parser.parse_args(arguments)

    sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "src"), str(Path(__file__).resolve().parents[1])]
    from qwen4b_asr._blas import preload_openblas

    library = preload_openblas()
    import mlx.core as mx

    from bench.drafts import random_decoder

    decoder = random_decoder(args.layers, bits=args.bits)
    print(f"{mx.default_device()}, BLAS {library or 'as MLX comes'}, {args.layers} layers, bits {args.bits or 32}")
    gains = [Gain(size) for size in args.sizes]
    prompts = {size: make_prompts(decoder, size, args.rows, args.tokens) for size in args.sizes}
    for turn in range(args.rounds + 1):
        for gain in gains:
            chosen = [(turn * args.singles + i) % gain.size for i in range(args.singles)]
            if turn:
                one_round(decoder, prompts[gain.size], chosen, gain)
                print(
                    f"round {turn}: {gain.size} at once {gain.batch[-1]:.2f} tok/s, alone {gain.single[-1]:.2f}, "
                    f"times {gain.steps[-1]:.2f}, with prompts {gain.whole[-1]:.2f}",
                    flush=True,
                )
            else:  # the first round makes everything warm
                one_round(decoder, [(rows, _short(options)) for rows, options in prompts[gain.size]], chosen[:1], gain)
                gain.batch, gain.single, gain.whole, gain.steps, gain.redone = [], [], [], [], 0
    print("size  batch tok/s  single tok/s  times (steps)  times (prompts included)  redone")
    for gain in gains:
        batch, single, steps, whole = (
            statistics.median(values) for values in (gain.batch, gain.single, gain.steps, gain.whole)
        )
        spread = f"{min(gain.steps):.2f} to {max(gain.steps):.2f}"
        print(f"{gain.size:4}  {batch:11.1f}  {single:12.2f}  {steps:5.2f} ({spread})  {whole:10.2f}  {gain.redone:6}")
    if args.json:
        args.json.write_text(json.dumps([asdict(gain) for gain in gains], indent=1) + "\n", encoding="utf-8")


def _short(options: GenerationOptions) -> GenerationOptions:
    from dataclasses import replace

    return replace(options, max_tokens=2)


if __name__ == "__main__":
    main()
