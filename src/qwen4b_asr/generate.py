"""The decoding loop: prefill the prompt once, then one token at a time.

Shapes: S prompt rows, H decoder width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from .cache import KeysValues, KVCache, QuantizedKVCache
from .decoder import Qwen3
from .prefix import PrefixCache
from .sampling import GreedyChain, Sampler, SamplingOptions

# Tokens for which there is room from the start, if the budget is that large.
_LIKELY_TOKENS = 1024


@dataclass(frozen=True)
class GenerationOptions:
    """When to stop and how to choose.

    Args:
        max_tokens: Tokens generated at most, the stop token not counted.
        stop_token_ids: Tokens that end the text; they are not part of it.
        sampling: How each token is chosen.
        prefill_chunk: Prompt rows per pass, which bounds the memory of long prompts.
        kv_bits: Keep keys and values quantised, in 8 or 4 bits; None keeps them as they are.
    """

    max_tokens: int
    stop_token_ids: tuple[int, ...]
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    prefill_chunk: int = 512
    kv_bits: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if self.max_tokens < 1:
            raise ValueError(f"[GenerationOptions] max_tokens must be at least 1 but got {self.max_tokens}")
        if self.prefill_chunk < 1:
            raise ValueError(f"[GenerationOptions] prefill_chunk must be at least 1 but got {self.prefill_chunk}")
        if self.kv_bits not in (None, 4, 8):
            raise ValueError(f"[GenerationOptions] kv_bits must be 4, 8 or None but got {self.kv_bits}")


class Generation:
    """One run of the decoder. Iterate over it for token ids as they come.

    Args:
        decoder: The language model.
        inputs_embeds: Prompt rows (S, H), S ≥ 1.
        options: When to stop and how to choose.
        prefix: Token ids of the text that the prompt begins with.
        prefixes: Where its keys and values are kept for the next prompt; without, they are computed with the rest.

    Attributes:
        tokens: The ids so far.
        finish_reason: None while running, then ``stop`` (a stop token came) or ``length`` (the budget cut it off).
        prefill_seconds: Time to the first token.
        decode_seconds: Time for the rest.
        decoder_passes: Passes of the decoder after the prefill.

    Raises:
        ValueError: If the prompt is empty or does not fit into the model's context with its budget.
    """

    def __init__(
        self,
        decoder: Qwen3,
        inputs_embeds: mx.array,
        options: GenerationOptions,
        *,
        prefix: Sequence[int] = (),
        prefixes: PrefixCache | None = None,
    ) -> None:
        if inputs_embeds.ndim != 2 or inputs_embeds.shape[0] == 0:
            raise ValueError(
                f"[Generation] inputs_embeds must have shape (S, H), S >= 1, but got {inputs_embeds.shape}"
            )
        room = decoder.config.max_position_embeddings - inputs_embeds.shape[0]
        if room < options.max_tokens:
            raise ValueError(
                f"[Generation] prompt and max_tokens must fit into {decoder.config.max_position_embeddings} positions "
                f"but got {inputs_embeds.shape[0]} + {options.max_tokens}"
            )
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.decoder_passes = 0
        self._decoder = decoder
        self._nothing_ahead = decoder.computes_at_once
        self._options = options
        self._inputs = inputs_embeds
        self._prefix = tuple(prefix)
        self._prefixes = prefixes

    def __iter__(self) -> Iterator[int]:
        """Yield token ids until a stop token or the budget; can be done once."""
        if self.finish_reason is not None or self.tokens:
            raise RuntimeError("[Generation] a generation can be iterated over once")
        start = time.perf_counter()
        choices = self._choices()
        token = next(choices)
        self.prefill_seconds = time.perf_counter() - start
        start = time.perf_counter()
        while True:
            if token in self._options.stop_token_ids:
                self.finish_reason = "stop"
                break
            if len(self.tokens) == self._options.max_tokens:
                self.finish_reason = "length"
                break
            self.tokens.append(token)
            paused = time.perf_counter()
            yield token
            start += time.perf_counter() - paused  # the consumer's time is not ours
            token = next(choices)
            self.decode_seconds = time.perf_counter() - start
        self.decode_seconds = time.perf_counter() - start

    def _choices(self) -> Iterator[int]:
        return self._chained() if GreedyChain.pays(self._options.sampling) else self._one_by_one()

    def _one_by_one(self) -> Iterator[int]:
        """Choose tokens without end, each one from `tokens` and before the next step begins."""
        sampler = Sampler(self._options.sampling)
        cache = self._empty_cache()
        logits = self._prefill(cache)
        while True:
            token = sampler.choose(logits, self.tokens)
            yield token
            logits = self._step(mx.array([token]), cache)

    def _chained(self) -> Iterator[int]:
        """Choose the same tokens, up to the one behind the budget."""
        chain = GreedyChain(self._options.sampling)
        cache = self._empty_cache()
        token = chain.choose(self._prefill(cache))
        return self._links(chain, token, cache, lambda: len(self.tokens) == self._options.max_tokens)

    def _links(
        self, chain: GreedyChain, token: mx.array, cache: list[KVCache], enough: Callable[[], bool]
    ) -> Iterator[int]:
        """Give a token and those that follow it, with the next step made ready before each is read.

        On a GPU it is queued at once: the device never waits for the host, and the step behind a stop token is for
        nothing. On a CPU, where that step would cost as much as any other and handing over costs little, it is built
        while the device computes the token, and begun when the token is wanted; or built then, if building computes.

        Args:
            chain: Chose the token and chooses those behind it.
            token: The first one (1,); the cache holds all before it.
            cache: Of the decoder.
            enough: Asked before each step whether the token that is ready is to be the last.
        """
        mx.async_eval(token)
        at_once = mx.default_device().type == mx.gpu
        while not enough():
            if self._nothing_ahead:
                yield int(token)
                token = chain.choose(self._step(token, cache))
                continue
            before = self.decoder_passes
            following = chain.choose(self._step(token, cache))
            if not at_once:
                self.decoder_passes = before
                yield int(token)
                self.decoder_passes += 1
            mx.async_eval(following)
            if at_once:
                yield int(token)
            token = following
        yield int(token)

    def _empty_cache(self) -> list[KVCache]:
        # What the budget may need is there from the start, so that no step moves keys and values; a budget that is
        # out of all proportion would take memory for nothing.
        step = KVCache().step
        capacity = self._inputs.shape[0] + min(self._options.max_tokens, _LIKELY_TOKENS)
        bits, layers = self._options.kv_bits, self._decoder.model.layers
        if bits is None:
            return [KVCache(step, capacity) for _ in layers]
        return [QuantizedKVCache(bits, step, capacity) for _ in layers]

    def _prefill(self, cache: list[KVCache]) -> mx.array:
        size = self._options.prefill_chunk
        rows = self._inputs.shape[0]
        hidden = self._inputs[None, :0]
        for first in range(self._known_rows(cache), rows, size):
            hidden = self._decoder.hidden(self._inputs[None, first : first + size], cache)
            mx.eval(hidden, [layer.state for layer in cache])
        return self._decoder.logits(hidden[:, -1])[0]

    def _known_rows(self, cache: list[KVCache]) -> int:
        """Fill empty caches with the rows of the prompt's beginning that need not be computed; return how many."""
        count = len(self._prefix)
        # Rows that see codes are others than those that see numbers, so there nothing is kept.
        if self._prefixes is None or self._options.kv_bits or not 0 < count < self._inputs.shape[0]:
            return 0
        known = known_prefix(self._decoder, self._inputs[:count], self._prefix, self._prefixes)
        for layer, (keys, values) in zip(cache, known, strict=True):
            layer.update(keys, values)
        return count

    def _step(self, token: mx.array, cache: list[KVCache]) -> mx.array:
        self.decoder_passes += 1
        hidden = self._decoder.hidden(self._decoder.embed(token[None]), cache)
        return self._decoder.logits(hidden[:, -1])[0]


def known_prefix(decoder: Qwen3, rows: mx.array, ids: Sequence[int], prefixes: PrefixCache) -> list[KeysValues]:
    """Return keys and values (1, G, S, E) of each layer for a text that prompts begin with.

    Args:
        decoder: The language model.
        rows: The text's embeddings (S, H), from which they are computed if they are not known.
        ids: Its token ids.
        prefixes: Where they are kept.
    """
    known = prefixes.get(ids)
    if known is None:
        own = [KVCache(step=len(ids)) for _ in decoder.model.layers]
        decoder.hidden(rows[None], own)
        known = [(layer.state[0], layer.state[1]) for layer in own]
        mx.eval(known)
        prefixes.put(ids, known)
    return known
