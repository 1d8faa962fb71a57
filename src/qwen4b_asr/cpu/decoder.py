"""Qwen3's layer on NumPy: see `decoder.DecoderLayer` for the maths."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..batch_cache import SlotLayer
from ..cache import KVCache
from ..decoder import DecoderLayer, LayerCache
from ..lora import LoraLinear
from .arithmetic import attention, rms_norm, root_mean_square, rotate
from .products import Array, NumpyLinear, NumpyUnpackingLinear, Projection, can_compute, view

_HELD = (
    *(("self_attn", name, "weight") for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(("mlp", name, "weight") for name in ("gate_proj", "up_proj", "down_proj")),
    ("post_attention_layernorm", "weight"),
)


class NumpyDecoderLayer(DecoderLayer):
    """The layer of a float32 decoder; keys and values stay in MLX's caches."""

    def __call__(
        self, x: mx.array, normed: mx.array, mask: mx.array | None, cache: LayerCache | None, following: nn.RMSNorm
    ) -> tuple[mx.array, mx.array]:
        """Map the stream (B, S, H), with its own norm and the norm that follows the layer, to the next of both."""
        if not can_compute(self, x):
            pair: tuple[mx.array, mx.array] = super().__call__(x, normed, mask, cache, following)
            return pair
        held: _Held | None = getattr(self, "_held", None)
        step = x.shape[1] == 1 and isinstance(cache, (KVCache, SlotLayer)) and cache.begun
        # Within an utterance weights stay: looking takes 3 ms a step.
        if held is None or not (step or held.still(self)):
            self._held = held = _Held(self)
        stream = view(x).reshape(-1, x.shape[-1]) + self._attend(held, view(normed), mask, cache)
        stream += self._feed(held, rms_norm(stream, held.norm, self.post_attention_layernorm.eps))
        next_normed = rms_norm(stream, view(following.weight), following.eps)
        return mx.array(stream.reshape(x.shape)), mx.array(next_normed.reshape(x.shape))

    def _attend(self, held: _Held, x: Array, mask: mx.array | None, cache: LayerCache | None) -> Array:
        """Map rows (B, S, H) to (B * S, H)."""
        layer = self.self_attn
        batch, rows, _ = x.shape
        offset = 0 if cache is None else cache.offset
        offsets = [offset] if isinstance(offset, int) else view(offset).reshape(-1).tolist()
        packed = held.qkv(x.reshape(batch * rows, -1)).reshape(batch, rows, -1, layer.head_dim)
        queries, turned = layer.heads, layer.heads + layer.kv_heads
        qk = packed[:, :, :turned] / root_mean_square(packed[:, :, :turned], layer.q_norm.eps)
        qk[:, :, :queries] *= held.q_norm
        qk[:, :, queries:] *= held.k_norm
        qk = rotate(qk.transpose(0, 2, 1, 3), offsets, layer.rope_theta)
        k, v = qk[:, queries:], packed[:, :, turned:].transpose(0, 2, 1, 3)
        if cache is not None:
            k, v = _remember(cache, k, v)
        seen = None if mask is None else np.asarray(mask)
        context = attention(qk[:, :queries], k, v, layer.head_dim**-0.5, seen, causal=mask is None)
        return held.out(context.reshape(batch * rows, -1))

    def _feed(self, held: _Held, x: Array) -> Array:
        """Map rows (N, H) to (N, H)."""
        both = held.gate_up(x)
        gate, up = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
        inner = np.exp(-gate)
        inner += 1
        np.divide(gate, inner, out=inner)
        inner *= up
        return held.down(inner)


class _Held:
    """A layer's weights as NumPy sees them, of use while modules and arrays are the same objects."""

    def __init__(self, layer: DecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = Projection([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = Projection([attention.o_proj])
        self.gate_up = Projection([mlp.gate_proj, mlp.up_proj])
        self.down = Projection([mlp.down_proj])
        self.q_norm, self.k_norm = view(attention.q_norm.weight), view(attention.k_norm.weight)
        self.norm = view(layer.post_attention_layernorm.weight)
        # Not the layer itself: a model that refers to itself is freed late, and another may need its room at once.
        self._parts = list(_parts(layer))

    def still(self, layer: DecoderLayer) -> bool:
        """Whether all of the layer's are; weights are loaded, adapters come and go."""
        return all(now is then for now, then in zip(_parts(layer), self._parts, strict=True))


def _parts(layer: DecoderLayer) -> Iterator[object]:
    """Yield modules and arrays along the paths to what is held; None for what a path ends before."""
    for path in _HELD:
        part: object = layer
        for name in path:
            part = part.get(name) if isinstance(part, nn.Module) else None
            yield part


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
        if all(
            type(part) in (NumpyLinear, NumpyUnpackingLinear, LoraLinear)
            for name, part in parts.items()
            if name.endswith("_proj")
        ):
            module.__class__ = NumpyDecoderLayer
            changed.append(path)
    return sorted(changed)
