"""Key and value caches of the decoder, one per layer, grown in steps and never copied per token.

Shapes: B batch, G key/value heads, S positions, E head width.
"""

from __future__ import annotations

import mlx.core as mx

KeysValues = tuple[mx.array, mx.array]


class _Rows:
    """A buffer (B, G, room, N) that rows are written into."""

    def __init__(self, step: int, capacity: int) -> None:
        self.step = step
        self.capacity = capacity
        self.array: mx.array | None = None

    def write(self, rows: mx.array, first: int) -> mx.array:
        """Put rows (B, G, S, N) behind the `first` ones and return all of them."""
        last = first + rows.shape[2]
        if self.array is None:
            self.array = self._empty(rows, max(last, self.capacity))
        elif last > self.array.shape[2]:
            more = self._empty(rows, last - self.array.shape[2])
            self.array = mx.concatenate([self.array, more], axis=2)
        self.array[:, :, first:last] = rows
        return self.array[:, :, :last]

    def _empty(self, like: mx.array, positions: int) -> mx.array:
        room = -(-positions // self.step) * self.step
        return mx.zeros((*like.shape[:2], room, like.shape[3]), dtype=like.dtype)


class KVCache:
    """Keys and values of the positions that one layer has seen.

    Args:
        step: Positions by which the buffers grow; what lies beyond `offset` is spare room.
        capacity: Positions that will be held, where that is known: so many are never moved.
    """

    def __init__(self, step: int = 256, capacity: int = 0) -> None:
        if step < 1:
            raise ValueError(f"[{type(self).__name__}] step must be at least 1 but got {step}")
        if capacity < 0:
            raise ValueError(f"[{type(self).__name__}] capacity must not be negative but got {capacity}")
        self.step = step
        self.offset = 0
        self._fits: tuple[int, ...] | None = None
        self._buffers = [_Rows(step, capacity) for _ in range(self._arrays)]

    _arrays = 2

    def update(self, keys: mx.array, values: mx.array) -> KeysValues:
        """Append keys and values (B, G, S, E) and return all that is held, (B, G, offset, E) each.

        Raises:
            ValueError: If batch, heads or width differ from what is held.
        """
        fits = (keys.shape[0], keys.shape[1], keys.shape[3])
        if self._fits not in (None, fits):
            raise ValueError(f"[{type(self).__name__}] keys must fit {self._fits} (batch, heads, width) but got {fits}")
        held = self._write(keys, values)
        self._fits = fits
        self.offset += keys.shape[2]
        return held

    def _write(self, keys: mx.array, values: mx.array) -> KeysValues:
        own_keys, own_values = self._buffers
        return own_keys.write(keys, self.offset), own_values.write(values, self.offset)

    def claim(self, items: int, count: int) -> tuple[list[mx.array], int] | None:
        """Append `count` positions for who writes them in place, which MLX does not see.

        Args:
            items: B.
            count: S.

        Returns:
            The buffers (B, G, room, E) of keys and values, and the first position to write; None if there is no such
            room, or they hold codes.
        """
        shapes = [buffer.array.shape if buffer.array is not None else (0, 0, 0) for buffer in self._buffers]
        fits = all(shape[0] == items and self.offset + count <= shape[2] for shape in shapes)
        if not fits or self._arrays != KVCache._arrays:
            return None
        self.offset += count
        return self.state, self.offset - count

    def trim(self, count: int) -> None:
        """Forget the last `count` positions.

        Raises:
            ValueError: If fewer than `count` positions are held.
        """
        if not 0 <= count <= self.offset:
            raise ValueError(f"[{type(self).__name__}] count must lie in 0..{self.offset} but got {count}")
        self.offset -= count

    @property
    def begun(self) -> bool:
        """Whether anything is held."""
        return self.offset > 0

    @property
    def state(self) -> list[mx.array]:
        """The buffers, for `mx.eval`."""
        return [buffer.array for buffer in self._buffers if buffer.array is not None]


class QuantizedKVCache(KVCache):
    """A cache that holds codes: with 8 bits a little over a quarter of float32's memory, half of bfloat16's.

    Each position is quantised once, when it comes, in groups along the head. All of one layer are turned back into
    numbers when that layer needs them, which costs time: it is for long recordings where memory is short.

    Args:
        bits: Bits per number.
        step: As in `KVCache`.
        capacity: As in `KVCache`.
    """

    _arrays = 6

    def __init__(self, bits: int = 8, step: int = 256, capacity: int = 0) -> None:
        super().__init__(step, capacity)
        if bits not in (4, 8):
            raise ValueError(f"[QuantizedKVCache] bits must be 4 or 8 but got {bits}")
        self.bits = bits

    def _write(self, keys: mx.array, values: mx.array) -> KeysValues:
        width = keys.shape[3]
        group = 64 if width % 64 == 0 else 32
        if width % group:
            raise ValueError(f"[QuantizedKVCache] head width must be a multiple of 32 but got {width}")
        held = []
        for rows, buffers in ((keys, self._buffers[:3]), (values, self._buffers[3:])):
            parts = mx.quantize(rows, group, self.bits)
            codes, scales, biases = (b.write(part, self.offset) for b, part in zip(buffers, parts, strict=True))
            held.append(mx.dequantize(codes, scales, biases, group_size=group, bits=self.bits))
        return held[0], held[1]
