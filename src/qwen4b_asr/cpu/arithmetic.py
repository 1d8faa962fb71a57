"""What stands between products, on NumPy arrays: norms, rotary positions, attention.

The maths and its sources are those of `kernels`; these are for a CPU, where calling MLX for a few thousand numbers
takes longer than computing them.
Shapes: B batch, H query heads, G key heads, I queries, J keys, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .products import Array

Mask = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
_HIDDEN = -3.0e38  # as good as nothing beside any score, and finite


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Return ``x / sqrt(mean(x ** 2) + eps) * weight`` for rows x (..., N)."""
    y: Array = x / root_mean_square(x, eps)
    y *= weight
    return y


def layer_norm(x: Array, weight: Array, bias: Array, eps: float, out: Array | None = None) -> Array:
    """Return ``(x - mean) / sqrt(variance + eps) * weight + bias`` for rows x (..., N), in `out` if it is given."""
    mean: Array = np.add.reduce(x, axis=-1, keepdims=True)  # x.mean() takes longer than the sum of one row
    mean /= np.float32(x.shape[-1])
    y: Array = np.subtract(x, mean, out=out)
    y /= root_mean_square(y, eps)
    y *= weight
    y += bias
    return y


def root_mean_square(x: Array, eps: float) -> Array:
    """Return ``sqrt(mean(x ** 2) + eps)`` of rows (..., N): (..., 1)."""
    y: Array = np.vecdot(x, x)[..., None]
    y /= np.float32(x.shape[-1])
    y += np.float32(eps)
    return np.sqrt(y, out=y)


def rotate(x: Array, offsets: Sequence[int], theta: float) -> Array:
    """Turn pairs of halves by their positions, as `mlx.core.fast.rope` does with ``traditional=False``.

    Args:
        x: (B, heads, I, E).
        offsets: Position of the first row, of all items or of each.
        theta: Base of the frequencies.
    """
    cos, sin = _angles(tuple(offsets), x.shape[2], x.shape[3], theta)
    pairs = x.reshape(*x.shape[:3], 2, -1)
    y = pairs * cos
    y += pairs[..., ::-1, :] * sin
    return y.reshape(x.shape)


@lru_cache(maxsize=4)  # all layers of a pass turn by the same angles
def _angles(offsets: tuple[int, ...], rows: int, width: int, theta: float) -> tuple[Array, Array]:
    """Cosines, (items, 1, I, 1, E / 2), and sines of either half, (items, 1, I, 2, E / 2), of the angles.

    Those are in float32: what the model was trained with.
    """
    positions = np.array(offsets)[:, None, None, None, None] + np.arange(rows)[:, None, None]
    frequencies = 1 / np.float32(theta) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    angles = positions.astype(np.float32) * frequencies
    sin = np.sin(angles)
    return np.cos(angles), np.concatenate([-sin, sin], axis=3)


@lru_cache(maxsize=4)
def _behind(rows: int) -> Mask:
    """True where a row's position is before a column's."""
    return ~np.tri(rows, dtype=bool)


def attention(q: Array, k: Array, v: Array, scale: float, mask: Mask | None = None, causal: bool = False) -> Array:
    """Compute `kernels.attention.attention`; the last query stands beside the last key if `causal`.

    Args:
        q: (B, H, I, E).
        k: (B, G, J, E).
        v: (B, G, J, E).
        scale: Factor of the scores.
        mask: (B or 1, 1, I or 1, J), True on keys that are seen.
        causal: Hide the keys behind each query's own position.

    Returns:
        (B, I, H, E), which is (B, I, H * E) in memory. A query that sees no key gets the mean of the values.
    """
    batch, heads, queries, width = q.shape
    groups, keys = k.shape[1:3]
    # The queries that share a key head go into one product; single ones are quicker each by itself, by sgemv.
    one_by_one = queries == 1 and groups < heads
    shape = (batch, groups, -1, 1, width) if one_by_one else (batch, groups, -1, width)
    if one_by_one:
        k, v = k[:, :, None], v[:, :, None]
    scores: Array = np.matmul(q if groups == heads else q.reshape(shape), k.swapaxes(-2, -1))
    scores *= np.float32(scale)
    each = scores.reshape(batch, heads, queries, keys)
    if mask is not None and not mask.all():
        np.copyto(each, _HIDDEN, where=~mask)
    if causal and queries > 1:
        np.copyto(each[..., keys - queries :], _HIDDEN, where=_behind(queries))
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    context: Array = np.matmul(scores, v)
    context /= np.add.reduce(scores, axis=-1, keepdims=True)
    return context.reshape(batch, heads, queries, width).transpose(0, 2, 1, 3)
