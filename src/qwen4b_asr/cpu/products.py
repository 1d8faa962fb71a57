"""Linear layers and embeddings whose products NumPy computes, when they are called.

Shapes: R rows and C columns of a matrix, N rows of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.lib.stride_tricks import as_strided

from .._blas import numpy_blas
from ..quantization import UnpackingLinear
from .codes import can_multiply_codes, multiply_codes

# OpenBLAS's kernels for AVX2 take rows in groups: seven cost half as much again as eight, 45 a quarter more than 48;
# from some 130 on, and in small matrices, filling them up costs what it saves.
_GROUP, _MANY, _SMALL = 8, 128, 1 << 17

# Rows up to which one product is quicker than several; a prime number of numbers, so that no two columns are alike.
_JOINED, _RANDOM = 16, 65_537

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def numpy_multiplies() -> bool:
    """Whether products with float32 weights are left to NumPy: on a CPU, where its wheel brings a BLAS."""
    return mx.default_device().type == mx.DeviceType.cpu and numpy_blas() is not None


def view(x: mx.array) -> Array:
    """Return the numbers of a float32 array where they lie; MLX computes what is not."""
    return np.asarray(x)


def space(rows: int, width: int) -> Array:
    """Return room for so many rows, not filled, in full groups: (rows or a few more, width), zeros behind them."""
    room: Array = np.empty((rows + -rows % _GROUP, width), np.float32)
    room[rows:] = 0
    return room


def multiply(x: Array, weight: mx.array, bias: mx.array | None = None) -> Array:
    """Return ``x @ weight.T + bias`` for x (..., C) and weight (R, C): (..., R)."""
    y = multiply_rows(x.reshape(-1, x.shape[-1]), view(weight).T)
    if bias is not None:
        y += view(bias)
    return y.reshape(*x.shape[:-1], -1)


def multiply_rows(x: Array, matrix: Array) -> Array:
    """Return ``x @ matrix`` for x (N, C) and a matrix (C, R): (N, R)."""
    count = len(x)
    if count == 2:  # each by sgemv is still quicker than both together
        return np.stack([np.matmul(x[0], matrix), np.matmul(x[1], matrix)])
    if 2 < count < _MANY and count % _GROUP and matrix.size > _SMALL:
        filled = space(count, x.shape[1])
        filled[:count] = x
        return _multiply_groups(filled, matrix)[:count]
    if 2 < count < _MANY:
        return _multiply_groups(x, matrix)
    y: Array = np.matmul(x, matrix)
    return y


def multiply_columns(weight: mx.array, x: Array) -> Array:
    """Return ``weight @ x`` for columns x (C, N) and weight (R, C): (R, N). For a hundred or two quicker than rows."""
    y: Array = np.matmul(view(weight), x)
    return y


def can_compute(module: nn.Module, x: mx.array) -> bool:
    """Whether NumPy may compute a module's output for x: not in other types than float32, and not in training mode.

    MLX does not see what happens here, so a gradient would be zero without a word.
    """
    return x.dtype == mx.float32 and x.size > 0 and not module.training


def _multiply_groups(x: Array, matrix: Array) -> Array:
    """Return ``x @ matrix`` the way that is quicker for some rows: the matrix first if its columns lie side by side."""
    y: Array = np.matmul(matrix.T, x.T).T if matrix.flags.f_contiguous else np.matmul(x, matrix)
    return y


class NumpyLinear(nn.Linear):
    """A dense float32 layer."""

    computes_at_once = True

    def __call__(self, x: mx.array) -> mx.array:
        """Map (..., C) to (..., R)."""
        if not can_compute(self, x):
            y: mx.array = super().__call__(x)
            return y
        return mx.array(multiply(view(x), self.weight, self.get("bias")))


class NumpyEmbedding(nn.Embedding):
    """A float32 table of embeddings that scores hidden states as well."""

    computes_at_once = True

    def __call__(self, x: mx.array) -> mx.array:
        """Look up token ids (...); returns (..., C)."""
        if self.training or self.weight.dtype != mx.float32:
            y: mx.array = super().__call__(x)
            return y
        return mx.array(view(self.weight)[np.asarray(x)])

    def as_linear(self, x: mx.array) -> mx.array:
        """Map (..., C) to (..., R)."""
        if not can_compute(self, x):
            y: mx.array = super().as_linear(x)
            return y
        return mx.array(multiply(view(x), self.weight))


def project(layer: nn.Module, x: Array) -> Array:
    """Map (..., C) to (..., R) by any linear layer."""
    if type(layer) is NumpyLinear:
        return multiply(x, layer.weight, layer.get("bias"))
    return view(layer(mx.array(x)))


class Projection:
    """Linear layers that read the same rows, with the matrices as NumPy sees them.

    Asking MLX for a matrix takes some microseconds, as long as small operations do; who keeps this makes another when
    a layer or its weight is another.

    Args:
        layers: Of any kind.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        ours = all(type(layer) is NumpyLinear for layer in layers)
        self._matrices = [view(layer.weight).T for layer in layers] if ours else []
        self._whole = _as_one(self._matrices) if ours and not any("bias" in layer for layer in layers) else None

    def __call__(self, x: Array) -> Array:
        """Map rows (N, C) to what the layers give side by side, (N, R of all), bit for bit what each gives alone."""
        if self._whole is not None and self._joins(len(x)):
            return multiply_rows(x, self._whole)
        if self._matrices:
            outputs = [multiply_rows(x, matrix) for matrix in self._matrices]
            for y, layer in zip(outputs, self._layers, strict=True):
                if "bias" in layer:
                    y += view(layer.bias)
        else:
            outputs = [project(layer, x) for layer in self._layers]
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs, axis=1)

    def _joins(self, rows: int) -> bool:
        widths = tuple(matrix.shape[1] for matrix in self._matrices)
        return len(widths) == 1 or joins_exactly(len(self._matrices[0]), widths, rows)


def joins_exactly(inputs: int, outputs: tuple[int, ...], rows: int) -> bool:
    """Whether a few rows times matrices (C, R) side by side give the bits that they give times each.

    A BLAS cuts up outputs among its threads and into blocks, and adds up what is left over from a block in another
    order. For which widths nothing is left over depends on the BLAS, the processor and the number of threads, so it is
    tried, once for all matrices of the same shapes. For many rows the answer is no: there one call more costs nothing.

    Args:
        inputs: C.
        outputs: R of each.
        rows: N.
    """
    if rows > _JOINED:
        return False
    if rows < 3:
        return _same_bits(inputs, outputs, 1)
    filled = min(outputs) * inputs > _SMALL  # as `multiply_rows` does
    return _same_bits(inputs, outputs, rows + -rows % _GROUP if filled else rows)


@lru_cache(maxsize=64)
def _same_bits(inputs: int, outputs: tuple[int, ...], rows: int) -> bool:
    random = np.random.default_rng(0).standard_normal(_RANDOM, np.float32)
    x, whole = np.resize(random, (rows, inputs)), np.resize(random, (inputs, sum(outputs)))
    parts = np.split(whole, list(accumulate(outputs))[:-1], axis=1)
    return np.array_equal(multiply_rows(x, whole), np.concatenate([multiply_rows(x, part) for part in parts], axis=1))


def _as_one(matrices: Sequence[Array]) -> Array | None:
    """Return matrices (C, R) as one (C, R of all), if that is how they lie in memory."""
    first, width = matrices[0], 0
    if len(matrices) == 1:
        return first
    for matrix in matrices:
        there = first.ctypes.data + width * first.itemsize
        if matrix.ctypes.data != there or matrix.strides != first.strides or len(matrix) != len(first):
            return None
        width += matrix.shape[1]
    if first.strides != (width * first.itemsize, first.itemsize):
        return None
    return as_strided(first, (len(first), width), first.strides, writeable=False)


class NumpyUnpackingLinear(UnpackingLinear):
    """A quantised layer whose products, with codes for few rows and with numbers for many, NumPy computes."""

    @property
    def computes_at_once(self) -> bool:
        """Whether it does so for one row."""
        return can_multiply_codes(self.bits, rows=1)

    def __call__(self, x: mx.array) -> mx.array:
        """Map (..., C) to (..., R)."""
        y = _times_codes(self, x)
        if y is None:
            return super().__call__(x)
        return y + self.bias if "bias" in self else y

    def multiply_block(self, x: mx.array, weight: mx.array) -> mx.array:
        """Map (..., C) by rows (N, C) of the matrix to (..., N)."""
        if weight.dtype != mx.float32 or not can_compute(self, x):
            return super().multiply_block(x, weight)
        return mx.array(multiply(view(x), weight))


class NumpyQuantizedEmbedding(nn.QuantizedEmbedding):
    """A quantised table of embeddings that scores hidden states by NumPy; it is looked up by MLX."""

    @property
    def computes_at_once(self) -> bool:
        """Whether it does so for one row."""
        return can_multiply_codes(self.bits, rows=1)

    def as_linear(self, x: mx.array) -> mx.array:
        """Map (..., C) to (..., R)."""
        y = _times_codes(self, x)
        return super().as_linear(x) if y is None else y


def _times_codes(layer: nn.QuantizedLinear | nn.QuantizedEmbedding, x: mx.array) -> mx.array | None:
    """Return x (..., C) times the matrix of a layer with affine codes, (..., R); None if MLX has to."""
    count = x.size // x.shape[-1]
    if not can_multiply_codes(layer.bits, count) or not can_compute(layer, x):
        return None
    assert layer.biases is not None  # of affine mode
    parts = np.asarray(layer.weight), view(layer.scales), view(layer.biases)
    return mx.array(multiply_codes(view(x).reshape(count, -1), *parts, layer.bits).reshape(*x.shape[:-1], -1))


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: NumpyLinear,
    nn.Embedding: NumpyEmbedding,
    UnpackingLinear: NumpyUnpackingLinear,
    nn.QuantizedEmbedding: NumpyQuantizedEmbedding,
}


def multiply_by_numpy(model: nn.Module) -> list[str]:
    """Let NumPy compute the products of a model's linear layers and embeddings; results differ by rounding.

    Args:
        model: Any module tree, filled. Layers of types other than float32 stay as they are.

    Returns:
        Paths of the modules.
    """
    changed = []
    for path, module in model.named_modules():
        kind = _KINDS.get(type(module))
        if kind is not None and _in_float32(module):
            module.__class__ = kind
            changed.append(path)
    return sorted(changed)


def _in_float32(module: nn.Module) -> bool:
    numbers: mx.array = module.scales if "scales" in module else module.weight  # other modes' scales are bytes
    return bool(numbers.dtype == mx.float32)
