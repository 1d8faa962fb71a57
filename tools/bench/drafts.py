#!/usr/bin/env python3
"""What a draft saves: passes and time of decoding with one, against decoding without.

    python tools/bench/drafts.py                        Qwen3-0.6B's shape, random weights, 5 % of the tokens wrong
    python tools/bench/drafts.py --layers 8 --tokens 96 --rounds 3 --errors 0 0.05 0.2
    python tools/bench/drafts.py --costs                what a pass over k rows costs, in passes over one

The ways take turns, round by round, and ratios are of one round: on a busy machine trust them more than the seconds,
and those of processor time most, with OPENBLAS_NUM_THREADS=1, since threads that wait for each other take it too.
Every text is compared with that of plain decoding, token by token.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen4b_asr.decoder import Qwen3
    from qwen4b_asr.generate import Generation

PROMPT_ROWS = 100
ROWS = (1, 2, 4, 8, 12, 16, 24, 32)
USELESS = 1.0
"""An error rate that leaves nothing of the text: a draft of random tokens."""


@dataclass(frozen=True)
class Saving:
    """One draft's result.

    Attributes:
        errors: Share of the draft's tokens that were changed.
        tokens: Length of the text.
        passes: Of plain decoding for one with the draft.
        time: Seconds of plain decoding for one with the draft, the prefill left out: the median of all rounds.
        times: All rounds.
        processor: As `time`, in processor time of the whole process.
        drafted: Tokens verified.
        accepted: How many were right.
    """

    errors: float
    tokens: int
    passes: float
    time: float
    times: tuple[float, ...]
    processor: float
    drafted: int
    accepted: int


def random_decoder(layers: int = 28, vocabulary: int = 151936, bits: int | None = None, seed: int = 0) -> Qwen3:
    """Return a decoder of Qwen3-0.6B's shape with random float32 weights, its projections joined as loading does."""
    import mlx.core as mx

    from qwen4b_asr.decoder import DecoderConfig, Qwen3
    from qwen4b_asr.joined import join_projections
    from qwen4b_asr.quantization import Quantization, Scheme

    config = DecoderConfig(
        vocab_size=vocabulary,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        quantization=None if bits is None else Quantization(Scheme(64, bits)),
    )
    mx.random.seed(seed)
    decoder = Qwen3(config)
    decoder.eval()
    mx.eval(decoder.parameters())
    join_projections(decoder)
    return decoder


def corrupt(tokens: Sequence[int], errors: float, vocabulary: int, seed: int = 0) -> list[int]:
    """Change a share of the tokens: substitutions, insertions and deletions, as many of each."""
    dice = random.Random(seed)
    if errors >= USELESS:
        return [dice.randrange(vocabulary) for _ in tokens]
    changed: list[int] = []
    for token in tokens:
        kind = dice.choice(("other", "more", "none")) if dice.random() < errors else "same"
        other = dice.randrange(vocabulary)
        changed += {"same": [token], "other": [other], "more": [token, other], "none": []}[kind]
    return changed


def savings(decoder: Qwen3, tokens: int, errors: Sequence[float], rounds: int, seed: int = 0) -> list[Saving]:
    """Decode with drafts of several error rates, and without, in turns.

    Args:
        decoder: The language model.
        tokens: Length of the text.
        errors: Error rates of the drafts; from `USELESS` on a draft is random.
        rounds: Turns.
        seed: Of prompt and errors.

    Raises:
        RuntimeError: If a draft changes the text.
    """
    import mlx.core as mx

    from qwen4b_asr.generate import Generation, GenerationOptions
    from qwen4b_asr.sampling import SamplingOptions
    from qwen4b_asr.speculate import DraftedGeneration

    config = decoder.config
    prompt = mx.random.normal((PROMPT_ROWS, config.hidden_size), key=mx.random.key(seed)) * 0.02
    options = GenerationOptions(tokens, (), SamplingOptions(repetition_penalty=1.2, no_repeat_ngram=4))
    wanted = _run(Generation(decoder, prompt, options))[0].tokens
    drafts = [corrupt(wanted, rate, config.vocab_size, seed + i) for i, rate in enumerate(errors)]
    times: list[list[float]] = [[] for _ in errors]
    processor: list[list[float]] = [[] for _ in errors]
    found: list[tuple[float, int, int]] = [(0.0, 0, 0)] * len(errors)
    for _ in range(rounds):
        plain, plain_seconds = _run(Generation(decoder, prompt, options))
        for i, draft in enumerate(drafts):
            drafted = DraftedGeneration(decoder, prompt, options, draft)
            _, seconds = _run(drafted)
            if drafted.tokens != wanted:
                raise RuntimeError(f"a draft with {errors[i]:.0%} errors changed the text")
            processor[i].append(plain_seconds / seconds)
            times[i].append(plain.decode_seconds / drafted.decode_seconds)
            found[i] = plain.decoder_passes / drafted.decoder_passes, drafted.drafted, drafted.accepted
    return [
        Saving(
            errors=rate,
            tokens=len(wanted),
            passes=found[i][0],
            time=statistics.median(times[i]),
            times=tuple(times[i]),
            processor=statistics.median(processor[i]),
            drafted=found[i][1],
            accepted=found[i][2],
        )
        for i, rate in enumerate(errors)
    ]


def pass_costs(decoder: Qwen3, rounds: int, rows: Sequence[int] = ROWS) -> dict[int, float]:
    """Time passes over several rows behind a prompt, logits included, in passes over one: medians of the rounds."""
    import mlx.core as mx

    from qwen4b_asr.cache import KVCache

    cache = [KVCache() for _ in decoder.model.layers]
    mx.eval(decoder.hidden(mx.zeros((1, PROMPT_ROWS, decoder.config.hidden_size)) + 0.01, cache))
    ratios: dict[int, list[float]] = {count: [] for count in rows}

    def seconds(count: int) -> float:
        embeds = decoder.embed(mx.arange(count)[None])
        mx.eval(embeds)
        start = time.perf_counter()
        mx.eval(decoder.logits(decoder.hidden(embeds, cache)))
        taken = time.perf_counter() - start
        for layer in cache:
            layer.trim(count)
        return taken

    seconds(max(rows)), seconds(1)  # the first ones make buffers
    for _ in range(rounds):
        for count in rows:
            before, taken, after = seconds(1), seconds(count), seconds(1)
            ratios[count].append(2 * taken / (before + after))
    return {count: statistics.median(values) for count, values in ratios.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark of the command line; JSON lines on standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--layers", type=int, default=28, help="of the decoder (default: 28)")
    add("--tokens", type=int, default=128, help="length of the text (default: 128)")
    add("--rounds", type=int, default=3, help="turns (default: 3)")
    add("--errors", type=float, nargs="+", default=[0.05, USELESS], help="error rates (default: 0.05 and 1, useless)")
    add("--bits", type=int, choices=(4, 8), help="quantise the weights")
    add("--seed", type=int, default=0)
    add("--costs", action="store_true", help="time passes over several rows instead")
    args = parser.parse_args(argv)

    sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "src")]
    from qwen4b_asr._blas import preload_openblas

    preload_openblas()
    decoder = random_decoder(args.layers, bits=args.bits, seed=args.seed)
    if args.costs:
        print(json.dumps({str(rows): round(cost, 3) for rows, cost in pass_costs(decoder, args.rounds).items()}))
        return 0
    for saving in savings(decoder, args.tokens, args.errors, args.rounds, args.seed):
        print(json.dumps(asdict(saving)), flush=True)
    return 0


def _run(generation: Generation) -> tuple[Generation, float]:
    """Run to the end; also return the seconds of processor time from the first token on."""
    tokens = iter(generation)
    next(tokens)
    start = time.process_time()
    for _ in tokens:
        pass
    return generation, time.process_time() - start


if __name__ == "__main__":
    sys.exit(main())
