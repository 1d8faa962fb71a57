"""MLX arrays as bytes, and back."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from .engine_library import INPUT, METADATA, VECTOR_ALIGNMENT, Buffer

NUMPY = {
    mx.bool_: np.dtype(np.bool_),
    mx.int8: np.dtype(np.int8),
    mx.int16: np.dtype(np.int16),
    mx.int32: np.dtype(np.int32),
    mx.int64: np.dtype(np.int64),
    mx.uint8: np.dtype(np.uint8),
    mx.uint16: np.dtype(np.uint16),
    mx.uint32: np.dtype(np.uint32),
    mx.uint64: np.dtype(np.uint64),
    mx.float16: np.dtype(np.float16),
    mx.bfloat16: np.dtype(np.uint16),  # NumPy has none: its bits
    mx.float32: np.dtype(np.float32),
}


def check_dtype(dtype: mx.Dtype) -> None:
    """Raise TypeError for element types that kernels cannot have here."""
    if dtype not in NUMPY:
        raise TypeError(f"[metal_host] arrays should be of a type that Metal has and NumPy or bfloat16 but got {dtype}")


def in_place(array: mx.array) -> np.ndarray:
    """Return the array's memory as NumPy sees it, strides and all; bfloat16 as uint16."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.array(array, copy=False)


@functools.cache
def _allocation_remainder() -> int:
    """Where MLX's fresh arrays begin, modulo 16: an array's own remainder less this is its offset's."""
    return _address(in_place(mx.ones((64,)))) % VECTOR_ALIGNMENT


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def _row_contiguous(array: np.ndarray) -> bool:
    """As MLX has it: axes of one element do not count."""
    return bool(array.flags.c_contiguous)


def input_buffers(
    name: str, array: mx.array, poison: int, *, ensure_row_contiguous: bool, shape: bool, strides: bool, ndim: bool
) -> list[Buffer]:
    """Lay out an input, and the shape, strides and rank that its kernel asks for.

    A strided input keeps its strides. The memory between its elements, which belongs to other arrays, holds poison.

    Args:
        name: Of the parameter.
        array: The input.
        poison: Byte to fill gaps with.
        ensure_row_contiguous: Whether MLX would make strided inputs contiguous first.
        shape: Whether the kernel has a parameter ``name_shape``.
        strides: Whether it has ``name_strides``.
        ndim: Whether it has ``name_ndim``.

    Returns:
        One to four buffers, in the order of the parameters.
    """
    check_dtype(array.dtype)
    values = in_place(array)
    if ensure_row_contiguous and not _row_contiguous(values):
        values = np.ascontiguousarray(values)
        misalignment = 0
    else:
        misalignment = (_address(values) - _allocation_remainder()) % VECTOR_ALIGNMENT
    steps = [(size - 1) * stride for size, stride in zip(values.shape, values.strides, strict=True) if size]
    low, high = sum(step for step in steps if step < 0), sum(step for step in steps if step > 0)
    extent = high - low + values.itemsize if values.size else 0
    content = np.full(extent, poison, np.uint8)
    if values.size:
        np.ndarray(values.shape, values.dtype, content, -low, values.strides)[...] = values
    buffers = [Buffer(name, INPUT, content, -low, values.itemsize, misalignment)]
    if array.ndim == 0:
        return buffers
    element_strides = [stride // values.itemsize for stride in values.strides]
    if shape:
        buffers.append(metadata(name, values.shape, np.int32))
    if strides:
        buffers.append(metadata(name, element_strides, np.int64))
    if ndim:
        buffers.append(metadata(name, [values.ndim], np.int32))
    return buffers


def metadata(name: str, numbers: Sequence[int], dtype: type) -> Buffer:
    """Lay out an array's shape, strides or rank."""
    content = np.array(numbers, dtype)
    return Buffer(name, METADATA, content.view(np.uint8), item_bytes=content.itemsize)


def from_bytes(content: np.ndarray, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """Make an MLX array of a kernel's output."""
    if dtype == mx.bool_:
        content = (content != 0).astype(np.bool_)
    values = mx.array(content.view(NUMPY[dtype]).reshape(tuple(shape)))
    return values.view(mx.bfloat16) if dtype == mx.bfloat16 else values


def filled(shape: Sequence[int], dtype: mx.Dtype, value: float | None, poison: int) -> np.ndarray:
    """Return the bytes of a fresh output: `value` in every element, or poison where MLX would leave it as it comes."""
    check_dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    if value is None:
        return np.full(count * dtype.size, poison, np.uint8)
    return np.ascontiguousarray(in_place(mx.full((count,), value, dtype=dtype))).view(np.uint8).copy()
