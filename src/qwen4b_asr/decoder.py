"""Qwen3: grouped-query attention, RMS-normalised queries and keys, rotary positions, SwiGLU.

Source of the maths: the Qwen3 technical report and transformers' ``models/qwen3/modeling_qwen3.py``.
Shapes: B batch, S positions, H width, E head width, V vocabulary. Module attributes carry the names of
the Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from .kernels.add_rms_norm import add_rms_norm
from .kernels.attention import attention
from .kernels.qk_norm_rope import qk_norm_rope
from .lora import LoraConfig, build_lora
from .quantization import Quantization, quantize_modules


class LayerCache(Protocol):
    """What the decoder needs of one layer's cache.

    ``offset`` is the rotary position of the next row, or one for each item of the batch: (B,), int32.
    """

    @property
    def offset(self) -> int | mx.array:
        """Rotary position of the next row."""
        ...

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values (B, G, S, E) and return all that is held."""
        ...


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder under their Hugging Face names; the defaults are Qwen3-4B's.

    Beside them, `quantization` says which matrices are stored in groups, and `lora` which layers have an adapter
    of their own in the checkpoint.
    """

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    max_position_embeddings: int = 40960
    tie_word_embeddings: bool = True
    quantization: Quantization | None = None
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        for name, kind in (("quantization", Quantization), ("lora", LoraConfig)):
            if isinstance(value := getattr(self, name), Mapping):  # from JSON
                object.__setattr__(self, name, kind(**value))
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"[DecoderConfig] {name} must be at least 1 but got {getattr(self, name)}")
        if self.num_hidden_layers < 0:
            raise ValueError(f"[DecoderConfig] num_hidden_layers must not be negative but got {self.num_hidden_layers}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"[DecoderConfig] num_key_value_heads must divide num_attention_heads {self.num_attention_heads} "
                f"but got {self.num_key_value_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"[DecoderConfig] head_dim must be even but got {self.head_dim}")

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read a checkpoint's ``config.json``.

        Args:
            config: The parsed file.

        Returns:
            The decoder's sizes.

        Raises:
            ValueError: If the model is not Qwen3, or uses a feature that this decoder does not have.
        """
        if config.get("model_type") != "qwen3":
            raise ValueError(f"[DecoderConfig] model_type must be 'qwen3' but got {config.get('model_type')!r}")
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"[DecoderConfig] rope scaling must be 'default' but got {rope}")
        for name, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("use_sliding_window", False)):
            if config.get(name, wanted) != wanted:
                raise ValueError(f"[DecoderConfig] {name} must be {wanted!r} but got {config[name]!r}")
        apart = ("quantization", "lora")
        values = {name: config[name] for name in cls.__dataclass_fields__ if name in config and name not in apart}
        quantization = config.get("quantization") or config.get("quantization_config")
        if quantization:  # MLX writes its settings under both names; others write theirs under the second
            values["quantization"] = Quantization.from_mlx(quantization)
        if "rope_theta" in rope:  # transformers 5 moved it there
            values.setdefault("rope_theta", rope["rope_theta"])
        if "head_dim" not in values and {"hidden_size", "num_attention_heads"} <= values.keys():
            values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
        missing = sorted(
            {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
            - values.keys()
        )
        if missing:
            raise ValueError(f"[DecoderConfig] config.json must hold {missing} but got {sorted(config)}")
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        values.setdefault("tie_word_embeddings", False)
        return cls(**values)


class Attention(nn.Module):
    """Grouped-query attention with per-head RMS norms on queries and keys before the rotation.

    `joined.join_projections` may put one projection, ``qkv_proj``, in the place of three; so with the MLP's two.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.rope_theta = config.rope_theta
        size = config.hidden_size
        self.q_proj = nn.Linear(size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, mask: mx.array | None, cache: LayerCache | None) -> mx.array:
        """Attend over x (B, S, H) and what the cache holds, causally without a mask; returns (B, S, H)."""
        batch, rows, _ = x.shape
        q, k, v = self.qkv_proj(x) if "qkv_proj" in self else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q = q.reshape(batch, rows, self.heads, -1)
        k = k.reshape(batch, rows, self.kv_heads, -1)
        v = v.reshape(batch, rows, self.kv_heads, -1).swapaxes(1, 2)
        offset = 0 if cache is None else cache.offset
        weights = self.q_norm.weight, self.k_norm.weight
        q, k = qk_norm_rope(q, k, *weights, eps=self.q_norm.eps, theta=self.rope_theta, offset=offset)
        if cache is not None:
            k, v = cache.update(k, v)
        causal, held = mask is None and rows > 1, k.shape[2] - rows
        context = attention(q, k, v, scale=self.head_dim**-0.5, mask=mask, causal=causal, offset=held)
        return self.o_proj(context.swapaxes(1, 2).reshape(batch, rows, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Map (B, S, H) to (B, S, H)."""
        gate, up = self.gate_up_proj(x) if "gate_up_proj" in self else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(_swiglu(gate, up))


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    # One launch instead of two; on a CPU there is nothing to gain.
    return _one_swiglu(gate, up) if mx.default_device().type == mx.gpu else nn.silu(gate) * up


@partial(mx.compile, shapeless=True)
def _one_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


class DecoderLayer(nn.Module):
    """Pre-norm layer: attention, then MLP, each with its residual.

    Each sum comes together with the norm that reads it, the last with the first norm of the next layer.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self, x: mx.array, normed: mx.array, mask: mx.array | None, cache: LayerCache | None, following: nn.RMSNorm
    ) -> tuple[mx.array, mx.array]:
        """Map the stream (B, S, H), with its own norm and the norm that follows the layer, to the next of both."""
        inner = self.post_attention_layernorm
        x, normed = add_rms_norm(x, self.self_attn(normed, mask, cache), inner.weight, eps=inner.eps)
        return add_rms_norm(x, self.mlp(normed), following.weight, eps=following.eps)


class Qwen3Model(nn.Module):
    """Embedding table, layers and final norm, under the checkpoint's name ``model``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Qwen3(nn.Module):
    """The decoder: embeddings in, logits out.

    Args:
        config: Sizes.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Qwen3Model(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.quantization is not None:
            quantize_modules(self, config.quantization)
        if config.lora is not None:
            build_lora(self, config.lora)

    @property
    def computes_at_once(self) -> bool:
        """Whether there are layers that compute when they are called, as those of `cpu` do, so that nothing is lazy."""
        return any(getattr(module, "computes_at_once", False) for module in self.modules() if module is not self)

    def embed(self, token_ids: mx.array) -> mx.array:
        """Look up token ids (..., S); returns (..., S, H)."""
        return self.model.embed_tokens(token_ids)

    def hidden(
        self,
        inputs_embeds: mx.array,
        cache: Sequence[LayerCache] | None = None,
        mask: mx.array | None = None,
    ) -> mx.array:
        """Run the layers and the final norm.

        Args:
            inputs_embeds: (B, S, H).
            cache: One per layer, or None for a single pass. New positions follow what it holds.
            mask: (B, J), bool, True on real positions; J counts what the cache holds and the S new ones. None where
                all are real, which costs less. Padding may stand before or behind an utterance, not within it:
                rotary positions act through differences alone.

        Returns:
            Hidden states (B, S, H).

        Raises:
            ValueError: If the cache has another depth, or the mask hides a number of positions that cannot be.
        """
        layers = self.model.layers
        if cache is not None and len(cache) != len(layers):
            raise ValueError(f"[Qwen3] {len(layers)} layer caches are needed but got {len(cache)}")
        x = inputs_embeds.astype(self.model.norm.weight.dtype)
        batch, rows, _ = x.shape
        if mask is not None and (mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < rows):
            raise ValueError(f"[Qwen3] mask must be ({batch}, held + {rows}) but got {mask.shape}")
        attention_mask = None if mask is None else padded_causal_mask(mask, rows)
        norms = [*(layer.input_layernorm for layer in layers), self.model.norm]
        normed: mx.array = norms[0](x)
        for i, layer in enumerate(layers):
            x, normed = layer(x, normed, attention_mask, None if cache is None else cache[i], norms[i + 1])
        return normed

    def logits(self, hidden: mx.array) -> mx.array:
        """Score the vocabulary for hidden states (..., H); returns (..., V)."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)

    def __call__(
        self,
        inputs_embeds: mx.array,
        cache: Sequence[LayerCache] | None = None,
        mask: mx.array | None = None,
    ) -> mx.array:
        """Return the logits (B, S, V) of every position; see `hidden` for the arguments."""
        return self.logits(self.hidden(inputs_embeds, cache, mask))


def padded_causal_mask(mask: mx.array, rows: int | None = None) -> mx.array:
    """Join the causal mask of the last `rows` positions, all by default, and a key mask (B, J) into (B, 1, rows, J).

    A padding row sees itself, since the softmax of an empty row is not a number on some back ends.
    """
    keys = mask.shape[1]
    index = mx.arange(keys)
    query = index if rows is None else index[keys - rows :]
    causal = query[:, None] >= index[None, :]
    itself = query[:, None] == index[None, :]
    return ((causal[None] & mask[:, None, :]) | itself[None])[:, None]
