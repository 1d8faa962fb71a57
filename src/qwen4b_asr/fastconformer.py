"""FastConformer: strided depthwise subsampling, then conformer layers with relative positions.

Source of the maths: "Fast Conformer with Linearly Scalable Attention for Efficient Speech Recognition" (Rekesh et al.,
2023), "Conformer: Convolution-augmented Transformer for Speech Recognition" (Gulati et al., 2020), and for the
positions "Transformer-XL" (Dai et al., 2019), as in NeMo's ``conformer_encoder.py``.
Shapes: B batch, T 10-ms frames, F mel bins, R encoder rows of 80 ms, D encoder width, H heads, E head width,
C subsampling channels, K convolution taps.
Module attributes carry the checkpoint's names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class FastConformerConfig:
    """Sizes of the encoder; the defaults are Canary-Qwen's.

    Args:
        kind: Names this encoder in a model's configuration.
        input_size: Mel bins F.
        output_size: Encoder width D.
        attention_heads: Attention heads H; must divide D.
        linear_units: Width of the feed-forward layers.
        num_blocks: Conformer layers.
        kernel_size: Taps K of the depthwise convolution; odd.
        subsampling_factor: Frames that become one row; a power of two.
        subsampling_channels: Channels C of the subsampling.
        scale_input: Multiply the subsampled rows by √D (NeMo's ``xscaling``).
        batch_norm: The convolutions carry batch norms of their own; False once they are folded.
        norm_eps: Epsilon of the layer norms and batch norms.
    """

    kind: str = "fastconformer"
    input_size: int = 128
    output_size: int = 1024
    attention_heads: int = 8
    linear_units: int = 4096
    num_blocks: int = 32
    kernel_size: int = 9
    subsampling_factor: int = 8
    subsampling_channels: int = 256
    scale_input: bool = False
    batch_norm: bool = True
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.kind != "fastconformer":
            raise ValueError(f"[FastConformerConfig] kind must be 'fastconformer' but got {self.kind!r}")
        for name in ("input_size", "output_size", "attention_heads", "linear_units", "num_blocks", "kernel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"[FastConformerConfig] {name} must be at least 1 but got {getattr(self, name)}")
        if self.subsampling_channels < 1:
            raise ValueError(
                f"[FastConformerConfig] subsampling_channels must be at least 1 but got {self.subsampling_channels}"
            )
        if self.output_size % self.attention_heads:
            raise ValueError(
                f"[FastConformerConfig] attention_heads must divide output_size {self.output_size} "
                f"but got {self.attention_heads}"
            )
        if self.output_size % 2:
            raise ValueError(f"[FastConformerConfig] output_size must be even but got {self.output_size}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"[FastConformerConfig] kernel_size must be odd but got {self.kernel_size}")
        if self.subsampling_factor < 2 or self.subsampling_factor & (self.subsampling_factor - 1):
            raise ValueError(
                f"[FastConformerConfig] subsampling_factor must be a power of two but got {self.subsampling_factor}"
            )

    @property
    def subsampling_stages(self) -> int:
        """Convolutions of stride 2."""
        return self.subsampling_factor.bit_length() - 1

    def rows(self, frames: int) -> int:
        """Return the rows R that `frames` frames become: each started group of ``subsampling_factor`` counts."""
        return -(-frames // self.subsampling_factor)


def relative_positions(rows: int, depth: int) -> mx.array:
    """Return the encodings of the distances rows - 1 … 1 - rows, (2 · rows - 1, depth), always float32.

    Sines stand in the even columns and cosines in the odd ones, of the distance times 10000 ** (-column / depth).
    """
    inverse = mx.exp(mx.arange(0, depth, 2, dtype=mx.float32) * (-math.log(10000.0) / depth))
    angles = mx.arange(rows - 1, -rows, -1, dtype=mx.float32)[:, None] * inverse[None, :]
    return mx.stack([mx.sin(angles), mx.cos(angles)], axis=-1).reshape(2 * rows - 1, depth)


def align_distances(scores: mx.array) -> mx.array:
    """Turn scores by distance (B, H, R, 2R - 1) into scores by key (B, H, R, R).

    Query i and key j are i - j apart, which is column R - 1 - i + j: one step in i is 2R - 2 elements, one in j is 1.
    """
    batch, heads, rows, distances = scores.shape
    strides = (heads * rows * distances, rows * distances, distances - 1, 1)
    return mx.as_strided(mx.contiguous(scores), (batch, heads, rows, rows), strides, offset=rows - 1)


def keep_rows(x: mx.array, mask: mx.array | None) -> mx.array:
    """Put zeros where mask (B, R) is False in x (B, R, ...)."""
    if mask is None:
        return x
    return mx.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, mx.zeros((), dtype=x.dtype))


class ConvSubsampling(nn.Module):
    """Strided convolutions over time and frequency: one full, then pairs of depthwise and pointwise ones.

    ``conv`` keeps the checkpoint's numbering, in which the activations count too.
    """

    def __init__(self, config: FastConformerConfig) -> None:
        super().__init__()
        channels, bins = config.subsampling_channels, config.input_size
        self.conv: list[nn.Module] = [nn.Conv2d(1, channels, 3, stride=2, padding=1), nn.ReLU()]
        for _ in range(config.subsampling_stages - 1):
            depthwise = nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels)
            self.conv += [depthwise, nn.Linear(channels, channels), nn.ReLU()]
        self.out = nn.Linear(channels * -(-bins // config.subsampling_factor), config.output_size)

    def __call__(self, features: mx.array, mask: mx.array | None) -> tuple[mx.array, mx.array | None]:
        """Map features (B, T, F) to rows (B, R, D); the mask (B, T) becomes (B, R)."""
        x = features[..., None]
        for layer in self.conv:
            if isinstance(layer, nn.Conv2d):
                # The window of a real row's last frame reaches into the padding, which biases fill at every step.
                x = layer(keep_rows(x, mask))
                mask = None if mask is None else mask[:, ::2]
            else:
                x = layer(x)
        batch, rows, bins, channels = x.shape
        return self.out(x.swapaxes(2, 3).reshape(batch, rows, channels * bins)), mask


class FeedForward(nn.Module):
    """Two linear layers with a SiLU between them."""

    def __init__(self, config: FastConformerConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(config.output_size, config.linear_units)
        self.linear2 = nn.Linear(config.linear_units, config.output_size)

    def __call__(self, x: mx.array) -> mx.array:
        """Map (B, R, D) to (B, R, D)."""
        return self.linear2(nn.silu(self.linear1(x)))


class RelativeAttention(nn.Module):
    """Self-attention whose scores add a term for the distance; both terms have a bias of their own (Transformer-XL)."""

    def __init__(self, config: FastConformerConfig) -> None:
        super().__init__()
        size, self.heads = config.output_size, config.attention_heads
        self.linear_q = nn.Linear(size, size)
        self.linear_k = nn.Linear(size, size)
        self.linear_v = nn.Linear(size, size)
        self.linear_out = nn.Linear(size, size)
        self.linear_pos = nn.Linear(size, size, bias=False)
        self.pos_bias_u = mx.zeros((self.heads, size // self.heads))
        self.pos_bias_v = mx.zeros((self.heads, size // self.heads))

    def __call__(self, x: mx.array, positions: mx.array, mask: mx.array | None) -> mx.array:
        """Attend over rows x (B, R, D) where mask (B, R) is True, positions (2R - 1, D); returns (B, R, D)."""
        batch, rows, size = x.shape
        width = size // self.heads
        scale = width**-0.5
        q = self.linear_q(x).reshape(batch, rows, self.heads, width)
        k, v = (f(x).reshape(batch, rows, self.heads, width).swapaxes(1, 2) for f in (self.linear_k, self.linear_v))
        distances = self.linear_pos(positions).reshape(1, -1, self.heads, width).transpose(0, 2, 3, 1)
        by_distance = ((q + self.pos_bias_v).swapaxes(1, 2) * scale) @ distances
        bias = align_distances(by_distance)
        if mask is not None:
            # The least finite number, not minus infinity: an item without any real row must not become NaN.
            bias = mx.where(mask[:, None, None, :], bias, mx.finfo(bias.dtype).min)
        content = (q + self.pos_bias_u).swapaxes(1, 2)
        context = mx.fast.scaled_dot_product_attention(content, k, v, scale=scale, mask=bias)
        return self.linear_out(context.swapaxes(1, 2).reshape(batch, rows, size))


class DepthwiseConv(nn.Module):
    """Depthwise convolution over rows that keeps their number; ``weight`` (D, K, 1) and ``bias`` (D,)."""

    def __init__(self, size: int, taps: int) -> None:
        super().__init__()
        self.weight = mx.random.uniform(-1.0, 1.0, (size, taps, 1)) * taps**-0.5
        self.bias = mx.zeros(size)

    def __call__(self, x: mx.array) -> mx.array:
        """Map (B, R, D) to (B, R, D)."""
        size, taps, _ = self.weight.shape
        if mx.default_device().type != mx.DeviceType.cpu:
            return mx.conv1d(x, self.weight, padding=taps // 2, groups=size) + self.bias
        # On the CPU the sum of shifted copies takes a third of the convolution's time.
        rows, padded = x.shape[1], mx.pad(x, [(0, 0), (taps // 2, taps // 2), (0, 0)])
        out = mx.broadcast_to(self.bias, x.shape)
        for tap in range(taps):
            out = out + padded[:, tap : tap + rows] * self.weight[:, tap, 0]
        return out


class BatchNorm(nn.Module):
    """Batch norm by the statistics of the original training, which nothing here updates."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = mx.ones(size)
        self.bias = mx.zeros(size)
        self.running_mean = mx.zeros(size)
        self.running_var = mx.ones(size)

    def factors(self) -> tuple[mx.array, mx.array]:
        """Return scale and shift (D,), float32, such that the norm is x · scale + shift."""
        weight, bias, mean, variance = (
            x.astype(mx.float32) for x in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * mx.rsqrt(variance + self.eps)
        return scale, bias - mean * scale

    def __call__(self, x: mx.array) -> mx.array:
        """Normalise (B, R, D)."""
        scale, shift = self.factors()
        return (x * scale + shift).astype(x.dtype)


class ConvModule(nn.Module):
    """Gated pointwise projection, depthwise convolution, batch norm, SiLU, pointwise projection."""

    def __init__(self, config: FastConformerConfig) -> None:
        super().__init__()
        size = config.output_size
        self.pointwise_conv1 = nn.Linear(size, 2 * size)
        self.depthwise_conv = DepthwiseConv(size, config.kernel_size)
        self.batch_norm: BatchNorm | None = BatchNorm(size, config.norm_eps) if config.batch_norm else None
        self.pointwise_conv2 = nn.Linear(size, size)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        """Map rows x (B, R, D) where mask (B, R) is True to (B, R, D)."""
        value, gate = mx.split(self.pointwise_conv1(x), 2, axis=-1)
        x = self.depthwise_conv(keep_rows(value * mx.sigmoid(gate), mask))
        if self.batch_norm is not None:
            x = self.batch_norm(x)
        return self.pointwise_conv2(nn.silu(x))

    def fold_batch_norm(self) -> None:
        """Take the batch norm into the depthwise convolution, which then computes both; does nothing the second time.

        Computed in float32 and stored in the convolution's own type.
        """
        if self.batch_norm is None:
            return
        conv = self.depthwise_conv
        scale, shift = self.batch_norm.factors()
        dtype = conv.weight.dtype
        conv.weight = (conv.weight * scale[:, None, None]).astype(dtype)
        conv.bias = (conv.bias * scale + shift).astype(dtype)
        self.batch_norm = None


class FastConformerLayer(nn.Module):
    """Half a feed-forward step, attention, convolution, half a feed-forward step: each pre-norm; then a norm."""

    def __init__(self, config: FastConformerConfig) -> None:
        super().__init__()
        size, eps = config.output_size, config.norm_eps
        self.norm_feed_forward1 = nn.LayerNorm(size, eps=eps)
        self.feed_forward1 = FeedForward(config)
        self.norm_self_att = nn.LayerNorm(size, eps=eps)
        self.self_attn = RelativeAttention(config)
        self.norm_conv = nn.LayerNorm(size, eps=eps)
        self.conv = ConvModule(config)
        self.norm_feed_forward2 = nn.LayerNorm(size, eps=eps)
        self.feed_forward2 = FeedForward(config)
        self.norm_out = nn.LayerNorm(size, eps=eps)

    def __call__(self, x: mx.array, positions: mx.array, mask: mx.array | None) -> mx.array:
        """Map rows x (B, R, D) where mask (B, R) is True, positions (2R - 1, D), to (B, R, D)."""
        x = x + 0.5 * self.feed_forward1(self.norm_feed_forward1(x))
        x = x + self.self_attn(self.norm_self_att(x), positions, mask)
        x = x + self.conv(self.norm_conv(x), mask)
        x = x + 0.5 * self.feed_forward2(self.norm_feed_forward2(x))
        return self.norm_out(x)


class FastConformerEncoder(nn.Module):
    """Subsampling and conformer layers, as NeMo's ``ConformerEncoder`` with ``dw_striding`` and ``rel_pos``.

    Args:
        config: Sizes.
    """

    def __init__(self, config: FastConformerConfig) -> None:
        super().__init__()
        self.config = config
        self.pre_encode = ConvSubsampling(config)
        self.layers = [FastConformerLayer(config) for _ in range(config.num_blocks)]

    def __call__(
        self,
        features: mx.array,
        mask: mx.array | None = None,
        *,
        language: str | Sequence[str] = "auto",
        use_itn: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """Encode a batch of features.

        Args:
            features: (B, T, F), normalised.
            mask: (B, T), bool, True on real frames; None when there is no padding. Real frames come first.
            language: Takes the place that other encoders have for it; this one is not told the language.
            use_itn: Likewise.

        Returns:
            Audio states (B, R, D) with R = ceil(T / subsampling_factor), and their mask (B, R). Rows outside the mask
            hold no meaning.

        Raises:
            ValueError: On a misshapen input.
        """
        batch, frames, width = features.shape
        if width != self.config.input_size:
            raise ValueError(f"[FastConformerEncoder] features must be {self.config.input_size} wide but got {width}")
        if mask is not None and mask.shape != (batch, frames):
            raise ValueError(f"[FastConformerEncoder] mask must be {(batch, frames)} but got {mask.shape}")
        x, mask = self.pre_encode(features.astype(self.pre_encode.out.weight.dtype), mask)
        if self.config.scale_input:
            x = x * self.config.output_size**0.5
        positions = relative_positions(x.shape[1], x.shape[2]).astype(x.dtype)
        for layer in self.layers:
            x = layer(x, positions, mask)
        return x, mx.ones(x.shape[:2], dtype=mx.bool_) if mask is None else mask

    def fold_batch_norms(self) -> None:
        """Take every batch norm into the convolution before it; the encoder then has no parameters of them.

        The result is the same up to rounding. A configuration saved afterwards says so (``batch_norm`` False).
        """
        for layer in self.layers:
            layer.conv.fold_batch_norm()
        self.config = replace(self.config, batch_norm=False)
