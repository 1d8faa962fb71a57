"""A tensor in a file that is read only when asked for, whole or in blocks.

Both readers (`torch_zip`, `safetensors_file`) hand out `TensorRef`; conversion works on its
blocks, so its memory is bounded by the block size and not by the largest tensor.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError

# Names as in the safetensors format. bfloat16 has no numpy type and travels as 16-bit integers.
_DTYPES: dict[str, tuple[str, mx.Dtype]] = {
    "F64": ("<f8", mx.float64),
    "F32": ("<f4", mx.float32),
    "F16": ("<f2", mx.float16),
    "BF16": ("<u2", mx.bfloat16),
    "I64": ("<i8", mx.int64),
    "I32": ("<i4", mx.int32),
    "I16": ("<i2", mx.int16),
    "I8": ("|i1", mx.int8),
    "U64": ("<u8", mx.uint64),
    "U32": ("<u4", mx.uint32),
    "U16": ("<u2", mx.uint16),
    "U8": ("|u1", mx.uint8),
    "BOOL": ("|b1", mx.bool_),
}
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_NAMES = {mlx: name for name, (_, mlx) in _DTYPES.items()}


def item_size(dtype: str) -> int:
    """Return the bytes of one element of a type named as in safetensors (``"BF16"``: 2).

    Raises:
        ValueError: If the type is not one that can be read.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"[item_size] dtype must be one of {', '.join(_DTYPES)} but got {dtype!r}")
    return _DTYPES[dtype][1].size


def mlx_dtype(dtype: str) -> mx.Dtype:
    """Return the MLX type for a safetensors type name."""
    return _DTYPES[dtype][1]


def dtype_name(dtype: mx.Dtype) -> str:
    """Return the safetensors type name for an MLX type."""
    return _NAMES[dtype]


def map_file(path: Path) -> mmap.mmap:
    """Map a whole file read-only; the pages are read as they are touched.

    Raises:
        CheckpointError: If the file cannot be opened or is empty.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:  # mmap's word for an empty file
        raise CheckpointError(f"{path}: the file is empty; download or copy it again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


@dataclass(frozen=True, eq=False)
class TensorRef:
    """Where one tensor lies, with its shape and type; nothing is read until `read` or `blocks`.

    Args:
        name: The tensor's name in its file.
        shape: Sizes, row-major.
        dtype: Element type, named as in safetensors (``F32``, ``BF16``, ...).
        file: The file it lies in, for messages.
        buffer: The mapped file.
        start: First byte of the storage in `buffer`.
        storage_items: Elements in the storage.
        offset: First element of the tensor within the storage.
        strides: Elements from one index to the next, per axis; None means row-major without gaps.

    Raises:
        CheckpointError: If the tensor does not lie inside its storage, or its storage not in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    buffer: Any = field(repr=False)
    start: int = field(repr=False)
    storage_items: int = field(repr=False)
    offset: int = field(default=0, repr=False)
    strides: tuple[int, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise self._error(f"its type {self.dtype!r} cannot be read (known: {', '.join(_DTYPES)})")
        for what, values in (("shape", self.shape), ("strides", self.strides or ())):
            # MLX counts sizes in 32 bits, and numpy's strides in bytes must fit 64.
            if not all(type(v) is int and 0 <= v < 2**31 for v in values):
                raise self._error(f"its {what} {_short(values)} must hold integers from 0 to 2**31 - 1")
        if type(self.offset) is not int or self.offset < 0:
            raise self._error(f"its storage offset must be at least 0 but is {self.offset}")
        if len(self.shape) > 32:
            raise self._error(f"it has {len(self.shape)} axes; at most 32 can be read")
        if self.strides is not None and len(self.strides) != len(self.shape):
            raise self._error(f"it has {len(self.shape)} sizes but {len(self.strides)} strides")
        end = self.start + self.storage_items * item_size(self.dtype)
        if self.start < 0 or self.storage_items < 0 or end > len(self.buffer):
            raise self._error(f"its storage ends at byte {end} of a file of {len(self.buffer)} bytes; is it truncated?")
        # An expanded view could claim terabytes from a few bytes: memory stays bounded by the file.
        if self.size > self.storage_items:
            raise self._error(f"it claims {self.size} elements of a storage that holds {self.storage_items}")
        if self.size:
            last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self._steps, strict=True))
            if last >= self.storage_items:
                raise self._error(f"it reaches element {last} of a storage that holds {self.storage_items}")

    def _error(self, rule: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: tensor {self.name!r}: {rule}")

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, without gaps."""
        return self.size * item_size(self.dtype)

    @property
    def _dense(self) -> tuple[int, ...]:
        return tuple(prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))

    @property
    def _steps(self) -> tuple[int, ...]:
        return self._dense if self.strides is None else self.strides

    def _view(self) -> np.ndarray[Any, Any]:
        """Return the tensor as a numpy view of the mapped file; no page is touched."""
        numpy_dtype = np.dtype(_DTYPES[self.dtype][0])
        if self.size == 0:
            return np.zeros(self.shape, numpy_dtype)
        first = self.start + self.offset * numpy_dtype.itemsize
        steps = tuple(step * numpy_dtype.itemsize for step in self._steps)
        # The constructor of ndarray checks the bounds once more against the buffer.
        return np.ndarray(self.shape, numpy_dtype, self.buffer, first, steps)

    def _to_mlx(self, view: np.ndarray[Any, Any]) -> mx.array:
        dtype = _DTYPES[self.dtype][1]
        if dtype == mx.bfloat16:
            return mx.array(view).view(mx.bfloat16, stream=mx.cpu)
        return mx.array(view, dtype=dtype)

    def read(self) -> mx.array:
        """Read the whole tensor in its own type."""
        return self._to_mlx(self._view())

    def rows(self, chosen: list[int]) -> mx.array:
        """Read some indices of the first axis, in their order, and nothing else of the file."""
        return self._to_mlx(np.ascontiguousarray(self._view()[chosen]))

    def blocks(self, max_bytes: int = 1 << 22) -> Iterator[mx.array]:
        """Yield the elements in row-major order as flat arrays of about `max_bytes` each.

        Pages of the file are given back after each block, so that reading a file larger than
        memory does not fill it. A row of the first axis is never split unless the tensor is dense.
        """
        view = self._view()
        if self.size and (self.strides is None or self.strides == self._dense):
            view = view.reshape(-1)
        if view.ndim == 0 or self.size == 0:
            view = view.reshape(-1)
        rows = max(1, max_bytes // max(1, view[:1].nbytes))
        for first in range(0, len(view), rows):
            yield self._to_mlx(np.ascontiguousarray(view[first : first + rows]).reshape(-1))
            self._release()

    def _release(self) -> None:
        if isinstance(self.buffer, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            first = self.start // mmap.PAGESIZE * mmap.PAGESIZE
            end = self.start + self.storage_items * item_size(self.dtype)
            if end > first:
                self.buffer.madvise(mmap.MADV_DONTNEED, first, end - first)


def to_bytes(array: mx.array) -> memoryview:
    """Return the elements of a flat array as bytes, in the machine's (little-endian) order."""
    flat = array.reshape(-1)
    return np.array(flat.view(mx.uint8, stream=mx.cpu), copy=False).data if flat.size else memoryview(b"")


def _short(values: tuple[object, ...]) -> str:
    text = ", ".join(str(v) if type(v) is int else type(v).__name__ for v in values[:8])
    return f"({text}{', ...' if len(values) > 8 else ''})"
