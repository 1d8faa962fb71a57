"""A decoder that rounds as badly as may be: whatever several rows have touched is a little wrong, and ties are many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from qwen4b_asr.cache import KVCache
from qwen4b_asr.decoder import Qwen3


class Doctored:
    """Looks like a decoder; its logits lie on a coarse grid, and noise is added to those that are not plain decoding's.

    Plain are the logits of a single row over a cache that, behind the prompt, holds rows that came one by one.

    Args:
        decoder: What is doctored.
        prompt: Rows of the prompt, which every kind of decoding may run together.
        step: Grid, as a part of the largest logit.
        noise: Largest error, as a part of the largest logit.
        always: Add it to plain logits, too.
    """

    def __init__(self, decoder: Qwen3, prompt: int, *, step: float, noise: float, always: bool = False) -> None:
        self.config = decoder.config
        self.model = decoder.model
        self.embed = decoder.embed
        self.computes_at_once = decoder.computes_at_once
        self.parameters = decoder.parameters
        self.rows: dict[int, list[int]] = {}  # by cache: with how many rows each position came
        self.most_held = 0
        self._decoder = decoder
        self._prompt, self._step, self._noise = prompt, step, noise
        self._plain, self._always = True, always
        self._passes = 0

    def hidden(self, inputs_embeds: mx.array, cache: Sequence[KVCache], mask: Any = None) -> mx.array:
        """Run the layers and note how the cache came to be."""
        count = inputs_embeds.shape[1]
        came = self.rows.setdefault(id(cache[0]), [])
        del came[cache[0].offset :]
        came += [count] * count
        hidden = self._decoder.hidden(inputs_embeds, cache, mask)
        assert len(came) == cache[0].offset
        self.most_held = max(self.most_held, len(came))
        self._plain = all(rows == 1 for rows in came[self._prompt :])
        return hidden

    def logits(self, hidden: mx.array) -> mx.array:
        """Score the vocabulary, wrongly."""
        self._passes += 1
        logits = self._decoder.logits(hidden)
        largest = mx.max(mx.abs(logits), axis=-1, keepdims=True)
        grid = self._step * largest
        logits = mx.round(logits / grid) * grid
        if self._always or not self._plain:
            key = mx.random.key(self._passes)
            logits = logits + mx.random.uniform(-1, 1, logits.shape, key=key) * self._noise * largest
        return logits
