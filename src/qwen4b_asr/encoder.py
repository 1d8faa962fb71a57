"""SenseVoiceSmall's encoder: self-attention with a memory block (SANM), four query frames, a CTC head.

Fun-ASR-Nano has the same layers with neither query frames nor this head: ``num_queries=0, vocab_size=0``.

Source of the maths: FunASR's ``funasr/models/sense_voice/model.py`` (``SenseVoiceEncoderSmall``) and
"SAN-M: Memory Equipped Self-Attention for End-to-End Speech Recognition" (Gao et al., 2020).
Shapes: B batch, L feature rows, F feature width, R = L + 4 rows (L without queries), D encoder width, K memory taps,
V symbols.
Module attributes carry the checkpoint's names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .kernels.attention import attention
from .kernels.fsmn import fsmn

# Rows of the checkpoint's `embed` table.
LANGUAGE_QUERIES = {"auto": 0, "zh": 3, "en": 4, "yue": 7, "ja": 11, "ko": 12, "nospeech": 13}
EVENT_QUERIES = (1, 2)
WITH_ITN_QUERY = 14
WITHOUT_ITN_QUERY = 15
NUM_QUERY_FRAMES = 4


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the encoder; the defaults are SenseVoiceSmall's.

    Args:
        input_size: Feature width F.
        output_size: Encoder width D.
        attention_heads: Attention heads; must divide D.
        linear_units: Width of the feed-forward layers.
        num_blocks: Layers before ``after_norm``, the first of which maps F to D.
        tp_blocks: Layers between ``after_norm`` and ``tp_norm``.
        kernel_size: Taps K of the memory block.
        sanm_shift: Frames by which the memory block looks further back than ahead.
        num_queries: Rows of the query embedding table; 0 leaves table and query frames out.
        vocab_size: Symbols V of the CTC head; 0 leaves the head out.
        blank_id: CTC blank.
        norm_eps: Epsilon of the layer norms.
    """

    input_size: int = 560
    output_size: int = 512
    attention_heads: int = 4
    linear_units: int = 2048
    num_blocks: int = 50
    tp_blocks: int = 20
    kernel_size: int = 11
    sanm_shift: int = 0
    num_queries: int = 16
    vocab_size: int = 25055
    blank_id: int = 0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("input_size", "output_size", "attention_heads", "linear_units", "num_blocks", "kernel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"[EncoderConfig] {name} must be at least 1 but got {getattr(self, name)}")
        if self.tp_blocks < 0 or self.vocab_size < 0:
            raise ValueError(
                f"[EncoderConfig] tp_blocks and vocab_size must not be negative but got "
                f"{self.tp_blocks} and {self.vocab_size}"
            )
        if self.output_size % self.attention_heads:
            raise ValueError(
                f"[EncoderConfig] attention_heads must divide output_size {self.output_size} "
                f"but got {self.attention_heads}"
            )
        if self.input_size % 2:
            raise ValueError(f"[EncoderConfig] input_size must be even but got {self.input_size}")
        if not 0 <= self.left_context < self.kernel_size:
            raise ValueError(
                f"[EncoderConfig] sanm_shift must keep the memory inside its kernel but got {self.sanm_shift}"
            )
        if self.num_queries and self.num_queries <= WITHOUT_ITN_QUERY:
            raise ValueError(
                f"[EncoderConfig] num_queries must be 0 or at least {WITHOUT_ITN_QUERY + 1} but got {self.num_queries}"
            )

    @property
    def left_context(self) -> int:
        """Rows that the memory block sees before the current one."""
        return (self.kernel_size - 1) // 2 + max(self.sanm_shift, 0)

    @property
    def query_frames(self) -> int:
        """Rows that the encoder puts before the features'."""
        return NUM_QUERY_FRAMES if self.num_queries else 0


def sinusoidal_positions(length: int, depth: int) -> mx.array:
    """Return positions counted from 1 as [sin | cos], (length, depth), always float32.

    FunASR's ``SinusoidalPositionEncoder``: the inverse time scales run from 1 to 1e-4 over depth / 2 - 1 steps.
    """
    half = depth // 2
    inverse = mx.exp(mx.arange(half, dtype=mx.float32) * (-math.log(10000.0) / max(half - 1, 1)))
    angles = mx.arange(1, length + 1, dtype=mx.float32)[:, None] * inverse[None, :]
    return mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=1)


class DepthwiseTaps(nn.Module):
    """The weight of a depthwise convolution (D, K, 1), under the checkpoint's name ``fsmn_block.weight``."""

    def __init__(self, size: int, taps: int) -> None:
        super().__init__()
        self.weight = mx.random.uniform(-1.0, 1.0, (size, taps, 1)) * taps**-0.5


class SanmAttention(nn.Module):
    """Multi-head self-attention whose values also pass a memory block."""

    def __init__(self, input_size: int, config: EncoderConfig) -> None:
        super().__init__()
        size = config.output_size
        self.heads = config.attention_heads
        self.left_context = config.left_context
        self.linear_q_k_v = nn.Linear(input_size, 3 * size)
        self.linear_out = nn.Linear(size, size)
        self.fsmn_block = DepthwiseTaps(size, config.kernel_size)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        """Attend over rows x (B, R, input_size) where mask (B, R) is True; returns (B, R, D)."""
        batch, rows, _ = x.shape
        packed = self.linear_q_k_v(x)
        # Training prefers shifted adds on every device: their gradient is the quicker one.
        adds = True if self.training else None
        memory = fsmn(packed, self.fsmn_block.weight, mask, left=self.left_context, shifted_adds=adds)
        q, k, v = (t.reshape(batch, rows, self.heads, -1).swapaxes(1, 2) for t in mx.split(packed, 3, axis=-1))
        context = attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)
        return self.linear_out(context.swapaxes(1, 2).reshape(batch, rows, -1)) + memory


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(size, hidden)
        self.w_2 = nn.Linear(hidden, size)

    def __call__(self, x: mx.array) -> mx.array:
        """Map (B, R, D) to (B, R, D)."""
        return self.w_2(nn.relu(self.w_1(x)))


class SanmLayer(nn.Module):
    """Pre-norm layer; the one that changes the width has no residual around its attention."""

    def __init__(self, input_size: int, config: EncoderConfig) -> None:
        super().__init__()
        self.self_attn = SanmAttention(input_size, config)
        self.feed_forward = FeedForward(config.output_size, config.linear_units)
        self.norm1 = nn.LayerNorm(input_size, eps=config.norm_eps)
        self.norm2 = nn.LayerNorm(config.output_size, eps=config.norm_eps)
        self.residual = input_size == config.output_size

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        """Map x (B, R, input_size) to (B, R, D)."""
        attended = self.self_attn(self.norm1(x), mask)
        x = x + attended if self.residual else attended
        return x + self.feed_forward(self.norm2(x))


class SanmEncoder(nn.Module):
    """The layers: ``encoders0``, ``encoders``, ``after_norm``, ``tp_encoders``, ``tp_norm``."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size = config.output_size
        self.scale = size**0.5
        self.encoders0 = [SanmLayer(config.input_size, config)]
        self.encoders = [SanmLayer(size, config) for _ in range(config.num_blocks - 1)]
        self.after_norm = nn.LayerNorm(size, eps=config.norm_eps)
        self.tp_encoders = [SanmLayer(size, config) for _ in range(config.tp_blocks)]
        self.tp_norm = nn.LayerNorm(size, eps=config.norm_eps)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        """Encode rows x (B, R, F), query frames included; returns (B, R, D)."""
        dtype = x.dtype
        # Positions beyond a few hundred collapse in bfloat16, so the sum is always float32.
        x = x.astype(mx.float32) * self.scale + sinusoidal_positions(x.shape[1], x.shape[2])
        if not self.encoders0[0].residual:
            # Nothing but the first norm reads these rows, and it takes their mean away. Features that nobody normalised
            # have means of many deviations, on which one sum in float32 loses fifty times what torch does.
            x = x - mx.mean(x, axis=-1, keepdims=True)
        x = x.astype(dtype)
        for layer in (*self.encoders0, *self.encoders):
            x = layer(x, mask)
        x = self.after_norm(x)
        for layer in self.tp_encoders:
            x = layer(x, mask)
        return self.tp_norm(x)


class CtcHead(nn.Module):
    """Linear map to the CTC symbols."""

    def __init__(self, size: int, vocab_size: int) -> None:
        super().__init__()
        self.ctc_lo = nn.Linear(size, vocab_size)


class SenseVoiceEncoder(nn.Module):
    """Query frames, SANM layers and CTC head of SenseVoiceSmall, or the layers alone.

    Args:
        config: Sizes.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        if config.num_queries:
            self.embed = nn.Embedding(config.num_queries, config.input_size)
        self.encoder = SanmEncoder(config)
        if config.vocab_size:
            self.ctc = CtcHead(config.output_size, config.vocab_size)

    def __call__(
        self,
        features: mx.array,
        mask: mx.array | None = None,
        *,
        language: str | Sequence[str] = "auto",
        use_itn: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """Encode a batch of feature rows.

        Args:
            features: (B, L, F), normalised.
            mask: (B, L), bool, True on real rows; None when there is no padding. Real rows come first.
            language: Language query, one for all or one per utterance: auto, zh, en, yue, ja, ko, nospeech. Without
                query frames it has no effect, and neither has `use_itn`: such a model is asked in its prompt.
            use_itn: Ask for inverse text normalisation (digits, punctuation).

        Returns:
            Audio states (B, R, D), the query frames first, and their mask (B, R).

        Raises:
            ValueError: On a misshapen input or an unknown language.
        """
        batch, rows, width = features.shape
        if width != self.config.input_size:
            raise ValueError(f"[SenseVoiceEncoder] features must be {self.config.input_size} wide but got {width}")
        if mask is None:
            mask = mx.ones((batch, rows), dtype=mx.bool_)
        x = features.astype(self.encoder.after_norm.weight.dtype)
        if self.config.query_frames:
            x = mx.concatenate([self.embed(self._queries(batch, language, use_itn)), x], axis=1)
            mask = mx.concatenate([mx.ones((batch, NUM_QUERY_FRAMES), dtype=mx.bool_), mask], axis=1)
        return self.encoder(x, mask), mask

    def ctc_logits(self, audio_states: mx.array) -> mx.array:
        """Score the CTC symbols for audio states (B, R, D); returns (B, R, V).

        Raises:
            ValueError: If the checkpoint has no CTC head.
        """
        if not self.config.vocab_size:
            raise ValueError("[SenseVoiceEncoder] this checkpoint has no CTC head")
        return self.ctc.ctc_lo(audio_states)

    def _queries(self, batch: int, language: str | Sequence[str], use_itn: bool) -> mx.array:
        languages = [language] * batch if isinstance(language, str) else list(language)
        if len(languages) != batch:
            raise ValueError(f"[SenseVoiceEncoder] {batch} languages are needed but got {len(languages)}")
        for name in languages:
            if name not in LANGUAGE_QUERIES:
                raise ValueError(
                    f"[SenseVoiceEncoder] language must be one of {list(LANGUAGE_QUERIES)} but got {name!r}"
                )
        text_norm = WITH_ITN_QUERY if use_itn else WITHOUT_ITN_QUERY
        return mx.array([[LANGUAGE_QUERIES[name], *EVENT_QUERIES, text_norm] for name in languages])
