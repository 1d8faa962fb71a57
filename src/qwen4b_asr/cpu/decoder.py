"""Qwen3's layer on NumPy: see `decoder.DecoderLayer` for the maths."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..batch_cache import SlotLayer
from ..cache import KVCache
from ..decoder import DecoderLayer, LayerCache
from ..lora import LoraLinear
from .arithmetic import attention, rms_norm, rotate
from .products import Array, NumpyLinear, can_compute, project, view


class NumpyDecoderLayer(DecoderLayer):
    """The layer of a float32 decoder; keys and values stay in MLX's caches."""

    def __call__(
        self, x: mx.array, normed: mx.array, mask: mx.array | None, cache: LayerCache | None, following: nn.RMSNorm
    ) -> tuple[mx.array, mx.array]:
        """Map the stream (B, S, H), with its own norm and the norm that follows the layer, to the next of both."""
        if not can_compute(self, x):
            pair: tuple[mx.array, mx.array] = super().__call__(x, normed, mask, cache, following)
            return pair
        stream = view(x) + self._attend(view(normed), mask, cache)
        inner = self.post_attention_layernorm
        stream += self._feed(rms_norm(stream, view(inner.weight), inner.eps))
        return mx.array(stream), mx.array(rms_norm(stream, view(following.weight), following.eps))

    def _attend(self, x: Array, mask: mx.array | None, cache: LayerCache | None) -> Array:
        layer = self.self_attn
        batch, rows, _ = x.shape
        offset = 0 if cache is None else cache.offset
        offsets = [offset] if isinstance(offset, int) else view(offset).reshape(-1).tolist()

        def turned(projection: nn.Module, heads: int, norm: nn.RMSNorm) -> Array:
            y = rms_norm(project(projection, x).reshape(batch, rows, heads, -1), view(norm.weight), norm.eps)
            return rotate(y.transpose(0, 2, 1, 3), offsets, layer.rope_theta)

        q = turned(layer.q_proj, layer.heads, layer.q_norm)
        k = turned(layer.k_proj, layer.kv_heads, layer.k_norm)
        v = project(layer.v_proj, x).reshape(batch, rows, layer.kv_heads, -1).transpose(0, 2, 1, 3)
        if cache is not None:
            k, v = _remember(cache, k, v)
        seen = None if mask is None else np.asarray(mask)
        context = attention(q, k, v, layer.head_dim**-0.5, seen, causal=mask is None)
        return project(layer.o_proj, context.reshape(batch, rows, -1))

    def _feed(self, x: Array) -> Array:
        gate = project(self.mlp.gate_proj, x)
        gate /= 1 + np.exp(-gate)
        gate *= project(self.mlp.up_proj, x)
        return project(self.mlp.down_proj, gate)


def _remember(cache: LayerCache, k: Array, v: Array) -> tuple[Array, Array]:
    """Append keys and values (B, G, S, E), and return all that is held."""
    rows = k.shape[2]
    claimed = cache.claim(len(k), rows) if isinstance(cache, (KVCache, SlotLayer)) else None
    if claimed is not None:  # in place: having MLX do it takes as long as attention
        (keys, values), first = [view(buffer) for buffer in claimed[0]], claimed[1]
        keys[:, :, first : first + rows] = k
        values[:, :, first : first + rows] = v
        return keys[:, :, : first + rows], values[:, :, : first + rows]
    held = cache.update(mx.array(k), mx.array(v))
    return view(held[0]), view(held[1])


def use_numpy_layers(decoder: nn.Module) -> list[str]:
    """Let NumPy compute the layers whose projections it multiplies; returns their paths."""
    changed = []
    for path, module in decoder.named_modules():
        if type(module) is not DecoderLayer:
            continue
        parts = {**module.self_attn.children(), **module.mlp.children()}
        if all(type(part) in (NumpyLinear, LoraLinear) for name, part in parts.items() if name.endswith("_proj")):
            module.__class__ = NumpyDecoderLayer
            changed.append(path)
    return sorted(changed)
