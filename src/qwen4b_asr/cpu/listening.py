"""The encoder's layer and the adaptor's attention on NumPy: see `encoder` and `adaptor` for the maths.

Shapes: B batch, R rows, D width, K taps.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.lib.stride_tricks import as_strided

from ..adaptor import AdaptorAttention
from ..encoder import SanmAttention, SanmLayer
from .arithmetic import Mask, attention, layer_norm
from .products import Array, can_compute, multiply, project, view


class NumpySanmLayer(SanmLayer):
    """SANM's layer in float32."""

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        """Map x (B, R, input_size) to (B, R, D)."""
        if not can_compute(self, x):
            y: mx.array = super().__call__(x, mask)
            return y
        rows, real = view(x), np.asarray(mask)
        out = _attend(self.self_attn, _norm(rows, self.norm1), real)
        if self.residual:
            out += rows
        inner = project(self.feed_forward.w_1, _norm(out, self.norm2))
        np.maximum(inner, 0, out=inner)
        out += project(self.feed_forward.w_2, inner)
        return mx.array(out)


class NumpyAdaptorAttention(AdaptorAttention):
    """The adaptor's self-attention in float32."""

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        """Attend over rows x (B, A, C) where mask (B, A) is True; returns (B, A, C)."""
        if not can_compute(self, x):
            y: mx.array = super().__call__(x, mask)
            return y
        packed = multiply(view(x), self.in_proj_weight, self.in_proj_bias)
        return mx.array(project(self.out_proj, _packed_attention(packed, self.heads, np.asarray(mask))))


def _attend(layer: SanmAttention, x: Array, mask: Mask) -> Array:
    packed = project(layer.linear_q_k_v, x)
    out = project(layer.linear_out, _packed_attention(packed, layer.heads, mask))
    weight = np.ascontiguousarray(view(layer.fsmn_block.weight)[:, :, 0].T)  # einsum walks along it
    out += memory(packed[..., -weight.shape[1] :], weight, mask, layer.left_context)
    return out


def _packed_attention(packed: Array, heads: int, mask: Mask) -> Array:
    """Attend with queries, keys and values side by side (B, R, 3D); returns (B, R, D)."""
    batch, rows, width = packed.shape
    q, k, v = packed.reshape(batch, rows, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    seen = mask[:, None, None, :]
    return attention(q, k, v, q.shape[-1] ** -0.5, seen).reshape(batch, rows, width // 3)


def memory(values: Array, weight: Array, mask: Mask, left: int) -> Array:
    """Compute the memory block, `kernels.fsmn.fsmn`.

    Args:
        values: (B, R, D).
        weight: Taps (K, D).
        mask: (B, R), True on real rows.
        left: Rows of left context.

    Returns:
        (B, R, D), zero on masked rows.
    """
    batch, rows, width = values.shape
    taps = len(weight)
    padded = np.zeros((batch, rows + taps - 1, width), np.float32)
    real = padded[:, left : left + rows]
    if mask.all():
        real[:] = values
    else:
        np.multiply(values, mask[:, :, None], out=real)
    item, row, column = padded.strides
    windows = as_strided(padded, (batch, rows, taps, width), (item, row, row, column), writeable=False)
    out: Array = np.einsum("brkd,kd->brd", windows, weight)
    out += real
    if not mask.all():
        out *= mask[:, :, None]
    return out


def _norm(x: Array, layer: nn.LayerNorm) -> Array:
    return layer_norm(x, view(layer.weight), view(layer.bias), layer.eps)


def listen_with_numpy(model: nn.Module) -> list[str]:
    """Let NumPy compute the float32 layers of encoder and adaptor that it has code for; returns their paths."""
    changed = []
    for path, module in model.named_modules():
        if type(module) is SanmLayer and module.norm1.weight.dtype == mx.float32:
            module.__class__ = NumpySanmLayer
            changed.append(path)
        elif type(module) is AdaptorAttention and module.in_proj_weight.dtype == mx.float32:
            module.__class__ = NumpyAdaptorAttention
            changed.append(path)
    return sorted(changed)
