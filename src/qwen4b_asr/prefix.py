"""What prompts have in common: keys and values of the texts that they begin with, computed once.

Shapes: G key/value heads, S positions, E head width.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from .cache import KeysValues
from .lora import lora_layers


class PrefixCache:
    """Keys and values of texts, for every layer of a decoder.

    Args:
        decoder: The module whose keys and values they are. As soon as its weights or the strengths of its adapters
            are others, all is forgotten.
        most: Texts that are kept; the one that was used longest ago goes first.
    """

    def __init__(self, decoder: nn.Module, most: int = 8) -> None:
        if most < 1:
            raise ValueError(f"[PrefixCache] most must be at least 1 but got {most}")
        self.most = most
        self._decoder = decoder
        self._weights: list[weakref.ref[Any]] = []
        self._scales: list[float] = []
        self._held: OrderedDict[tuple[int, ...], list[KeysValues]] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of texts that are kept."""
        return len(self._held)

    def get(self, ids: Sequence[int]) -> list[KeysValues] | None:
        """Return keys and values (1, G, S, E) of each layer for a text's token ids; None if they are not known."""
        self._forget_other_weights()
        found = self._held.get(tuple(ids))
        if found is not None:
            self._held.move_to_end(tuple(ids))
        return found

    def put(self, ids: Sequence[int], layers: Sequence[KeysValues]) -> None:
        """Keep keys and values (1, G, S, E) of each layer for a text's token ids."""
        self._forget_other_weights()
        self._held[tuple(ids)] = list(layers)
        while len(self._held) > self.most:
            self._held.popitem(last=False)

    def _forget_other_weights(self) -> None:
        flat: Any = tree_flatten(self._decoder.parameters())
        arrays = [array for _, array in flat]
        scales = [layer.scale(name) for layer in lora_layers(self._decoder).values() for name in layer.names]
        same = len(arrays) == len(self._weights) and scales == self._scales
        if not same or any(known() is not array for known, array in zip(self._weights, arrays, strict=True)):
            self._held.clear()
            # Weakly: what nobody uses any more must not stay in memory for this.
            self._weights, self._scales = [weakref.ref(array) for array in arrays], scales
