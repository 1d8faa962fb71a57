"""The adaptor between encoder and language model: projection, post-norm transformer, projection.

The layers are torch's ``nn.TransformerEncoderLayer`` with its defaults: normalisation *after* each residual
sum, exact (erf) GELU, no positions, no norm at the end of the stack.
Shapes: B batch, A audio rows, D encoder width, C hidden width, H decoder width.
Module attributes carry the names of the torch checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .kernels.attention import attention


@dataclass(frozen=True)
class AdaptorConfig:
    """Sizes of the adaptor; the defaults are those of the 4B system.

    Args:
        input_size: Encoder width D.
        hidden_size: Width C of the transformer layers.
        output_size: Decoder width H.
        num_layers: Transformer layers.
        num_heads: Attention heads; must divide C.
        ffn_size: Width of the feed-forward layers.
        norm_eps: Epsilon of the layer norms.
    """

    input_size: int = 512
    hidden_size: int = 2048
    output_size: int = 2560
    num_layers: int = 4
    num_heads: int = 8
    ffn_size: int = 8192
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("input_size", "hidden_size", "output_size", "num_heads", "ffn_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"[AdaptorConfig] {name} must be at least 1 but got {getattr(self, name)}")
        if self.num_layers < 0:
            raise ValueError(f"[AdaptorConfig] num_layers must not be negative but got {self.num_layers}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"[AdaptorConfig] num_heads must divide hidden_size {self.hidden_size} but got {self.num_heads}"
            )


class AdaptorAttention(nn.Module):
    """Self-attention with torch's packed ``in_proj_weight`` (3C, C) and ``in_proj_bias`` (3C,)."""

    def __init__(self, config: AdaptorConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_heads
        limit = (6 / (4 * size)) ** 0.5  # Xavier's bound for the packed matrix, torch's own initialisation
        self.in_proj_weight = mx.random.uniform(-limit, limit, (3 * size, size))
        self.in_proj_bias = mx.zeros(3 * size)
        self.out_proj = nn.Linear(size, size)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        """Attend over rows x (B, A, C) where mask (B, A) is True; returns (B, A, C)."""
        batch, rows, _ = x.shape
        packed = mx.addmm(self.in_proj_bias, x, self.in_proj_weight.T)
        q, k, v = (t.reshape(batch, rows, self.heads, -1).swapaxes(1, 2) for t in mx.split(packed, 3, axis=-1))
        context = attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)
        return self.out_proj(context.swapaxes(1, 2).reshape(batch, rows, -1))


class AdaptorLayer(nn.Module):
    """Post-norm transformer layer."""

    def __init__(self, config: AdaptorConfig) -> None:
        super().__init__()
        self.self_attn = AdaptorAttention(config)
        self.linear1 = nn.Linear(config.hidden_size, config.ffn_size)
        self.linear2 = nn.Linear(config.ffn_size, config.hidden_size)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        """Map (B, A, C) to (B, A, C)."""
        x = self.norm1(x + self.self_attn(x, mask))
        return self.norm2(x + self.linear2(nn.gelu(self.linear1(x))))


class AdaptorTransformer(nn.Module):
    """The stack of layers, under the checkpoint's name ``transformer``."""

    def __init__(self, config: AdaptorConfig) -> None:
        super().__init__()
        self.layers = [AdaptorLayer(config) for _ in range(config.num_layers)]


class Adaptor(nn.Module):
    """Map audio states to rows that the decoder reads like token embeddings.

    Args:
        config: Sizes.
    """

    def __init__(self, config: AdaptorConfig) -> None:
        super().__init__()
        self.config = config
        self.input_proj = nn.Linear(config.input_size, config.hidden_size)
        self.transformer = AdaptorTransformer(config)
        self.output_proj = nn.Linear(config.hidden_size, config.output_size)
        self.norm = nn.LayerNorm(config.output_size, eps=config.norm_eps)

    def __call__(self, audio_states: mx.array, mask: mx.array | None = None) -> mx.array:
        """Project audio states.

        Args:
            audio_states: (B, A, D).
            mask: (B, A), bool, True on real rows; None when there is no padding.

        Returns:
            Audio embeddings (B, A, H). Rows outside the mask hold no meaning.

        Raises:
            ValueError: If the width is not the adaptor's.
        """
        batch, rows, width = audio_states.shape
        if width != self.config.input_size:
            raise ValueError(f"[Adaptor] audio states must be {self.config.input_size} wide but got {width}")
        if mask is None:
            mask = mx.ones((batch, rows), dtype=mx.bool_)
        x = self.input_proj(audio_states.astype(self.input_proj.bias.dtype))
        for layer in self.transformer.layers:
            x = layer(x, mask)
        return self.norm(self.output_proj(x))
