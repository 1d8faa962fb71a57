"""Key and value cache of the decoder, one per layer, grown in steps and never copied per token.

Shapes: B batch, G key/value heads, S positions, E head width.
"""

from __future__ import annotations

import mlx.core as mx


class KVCache:
    """Keys and values of the positions that one layer has seen.

    Args:
        step: Positions by which the buffers grow; what lies beyond `offset` is spare room.
    """

    def __init__(self, step: int = 256) -> None:
        if step < 1:
            raise ValueError(f"[KVCache] step must be at least 1 but got {step}")
        self.step = step
        self.offset = 0
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values (B, G, S, E) and return all that is held, (B, G, offset, E) each.

        Raises:
            ValueError: If batch, heads or width differ from what is held.
        """
        new = self.offset + keys.shape[2]
        if self._keys is None or self._values is None:
            capacity = -(-new // self.step) * self.step
            self._keys = _room(keys, capacity)
            self._values = _room(values, capacity)
        elif _sizes(keys) != _sizes(self._keys):
            raise ValueError(
                f"[KVCache] keys must fit {_sizes(self._keys)} (batch, heads, width) but got {_sizes(keys)}"
            )
        elif new > self._keys.shape[2]:
            grow = -(-(new - self._keys.shape[2]) // self.step) * self.step
            self._keys = mx.concatenate([self._keys, _room(keys, grow)], axis=2)
            self._values = mx.concatenate([self._values, _room(values, grow)], axis=2)
        self._keys[:, :, self.offset : new] = keys
        self._values[:, :, self.offset : new] = values
        self.offset = new
        return self._keys[:, :, :new], self._values[:, :, :new]

    def trim(self, count: int) -> None:
        """Forget the last `count` positions.

        Raises:
            ValueError: If fewer than `count` positions are held.
        """
        if not 0 <= count <= self.offset:
            raise ValueError(f"[KVCache] count must lie in 0..{self.offset} but got {count}")
        self.offset -= count

    @property
    def state(self) -> list[mx.array]:
        """The buffers, for `mx.eval`."""
        return [] if self._keys is None or self._values is None else [self._keys, self._values]


def _room(like: mx.array, positions: int) -> mx.array:
    return mx.zeros((*like.shape[:2], positions, like.shape[3]), dtype=like.dtype)


def _sizes(x: mx.array) -> tuple[int, int, int]:
    return (x.shape[0], x.shape[1], x.shape[3])
