"""Faster gradients on the CPU for what training spends most of its time in, matrices aside.

MLX's CPU back end computes `exp` and `erf` one element at a time and differentiates a fused attention by running it
again; the memory block's gradient goes through a dozen padded copies. All have short closed forms in NumPy. Values
and gradients are those of the ordinary operations to rounding; only training uses these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import encoder
from ..kernels import attention as kernel
from .ctc import Floats


def _with_gradient(forward: Callable[..., mx.array], vjp: Callable[..., Any]) -> Callable[..., mx.array]:
    """Join an operation and its vector-Jacobian product, called as ``vjp(primals, cotangent, output)``."""
    joined: Any = mx.custom_function(forward)
    joined.vjp(vjp)
    operation: Callable[..., mx.array] = joined
    return operation


def _view(x: mx.array) -> Floats:
    return np.array(x, copy=False)


def _softmax(scores: mx.array) -> mx.array:
    """Softmax over the last axis, float32."""
    x = _view(scores)
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return mx.array(p)


def _softmax_vjp(scores: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    p, g = _view(output), _view(cotangent)
    product = p * g
    product -= p * product.sum(axis=-1, keepdims=True)
    return mx.array(product)


softmax = _with_gradient(_softmax, _softmax_vjp)


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **_: Any) -> mx.array:
    """`mx.fast.scaled_dot_product_attention` in plain operations, for masks of booleans and ``causal``."""
    batch, heads, rows, width = q.shape
    groups = k.shape[1]
    q = (q * scale).reshape(batch, groups, heads // groups, rows, width)
    scores = q @ k[:, :, None].swapaxes(-1, -2)
    if isinstance(mask, str):
        mask = mx.tril(mx.ones((rows, k.shape[2]), dtype=mx.bool_), k.shape[2] - rows)
    if mask is not None:
        bias = mx.where(mask, mx.array(0.0), mx.array(-1e9))
        scores = scores + (bias[:, :, None] if bias.ndim == 4 else bias)
    return (softmax(scores) @ v[:, :, None]).reshape(batch, heads, rows, v.shape[-1])


def _depthwise(padded: mx.array, weight: mx.array) -> mx.array:
    """Depthwise convolution of rows (B, R + K - 1, D), already padded, with taps (D, K, 1); returns (B, R, D)."""
    return mx.array(_slide(_view(padded), _view(weight)[:, :, 0]))


def _depthwise_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    x, w, g = _view(primals[0]), _view(primals[1])[:, :, 0], _view(cotangent)
    taps = w.shape[1]
    back = _slide(np.pad(g, ((0, 0), (taps - 1, taps - 1), (0, 0))), w[:, ::-1])
    windows = np.lib.stride_tricks.sliding_window_view(x, taps, axis=1)
    return mx.array(back), mx.array(np.einsum("brdk,brd->dk", windows, g)[:, :, None])


depthwise = _with_gradient(_depthwise, _depthwise_vjp)


def _slide(x: Floats, w: Floats) -> Floats:
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[1], axis=1)
    out: Floats = np.einsum("brdk,kd->brd", windows, np.ascontiguousarray(w.T))
    return out


def memory(
    qkv: mx.array,
    weight: mx.array,
    mask: mx.array,
    *,
    left: int,
    offset: int | None = None,
    shifted_adds: bool | None = None,
) -> mx.array:
    """`kernels.fsmn.fsmn` with NumPy's gradient."""
    width, taps, _ = weight.shape
    first = qkv.shape[2] - width if offset is None else offset
    keep = mask[:, :, None].astype(qkv.dtype)
    v = qkv[:, :, first : first + width] * keep
    padded = mx.pad(v, [(0, 0), (left, taps - 1 - left), (0, 0)])
    return (depthwise(padded, weight) + v) * keep


def _silu(x: mx.array) -> mx.array:
    """SiLU, x · sigmoid(x), float32."""
    a = _view(x)
    return mx.array(a * _sigmoid(a))


def _silu_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    a = _view(x)
    s = _sigmoid(a)
    return mx.array(_view(cotangent) * s * (1 + a * (1 - s)))


silu = _with_gradient(_silu, _silu_vjp)


def _sigmoid(a: Floats) -> Floats:
    return np.float32(1) / (np.float32(1) + np.exp(-np.maximum(a, np.float32(-80))))


def _gelu(x: mx.array) -> mx.array:
    """GELU, x · Φ(x), float32; the error function to 1.5e-7 (Abramowitz and Stegun, 7.1.26)."""
    a = _view(x)
    return mx.array(a * _normal(a, np.exp(-0.5 * a * a)))


def _gelu_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    a = _view(x)
    bell = np.exp(-0.5 * a * a)
    return mx.array(_view(cotangent) * (_normal(a, bell) + a * bell * np.float32(0.3989422804014327)))


gelu = _with_gradient(_gelu, _gelu_vjp)


def _normal(a: Floats, bell: Floats) -> Floats:
    """Return the normal distribution function, given exp(-a² / 2)."""
    t = np.float32(1) / (np.float32(1) + np.float32(0.3275911 * 0.7071067811865476) * np.abs(a))
    series = t * np.float32(1.061405429) - np.float32(1.453152027)
    for c in (1.421413741, -0.284496736, 0.254829592):
        series = series * t + np.float32(c)
    tail = np.float32(0.5) * series * t * bell
    return np.where(a < 0, tail, np.float32(1) - tail)


@contextmanager
def cpu_gradients() -> Iterator[None]:
    """Put these operations in the place of the ordinary ones while the block runs, if the device is the CPU."""
    if mx.default_device() != mx.Device(mx.cpu):
        yield
        return
    places: list[tuple[Any, str, Any]] = [
        (mx.fast, "scaled_dot_product_attention", attention),
        (kernel, "powers_of_two_pay", lambda q, k: False),  # so that encoder and adaptor come to the one above
        (encoder, "fsmn", memory),
        (nn, "gelu", gelu),
        (nn, "silu", silu),
    ]
    kept = [getattr(owner, name) for owner, name, _ in places]
    for owner, name, quick in places:
        setattr(owner, name, quick)
    try:
        yield
    finally:
        for (owner, name, _), ordinary in zip(places, kept, strict=True):
            setattr(owner, name, ordinary)
