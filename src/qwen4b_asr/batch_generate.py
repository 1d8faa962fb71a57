"""The decoding loop for many utterances at once: as many slots as the batch is large, and whoever waits takes the next.

A step of the decoder reads all of its weights, for one utterance as for eight, so eight at once cost little more than
one. Prompts are run in groups of similar length, padded in front; then all slots step together. An utterance that ends
leaves its slot to the next one, and when none waits, the batch shrinks.
Shapes: B slots, S prompt rows, H decoder width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import mlx.core as mx

from .batch_cache import BatchCache
from .batch_sampling import greedy_rows
from .cpu.choices import choose_rows
from .decoder import Qwen3
from .generate import Generation, GenerationOptions, known_prefix
from .prefix import PrefixCache
from .sampling import Sampler

# Padding rows of a group of prompts at most, as a part of all its rows.
_MOST_PADDING = 0.125


Prompt: TypeAlias = "tuple[mx.array, GenerationOptions] | tuple[mx.array, GenerationOptions, Callable[[], mx.array]]"
"""Rows (S, H), options, and `BatchRow.again`, if there is one."""


@dataclass
class BatchRow:
    """One utterance of a batch, and what came of it.

    Args:
        number: Its place among the prompts.
        inputs_embeds: Prompt rows (S, H).
        options: When to stop and how to choose.
        again: Makes the prompt anew, without what was computed for several at once, should it have to be run alone.
            None where the prompt was made so.

    Attributes:
        tokens: The ids so far.
        finish_reason: None while running, then ``stop`` or ``length``, as in `generate.Generation`.
        prefill_seconds: Its share of the time that its group of prompts took.
        decode_seconds: Its shares of the steps' time.
        decoder_passes: Passes that it took part in, after the prefill.
        alone: Whether it was decoded anew by itself, because rounding may have chosen one of its tokens.
    """

    number: int
    inputs_embeds: mx.array
    options: GenerationOptions
    again: Callable[[], mx.array] | None = None
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decoder_passes: int = 0
    alone: bool = False
    sampler: Sampler | None = None

    def push(self, token: int) -> None:
        """Take the next token, which may end the text."""
        if token in self.options.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.options.max_tokens:
            self.finish_reason = "length"
        else:
            self.tokens.append(token)


class BatchGeneration:
    """Runs of the decoder side by side. Iterate over it for rows as they end.

    In float32 a row gets the very tokens that `Generation` gives it: where a choice is so close that the rounding of a
    product over several rows may have decided it, the row is decoded anew alone. In bfloat16 rounding is as large as
    many a choice, and rows may differ from single runs as they do between devices.

    Drawn tokens (temperature above 0) are those of the single run too, if a seed is given; a close choice is not
    looked for there.

    Args:
        decoder: The language model.
        prompts: Prompt rows (S, H), S ≥ 1, and options of each utterance; taken one by one as slots become free. The
            longest ones had better come first: later ones then fit in without moving what is held.
        batch_size: Slots.
        prefix: Token ids of the text that all prompts begin with.
        prefixes: Where its keys and values are kept; without, they are computed with the rest of each prompt.

    Attributes:
        decoder_passes: Steps of the decoder, after the prefills.
        redone: Rows that were decoded anew alone.

    Raises:
        ValueError: If there is no slot; on iteration, if a prompt is empty or does not fit into the model's context, or
            keys and values are to be quantised.
    """

    def __init__(
        self,
        decoder: Qwen3,
        prompts: Iterable[Prompt],
        batch_size: int = 8,
        *,
        prefix: Sequence[int] = (),
        prefixes: PrefixCache | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"[BatchGeneration] batch_size must be at least 1 but got {batch_size}")
        self.decoder_passes = 0
        self.redone = 0
        self._decoder = decoder
        self._waiting = (BatchRow(i, *prompt) for i, prompt in enumerate(prompts))
        self._batch_size = batch_size
        self._prefix = tuple(prefix)
        self._prefixes = prefixes
        self._at_once = decoder.computes_at_once
        self._exact = decoder.model.norm.weight.dtype == mx.float32
        self._slots: list[BatchRow | None] = []
        self._cache = BatchCache(len(decoder.model.layers), [0])

    def __iter__(self) -> Iterator[BatchRow]:
        """Yield rows in the order in which they end; can be done once."""
        yield from self._fill()
        while any(self._slots):
            yield from self._step()
            if not all(self._slots):
                yield from self._fill()
                self._shrink()

    def _fill(self) -> Iterator[BatchRow]:
        """Give the free slots to those who wait; yield who ends with the first token."""
        while True:
            free = len(self._slots) - sum(row is not None for row in self._slots) if self._slots else self._batch_size
            coming = [row for _, row in zip(range(free), self._waiting, strict=False)]
            if not coming:
                return
            if not self._slots:
                self._slots = [None] * len(coming)
                self._cache = BatchCache(len(self._decoder.model.layers), [0] * len(coming))
            for group in _groups(coming):
                yield from self._prefill(group)

    def _prefill(self, group: list[BatchRow]) -> Iterator[BatchRow]:
        """Run the prompts of a group together, choose first tokens and give out slots."""
        start = time.perf_counter()
        for row in group:
            Generation(self._decoder, row.inputs_embeds, row.options)  # refuses what does not fit
            if row.options.kv_bits is not None:
                raise ValueError(f"[BatchGeneration] kv_bits must be None but got {row.options.kv_bits}")
        shared, known = len(self._prefix), []
        if self._prefixes is None or not 0 < shared < min(row.inputs_embeds.shape[0] for row in group):
            shared = 0
        else:
            known = known_prefix(self._decoder, group[0].inputs_embeds[:shared], self._prefix, self._prefixes)
        prompts = [row.inputs_embeds[shared:] for row in group]
        longest = max(prompt.shape[0] for prompt in prompts)
        padding = [longest - prompt.shape[0] for prompt in prompts]
        inputs = mx.stack([mx.pad(prompt, [(n, 0), (0, 0)]) for n, prompt in zip(padding, prompts, strict=True)])
        cache = BatchCache(len(self._decoder.model.layers), padding, step=shared + longest, prefix=known)
        hidden = inputs[:, :0]
        chunk = max(1, min(row.options.prefill_chunk for row in group))
        for first in range(0, longest, chunk):
            rows = inputs[:, first : first + chunk]
            hidden = self._decoder.hidden(rows, cache.layers, cache.mask(rows.shape[1]))
            cache.advance(rows.shape[1])
            mx.eval(hidden, cache.state)
        tokens, doubts = self._choose(group, self._decoder.logits(hidden[:, -1]))
        for row in group:
            row.prefill_seconds = (time.perf_counter() - start) / len(group)
        for place, (row, token, doubt) in enumerate(zip(group, tokens, doubts, strict=True)):
            self._push(row, token, doubt)
            if row.finish_reason is not None:
                yield row
                continue
            slot = self._slots.index(None)
            self._slots[slot] = row
            self._cache.place(slot, cache, place)
        mx.eval(self._cache.state)

    def _step(self) -> Iterator[BatchRow]:
        """Run the last token of every slot and choose the next; yield who ends."""
        start = time.perf_counter()
        last = mx.array([[row.tokens[-1] if row else 0] for row in self._slots])
        self._cache.trim()
        hidden = self._decoder.hidden(self._decoder.embed(last), self._cache.layers, self._cache.mask(1))
        self._cache.advance(1)
        self.decoder_passes += 1
        tokens, doubts = self._choose(self._slots, self._decoder.logits(hidden[:, -1]))
        running = [row for row in self._slots if row is not None]
        seconds = time.perf_counter() - start
        for slot, (row, token, doubt) in enumerate(zip(self._slots, tokens, doubts, strict=True)):
            if row is None:
                continue
            row.decode_seconds += seconds / len(running)
            row.decoder_passes += 1
            self._push(row, token, doubt)
            if row.finish_reason is not None:
                self._slots[slot] = None
                self._cache.release(slot)
                yield row

    def _choose(self, rows: list[BatchRow] | list[BatchRow | None], logits: mx.array) -> tuple[list[int], list[bool]]:
        """Choose the next token of each row from logits (B, V), and say which choices rounding may have made."""
        some = next(row for row in rows if row is not None)
        histories = [row.tokens if row else [] for row in rows]
        options = [(row or some).options.sampling for row in rows]
        if self._at_once and logits.dtype == mx.float32:
            tokens, doubts = choose_rows(logits, histories, options)
        else:
            ids, near = greedy_rows(logits, histories, options)
            mx.eval(ids, near)
            tokens, doubts = ids.tolist(), near.tolist()  # type: ignore[assignment]
        for place, (row, option) in enumerate(zip(rows, options, strict=True)):
            if row is not None and option.temperature > 0:
                row.sampler = row.sampler or Sampler(option)
                tokens[place], doubts[place] = row.sampler.choose(logits[place], row.tokens), False
        return tokens, doubts

    def _push(self, row: BatchRow, token: int, doubt: bool) -> None:
        if not doubt or not self._exact:
            row.push(token)
            return
        start = time.perf_counter()
        rows = row.inputs_embeds if row.again is None else row.again()
        mx.eval(rows)
        single = Generation(self._decoder, rows, row.options, prefix=self._prefix, prefixes=self._prefixes)
        row.prefill_seconds += time.perf_counter() - start
        row.tokens, row.alone = list(single), True
        row.finish_reason = single.finish_reason
        row.prefill_seconds += single.prefill_seconds
        row.decode_seconds += single.decode_seconds
        row.decoder_passes += single.decoder_passes
        self.redone += 1

    def _shrink(self) -> None:
        """Leave out empty slots once they are half of all: less to compute, but what is held is copied."""
        running = [slot for slot, row in enumerate(self._slots) if row is not None]
        if running and 2 * len(running) <= len(self._slots):
            self._cache.keep(running)
            self._slots = [self._slots[slot] for slot in running]
        elif not running:
            self._slots = []


def _groups(rows: list[BatchRow]) -> Iterator[list[BatchRow]]:
    """Part prompts into groups that are run together: of similar length, and no more rows than a chunk of one."""
    group: list[BatchRow] = []
    for row in sorted(rows, key=lambda row: -row.inputs_embeds.shape[0]):
        longer = [*group, row]
        size = len(longer) * longer[0].inputs_embeds.shape[0]
        real = sum(one.inputs_embeds.shape[0] for one in longer)
        if group and (size > row.options.prefill_chunk or size - real > _MOST_PADDING * size):
            yield group
            longer = [row]
        group = longer
    if group:
        yield group
