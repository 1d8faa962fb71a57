"""Keys and values of utterances that are decoded side by side, each in a slot that the next one may take over.

All slots share their columns: a new position is written behind the others for all of them at once, so a row begins at
the column that lets it end where the rest end, and what lies before it is hidden. Rotary positions count from each
row's own beginning, as they do when it is decoded alone.
Shapes: B slots, G key/value heads, S positions, J columns, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .cache import KeysValues


class Columns:
    """Which columns are whose; shared by the layers of a cache.

    Args:
        starts: The column at which the row of each slot begins.
        step: Columns by which the buffers grow.

    Attributes:
        starts: As above.
        length: Columns in use.
    """

    def __init__(self, starts: Sequence[int], step: int) -> None:
        if not starts or min(starts) < 0:
            raise ValueError(f"[BatchCache] starts must be columns, one at least, but got {list(starts)}")
        if step < 1:
            raise ValueError(f"[BatchCache] step must be at least 1 but got {step}")
        self.starts = list(starts)
        self.length = 0
        self.step = step
        self._positions: tuple[tuple[int, ...], int | mx.array] | None = None

    def room(self, columns: int) -> int:
        """Return how many columns the buffers get that must hold so many."""
        return -(-columns // self.step) * self.step

    def positions(self) -> int | mx.array:
        """Return the rotary position of the next column: one for all, or one for each slot, (B,), int32."""
        places = tuple(self.length - start for start in self.starts)
        if self._positions is None or self._positions[0] != places:
            value = places[0] if len(set(places)) == 1 else mx.array(places, dtype=mx.int32)
            self._positions = places, value  # one array for all layers
        return self._positions[1]


class SlotLayer:
    """The buffers of one layer, as `decoder.LayerCache` wants them."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def offset(self) -> int | mx.array:
        """Rotary position of the next row, or one for each slot where they differ."""
        return self._columns.positions()

    @property
    def begun(self) -> bool:
        """Whether anything is held."""
        return self.keys is not None

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write keys and values (B, G, S, E) behind the others and return all columns, (B, G, J, E) each.

        Raises:
            ValueError: If there are more or fewer than B.
        """
        columns = self._columns
        if keys.shape[0] != len(columns.starts):
            raise ValueError(f"[BatchCache] keys must be of {len(columns.starts)} slots but got {keys.shape[0]}")
        first, last = columns.length, columns.length + keys.shape[2]
        room = columns.room(last)
        if self.keys is None or self.values is None:
            self.keys, self.values = _zeros(keys, room), _zeros(values, room)
        elif self.keys.shape[2] < last:
            more = room - self.keys.shape[2]
            self.keys = mx.concatenate([self.keys, _zeros(keys, more)], axis=2)
            self.values = mx.concatenate([self.values, _zeros(values, more)], axis=2)
        self.keys[:, :, first:last] = keys
        self.values[:, :, first:last] = values
        return self.keys[:, :, :last], self.values[:, :, :last]

    def claim(self, items: int, count: int) -> tuple[list[mx.array], int] | None:
        """Return the buffers of keys and values, and the first of the next `count` columns, to be written in place.

        MLX does not see that. None if there are no such columns for so many items yet. As with `update`,
        `BatchCache.advance` counts them.
        """
        if self.keys is None or self.values is None:
            return None
        first, shape = self._columns.length, self.keys.shape
        return ([self.keys, self.values], first) if shape[0] == items and first + count <= shape[2] else None


class BatchCache:
    """One cache for all layers of a batch.

    Args:
        layers: Layers of the decoder.
        starts: The column at which the row of each slot begins; for a prompt that is padded in front, its padding.
        step: Columns by which the buffers grow.
        prefix: Keys and values (1, G, S, E) of each layer that all rows begin with; their columns come first, before
            the padding. A cache with such is there to be filled and placed from, not to be changed otherwise.

    Attributes:
        layers: What `decoder.Qwen3.hidden` takes as its cache.
    """

    def __init__(self, layers: int, starts: Sequence[int], step: int = 256, prefix: Sequence[KeysValues] = ()) -> None:
        self._columns = Columns(starts, step)
        self.layers = [SlotLayer(self._columns) for _ in range(layers)]
        self._shared = prefix[0][0].shape[2] if prefix else 0
        self._columns.length = self._shared
        for layer, (keys, values) in zip(self.layers, prefix, strict=False):
            layer.keys, layer.values = mx.repeat(keys, len(starts), axis=0), mx.repeat(values, len(starts), axis=0)

    @property
    def starts(self) -> list[int]:
        """The column at which the row of each slot begins."""
        return self._columns.starts

    @property
    def length(self) -> int:
        """Columns in use."""
        return self._columns.length

    def mask(self, rows: int) -> mx.array | None:
        """Return which columns are real for each slot, those of `rows` new positions included: (B, J + rows), bool.

        None where all are.
        """
        if not any(self.starts):
            return None
        index = mx.arange(self.length + rows)[None]
        own = index >= mx.array(self.starts)[:, None] + self._shared
        return own | (index < self._shared) if self._shared else own

    def advance(self, rows: int) -> None:
        """Count the columns that a pass has written."""
        self._columns.length += rows

    def place(self, slot: int, other: BatchCache, row: int) -> None:
        """Let a slot hold what a row of another cache holds; whatever was in the slot is forgotten.

        A row that is longer than the columns in use moves them, which copies everything.
        """
        count = other.length - other.starts[row]
        if count > self.length:
            self._shift(count - self.length)
        first = self.length - count
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            assert theirs.keys is not None
            assert theirs.values is not None
            keys = other.held(theirs.keys, row)
            values = other.held(theirs.values, row)
            if mine.keys is None or mine.values is None:
                shape = (len(self.starts), keys.shape[1], self._columns.room(self.length), keys.shape[3])
                mine.keys, mine.values = mx.zeros(shape, dtype=keys.dtype), mx.zeros(shape, dtype=values.dtype)
            mine.keys[slot : slot + 1, :, first : self.length] = keys
            mine.values[slot : slot + 1, :, first : self.length] = values
        self.starts[slot] = first

    def held(self, buffer: mx.array, row: int) -> mx.array:
        """Return the columns of a row in a layer's keys or values: (1, G, columns, E)."""
        first, last, shared = self.starts[row], self.length, self._shared
        if not first or not shared:
            return buffer[row : row + 1, :, first:last]
        parts = [buffer[row : row + 1, :, :shared], buffer[row : row + 1, :, shared + first : last]]
        return mx.concatenate(parts, axis=2)

    def release(self, slot: int) -> None:
        """Forget what a slot holds: from here on it sees nothing but its own new columns."""
        self.starts[slot] = self.length

    def keep(self, slots: Sequence[int]) -> None:
        """Keep only these slots, in this order."""
        index = mx.array(list(slots))
        for layer in self.layers:
            if layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys[index], layer.values[index]
        self._columns.starts = [self.starts[slot] for slot in slots]

    def trim(self) -> None:
        """Drop columns before all rows, once the buffers are full: they would only be grown for them."""
        dead = min(self.starts)
        if not dead or self.length % self._columns.step:
            return
        for layer in self.layers:
            if layer.keys is not None and layer.values is not None:
                # Copied, or the view would keep the whole buffer.
                layer.keys = mx.contiguous(layer.keys[:, :, dead : self.length])
                layer.values = mx.contiguous(layer.values[:, :, dead : self.length])
        self._columns.starts = [start - dead for start in self.starts]
        self._columns.length -= dead

    @property
    def state(self) -> list[mx.array]:
        """The buffers, for `mx.eval`."""
        return [x for layer in self.layers for x in (layer.keys, layer.values) if x is not None]

    def _shift(self, columns: int) -> None:
        """Put columns before all others."""
        room = self._columns.room(self.length + columns) - self.length - columns
        for layer in self.layers:
            for name in ("keys", "values"):
                held = getattr(layer, name)
                if held is not None:
                    parts = [_zeros(held, columns), held[:, :, : self.length], _zeros(held, room)]
                    setattr(layer, name, mx.concatenate(parts, axis=2))
        self._columns.starts = [start + columns for start in self.starts]
        self._columns.length += columns


def _zeros(like: mx.array, columns: int) -> mx.array:
    return mx.zeros((*like.shape[:2], columns, like.shape[3]), dtype=like.dtype)
