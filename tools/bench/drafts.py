#!/usr/bin/env python3
"""What a draft saves: passes and time of decoding with one, against decoding without.

    python tools/bench/drafts.py                        Qwen3-0.6B's shape, random weights, 5 % of the tokens wrong
    python tools/bench/drafts.py --layers 8 --tokens 96 --rounds 3 --errors 0 0.05 0.2
    python tools/bench/drafts.py --costs                what a pass over k rows costs, in passes over one

The ways take turns, round by round, and ratios are of one round: on a busy machine trust them more than the seconds,
and those of processor time most, with OPENBLAS_NUM_THREADS=1, since threads that wait for each other take it too.
Every round has texts and errors of its own. Every text is compared with that of plain decoding, token by token.
"""

from __future__ import annotations

import argparse
import copy
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
    import mlx.core as mx

    from qwen4b_asr.decoder import Qwen3
    from qwen4b_asr.generate import Generation

PROMPT_ROWS = 100
ROWS = (1, 2, 4, 8, 12, 16, 24, 32)
LOUD = 10.0
"""How much louder embeddings are made, so that a random model is about as decided as a trained one."""
USELESS = 1.0
"""An error rate that leaves nothing of the text: a draft of random tokens."""


@dataclass(frozen=True)
class Saving:
    """One draft's result.

    Attributes:
        errors: Share of the draft's tokens that were changed.
        tokens: Length of the text.
        passes: Of plain decoding for one with the draft: the median of all rounds.
        time: Seconds of plain decoding for one with the draft, the prefill left out; the median likewise.
        times: All rounds.
        processor: As `time`, in processor time of the whole process.
        drafted: Tokens verified, on average.
        accepted: How many of them were right.
    """

    errors: float
    tokens: int
    passes: float
    time: float
    times: tuple[float, ...]
    processor: float
    drafted: int
    accepted: int


@dataclass(frozen=True)
class _Turn:
    """One round of `Saving`."""

    passes: float
    time: float
    processor: float
    drafted: int
    accepted: int


def random_decoder(layers: int = 28, vocabulary: int = 151936, bits: int | None = None, seed: int = 0) -> Qwen3:
    """Return a decoder of Qwen3-0.6B's shape with random float32 weights, made ready as loading does."""
    import mlx.core as mx

    from qwen4b_asr.decoder import DecoderConfig, Qwen3
    from qwen4b_asr.prepare import prepare_decoder
    from qwen4b_asr.quantization import Quantization, Scheme, unpack_for_many_rows

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
    if mx.default_device().type == mx.DeviceType.cpu:
        unpack_for_many_rows(decoder)
    prepare_decoder(decoder)
    return decoder


def decided(decoder: Qwen3) -> Qwen3:
    """Return a random decoder that knows what comes next; it shares the weights, and passes cost the same.

    It reads each token as a loud embedding of the next one, so with a head tied to the embeddings it counts: a text
    without repetitions, where the leads of tokens have a median of 0.3 of the largest logit, and one in a hundred is
    below 0.012. The demo model's median is 0.7. Left to itself a random decoder has a median of 0.012: it repeats
    itself, and one token in some 300 is so near a tie that rounding could decide it, which makes a draft start anew.
    """
    from qwen4b_asr.decoder import Qwen3 as Base

    class Decided(Base):  # here, as the module of the class can be imported only when the program runs
        def embed(self, token_ids: mx.array) -> mx.array:
            return LOUD * super().embed((token_ids + 1) % self.config.vocab_size)

    if not decoder.config.tie_word_embeddings:
        return decoder
    twin = copy.copy(decoder)
    twin.__class__ = Decided
    return twin


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
    """Decode with drafts of several error rates, and without, in turns; each turn has a prompt and drafts of its own.

    Args:
        decoder: The language model.
        tokens: Length of the texts.
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

    config, decoder = decoder.config, decided(decoder)
    options = GenerationOptions(tokens, (), SamplingOptions(repetition_penalty=1.2, no_repeat_ngram=4))
    found: list[list[_Turn]] = [[] for _ in errors]
    for number in range(seed, seed + rounds):
        prompt = mx.random.normal((PROMPT_ROWS, config.hidden_size), key=mx.random.key(number)) * 0.02
        plain, plain_seconds = _run(Generation(decoder, prompt, options))
        for i, rate in enumerate(errors):
            draft = corrupt(plain.tokens, rate, config.vocab_size, number + i)
            drafted = DraftedGeneration(decoder, prompt, options, draft)
            _, seconds = _run(drafted)
            if drafted.tokens != plain.tokens:
                raise RuntimeError(f"a draft with {rate:.0%} errors changed the text")
            found[i].append(
                _Turn(
                    passes=plain.decoder_passes / drafted.decoder_passes,
                    time=plain.decode_seconds / drafted.decode_seconds,
                    processor=plain_seconds / seconds,
                    drafted=drafted.drafted,
                    accepted=drafted.accepted,
                )
            )
    return [
        Saving(
            errors=rate,
            tokens=tokens,
            passes=statistics.median(turn.passes for turn in turns),
            time=statistics.median(turn.time for turn in turns),
            times=tuple(turn.time for turn in turns),
            processor=statistics.median(turn.processor for turn in turns),
            drafted=round(statistics.mean(turn.drafted for turn in turns)),
            accepted=round(statistics.mean(turn.accepted for turn in turns)),
        )
        for rate, turns in zip(errors, found, strict=True)
    ]


def pass_costs(decoder: Qwen3, rounds: int, rows: Sequence[int] = ROWS) -> dict[int, float]:
    """Time passes over several rows behind a prompt, logits included, in passes over one: medians of the rounds."""
    import mlx.core as mx

    from qwen4b_asr.cache import KVCache

    cache = [KVCache() for _ in decoder.model.layers]
    mx.eval(decoder.hidden(mx.zeros((1, PROMPT_ROWS, decoder.config.hidden_size)) + 0.01, cache))
    ratios: dict[int, list[float]] = {count: [] for count in rows}

    def seconds(count: int) -> float:
        embeds = decoder.embed(mx.arange(count)[None] % decoder.config.vocab_size)
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
