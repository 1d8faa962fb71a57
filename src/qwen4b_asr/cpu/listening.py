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
from .products import Array, NumpyLinear, can_compute, multiply, multiply_columns, project, space, view


class NumpySanmLayer(SanmLayer):
    """SANM's layer in float32. Its products get their rows in full groups, which are the quickest."""

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        """Map x (B, R, input_size) to (B, R, D)."""
        if not can_compute(self, x):
            y: mx.array = super().__call__(x, mask)
            return y
        rows = view(x).reshape(-1, x.shape[-1])
        out = _attend(self.self_attn, _norm(rows, self.norm1), np.asarray(mask))
        if self.residual:
            out += rows
        out += self._feed(_norm(out, self.norm2))[: len(out)]
        return mx.array(out.reshape(*x.shape[:-1], -1))

    def _feed(self, x: Array) -> Array:
        first, second = self.feed_forward.w_1, self.feed_forward.w_2
        if not (type(first) is type(second) is NumpyLinear):
            inner = project(first, x)
            return project(second, np.maximum(inner, 0, out=inner))
        # W max(y + b, 0) = W max(y, -b) + W b, which walks over the widest rows once rather than twice.
        inner = multiply_columns(first.weight, x.T)
        np.maximum(inner, -view(first.bias)[:, None], out=inner)
        out = multiply_columns(second.weight, inner)
        out += self._constant(first.bias, second.weight, second.bias)[:, None]
        return out.T

    def _constant(self, inner: mx.array, weight: mx.array, outer: mx.array) -> Array:
        """Return ``weight @ inner + outer``, from the last call if they are the same arrays."""
        known = getattr(self, "_last", None)
        if known is None or any(old is not new for old, new in zip(known[0], (inner, weight, outer), strict=True)):
            known = (inner, weight, outer), view(weight) @ view(inner) + view(outer)
            object.__setattr__(self, "_last", known)  # nothing that MLX needs to know of
        constant: Array = known[1]
        return constant


class NumpyAdaptorAttention(AdaptorAttention):
    """The adaptor's self-attention in float32."""

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        """Attend over rows x (B, A, C) where mask (B, A) is True; returns (B, A, C)."""
        if not can_compute(self, x):
            y: mx.array = super().__call__(x, mask)
            return y
        packed = multiply(view(x), self.in_proj_weight, self.in_proj_bias)
        context = _packed_attention(packed, self.heads, np.asarray(mask))
        return mx.array(project(self.out_proj, context.reshape(x.shape)))


def _attend(layer: SanmAttention, x: Array, mask: Mask) -> Array:
    """Attend over rows (B * R and spare ones, input_size); returns (B * R, D)."""
    packed = project(layer.linear_q_k_v, x)[: mask.size].reshape(*mask.shape, -1)
    context = _packed_attention(packed, layer.heads, mask)
    filled = space(mask.size, context.shape[2] * context.shape[3])
    filled[: mask.size].reshape(context.shape)[...] = context
    out = project(layer.linear_out, filled)[: mask.size]
    weight = np.ascontiguousarray(view(layer.fsmn_block.weight)[:, :, 0].T)  # einsum walks along it
    out += memory(packed[..., -weight.shape[1] :], weight, mask, layer.left_context).reshape(out.shape)
    return out


def _packed_attention(packed: Array, heads: int, mask: Mask) -> Array:
    """Attend with queries, keys and values side by side (B, R, 3D); returns (B, R, heads, D / heads)."""
    q, k, v = packed.reshape(*mask.shape, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    return attention(q, k, v, q.shape[-1] ** -0.5, mask[:, None, None, :])


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
    """Normalise rows (N, D); returns as many and spare ones."""
    y = space(*x.shape)
    layer_norm(x, view(layer.weight), view(layer.bias), layer.eps, out=y[: len(x)])
    return y


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
