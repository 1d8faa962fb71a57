"""Greedy decoding that verifies a draft, a run of tokens in one pass, and gives the ids of plain decoding.

Row i of a pass over the last token and a run of drafted ones says what follows the first i of them. As long as that is
what the draft has next, the tokens are right; the first other one is right as well, and the rest of the run is
forgotten. Source: Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding" (2023);
Yang et al., "Inference with Reference: Lossless Acceleration of Large Language Models" (2023), for drafts of text.

A pass over several rows rounds differently from one over a single row, and so do the keys and values that it leaves
behind. So a token counts only where it leads by more than rounding can change. Where two tokens are closer, the cache
is trimmed back to what single rows have made and the rows since are run one by one: the choice is then made from
exactly the numbers of plain decoding.
Shapes: S prompt rows, H width, K rows of a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from .cache import KVCache
from .cpu.choices import choose_run
from .decoder import Qwen3
from .draft import Place
from .generate import Generation, GenerationOptions
from .pass_costs import Stakes, pass_cost
from .sampling import NEAR, GreedyChain, Sampler, best_two

# What rounding may change in the lead of a token, in parts of the largest logit.
_DOUBT = {mx.float32: NEAR, mx.float16: 16 * 2.0**-10, mx.bfloat16: 16 * 2.0**-7}
# By how much the largest difference seen is exceeded, so that the next one is not taken for certain.
_CAUTION = 4.0


class DraftedGeneration(Generation):
    """A generation that has a draft to go by. The ids are those of `Generation`, whatever the draft.

    Args:
        decoder: The language model.
        inputs_embeds: Prompt rows (S, H).
        options: When to stop and how to choose; the temperature must be 0.
        draft: Token ids of the text that is expected.
        stakes: Decides the length of runs; by default as the decoder's passes cost on this device.
        **seams: Further arguments of `Generation`.

    Attributes:
        drafted: Tokens of the draft that passes have verified.
        accepted: How many of them were right.

    Raises:
        ValueError: If the temperature is not 0, keys and values are kept in codes, the draft has an id outside the
            vocabulary, or for `Generation`'s reasons.
    """

    def __init__(
        self,
        decoder: Qwen3,
        inputs_embeds: mx.array,
        options: GenerationOptions,
        draft: Sequence[int],
        *,
        stakes: Stakes | None = None,
        **seams: Any,
    ) -> None:
        super().__init__(decoder, inputs_embeds, options, **seams)
        if options.sampling.temperature != 0:
            raise ValueError(
                f"[DraftedGeneration] temperature must be 0 with a draft but got {options.sampling.temperature}"
            )
        if options.kv_bits is not None:
            # Where rounding turns a code into the next one, keys and values differ by far more than rounding.
            raise ValueError(f"[DraftedGeneration] kv_bits must be None with a draft but got {options.kv_bits}")
        if not all(0 <= token < decoder.config.vocab_size for token in draft):
            raise ValueError(f"[DraftedGeneration] draft ids must lie in 0..{decoder.config.vocab_size - 1}")
        self.drafted = 0
        self.accepted = 0
        stops = set(options.stop_token_ids)
        self._place = Place([token for token in draft if token not in stops])
        self._stakes = stakes or self._own_stakes(inputs_embeds.shape[0])
        self._sampler = Sampler(options.sampling)
        self._doubt = 0.0
        self._chosen: list[int] = []  # certain tokens; the cache holds all but the last
        self._plain = 0  # tokens in the cache up to which single rows have made it

    def _own_stakes(self, prompt_rows: int) -> Stakes:
        """Stake a part of all that plain decoding would cost: the steps, and the prompt's rows up to as much again."""
        cost = pass_cost(self._decoder)
        steps = min(self._options.max_tokens, len(self._place.draft))
        known = len(self._prefix) if self._prefixes is not None else 0
        return Stakes(cost, steps + min(steps, int(cost.of(prompt_rows - known))))

    def _choices(self) -> Iterator[int]:
        """Choose tokens without end, each one certain when it is given."""
        cache = self._empty_cache()
        self._take(self._sampler.choose(self._prefill(cache), []))
        given = 0
        while True:
            for token in self._chosen[given:]:
                given += 1
                yield token
            run = self._next_run()
            if run or self._plain < len(self._chosen) - 1:
                self._advance(run, cache)
                continue
            for token in self._plain_tokens(cache):
                given += 1
                yield token

    def _next_run(self) -> tuple[int, ...]:
        """Return the drafted tokens that are to be verified next, none for a plain step."""
        # The cache never holds more than prompt and budget, which fit into the context.
        room = self._options.max_tokens - len(self._chosen)
        ahead = self._place.ahead(min(room, self._stakes.longest)) if room > 0 else ()
        return ahead[: self._stakes.run_length(len(self._chosen), len(ahead))]

    def _plain_tokens(self, cache: list[KVCache]) -> Iterator[int]:
        """Choose tokens just as plain decoding does, over a cache that it could have made, until a run pays."""
        budget = self._options.max_tokens
        chain = GreedyChain(self._options.sampling, self._chosen)
        first = chain.choose(self._one(self._chosen[-1], cache))
        for token in self._links(chain, first, cache, lambda: len(self._chosen) >= budget or bool(self._next_run())):
            yield self._take(token, plain=True)

    def _advance(self, run: Sequence[int], cache: list[KVCache]) -> None:
        """Take the tokens that one pass over the last token and a run makes certain, and what it left in doubt."""
        logits = self._pass([self._chosen[-1], *run], cache)
        ids, certain = self._judge(logits, run)
        right = 0  # drafted tokens that follow one another and are certain
        while right < len(run) and certain[right] and ids[right] == run[right]:
            right += 1
        for layer in cache:
            layer.trim(len(run) - right)
        self.drafted += len(run)
        self.accepted += right
        self._stakes.pay(1 + len(run), right + certain[right])
        for token in run[:right]:
            self._take(token)
        if certain[right]:
            self._take(ids[right])
        else:
            self._take(self._settle(cache, logits[right]))

    def _judge(self, logits: mx.array, run: Sequence[int]) -> tuple[list[int], list[bool]]:
        """Choose a token in each row of logits (K, V), and tell which choices rounding cannot change."""
        factor = self._options.sampling.repetition_penalty
        doubt = max(self._doubt, _DOUBT[logits.dtype]) * max(factor, 1 / factor)
        if self._nothing_ahead and logits.dtype == mx.float32:
            chosen, ahead, size = choose_run(self._sampler, logits, self._chosen, run)
            return chosen, (ahead > doubt * size).tolist()
        scores = self._sampler.process_run(logits, self._chosen, run)
        ids, leads = best_two(scores)
        scale = mx.max(mx.abs(logits.astype(mx.float32)), axis=-1)
        certain = leads > doubt * scale  # not where one of them is not a number
        return np.array(ids).tolist(), np.array(certain).tolist()

    def _settle(self, cache: list[KVCache], doubtful: mx.array) -> int:
        """Choose the token behind all that is certain as plain decoding does, from rows run one by one."""
        for layer in cache:
            layer.trim(len(self._chosen) - self._plain)
        logits = doubtful
        for token in self._chosen[self._plain :]:
            logits = self._one(token, cache)
        self._stakes.debt += len(self._chosen) - self._plain - 1
        self._plain = len(self._chosen)
        difference = mx.max(mx.abs(logits - doubtful)) / mx.max(mx.abs(logits))
        self._doubt = max(self._doubt, _CAUTION * float(difference.astype(mx.float32)))
        return self._sampler.choose(logits, self._chosen)

    def _take(self, token: int, plain: bool = False) -> int:
        """Add a token that is certain to the text; `plain` if a plain step gave it."""
        self._stakes.learn(self._place.ahead(1) == (token,))
        self._place.push(token)
        self._chosen.append(token)
        self._plain += plain
        return token

    def _one(self, token: int, cache: list[KVCache]) -> mx.array:
        """Run one row; returns logits (V,)."""
        return self._step(mx.array([token]), cache)

    def _pass(self, tokens: Sequence[int], cache: list[KVCache]) -> mx.array:
        """Run several rows; returns logits (K, V)."""
        self.decoder_passes += 1
        hidden = self._decoder.hidden(self._decoder.embed(mx.array([list(tokens)])), cache)
        return self._decoder.logits(hidden)[0]
