"""The adaptor of Fun-ASR-Nano and its CTC branch: two linear layers, then pre-norm transformer blocks.

Source of the maths: FunASR's ``funasr/models/llm_asr/adaptor.py`` (``Transformer``, ``downsample_rate`` 1), its blocks
``funasr/models/transformer/encoder.py`` (``EncoderLayer``), and ``funasr/models/fun_asr_nano/model.py`` for the rows
that the language model gets.
Shapes: B batch, L audio states, A audio rows, D encoder width, H output width, V symbols.
Module attributes carry the names of FunASR's ``model.pt``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from .kernels.attention import attention

KIND = "nano"
# Three halvings, each rounded up.
_ROWS_PER_ROW = 8


@dataclass(frozen=True)
class NanoAdaptorConfig:
    """Sizes of the adaptor; the defaults are Fun-ASR-Nano's and MLT-Nano's.

    Args:
        kind: ``nano``, which tells it from other adaptors in a model's configuration.
        input_size: Encoder width D.
        hidden_size: Width between the two linear layers.
        output_size: Decoder width H.
        num_layers: Blocks behind the linear layers.
        num_heads: Attention heads; must divide H.
        ffn_size: Width of the blocks' feed-forward layers; FunASR's is always H / 4.
        norm_eps: Epsilon of the layer norms: 1e-12 in FunASR, which trained the weights, 1e-5 in transformers.
        low_frame_rate: Give the decoder only the first eighth of the rows, as FunASR's inference does. With every row,
            which is what transformers gives, FunASR warns that the text may run in circles.
    """

    kind: str = KIND
    input_size: int = 512
    hidden_size: int = 2048
    output_size: int = 1024
    num_layers: int = 2
    num_heads: int = 8
    ffn_size: int = 256
    norm_eps: float = 1e-12
    low_frame_rate: bool = True

    def __post_init__(self) -> None:
        if self.kind != KIND:
            raise ValueError(f"[NanoAdaptorConfig] kind must be {KIND!r} but got {self.kind!r}")
        for name in ("input_size", "hidden_size", "output_size", "num_heads", "ffn_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"[NanoAdaptorConfig] {name} must be at least 1 but got {getattr(self, name)}")
        if self.num_layers < 0:
            raise ValueError(f"[NanoAdaptorConfig] num_layers must not be negative but got {self.num_layers}")
        if self.output_size % self.num_heads:
            raise ValueError(
                f"[NanoAdaptorConfig] num_heads must divide output_size {self.output_size} but got {self.num_heads}"
            )
        if self.norm_eps <= 0:
            raise ValueError(f"[NanoAdaptorConfig] norm_eps must be positive but got {self.norm_eps}")

    def rows_kept(self, rows: int) -> int:
        """Return how many of an utterance's `rows` the decoder gets."""
        return rows_kept(rows) if self.low_frame_rate else rows


def rows_kept(rows: int) -> int:
    """Return FunASR's number of audio rows for the decoder: an eighth of `rows`, rounded up.

    FunASR writes it as three times (n - 1) // 2 + 1, as if three convolutions of stride 2 had halved the rows. None
    does: the adaptor was trained to put what it heard into the first rows, and the others are thrown away.

    Raises:
        ValueError: If `rows` is negative.
    """
    if rows < 0:
        raise ValueError(f"[rows_kept] rows must not be negative but got {rows}")
    return -(-rows // _ROWS_PER_ROW)


class BlockAttention(nn.Module):
    """Multi-head self-attention with biases."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.linear_q = nn.Linear(size, size)
        self.linear_k = nn.Linear(size, size)
        self.linear_v = nn.Linear(size, size)
        self.linear_out = nn.Linear(size, size)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        """Attend over rows x (B, L, H) where mask (B, L) is True; returns (B, L, H)."""
        batch, rows, _ = x.shape
        q, k, v = (
            linear(x).reshape(batch, rows, self.heads, -1).swapaxes(1, 2)
            for linear in (self.linear_q, self.linear_k, self.linear_v)
        )
        context = attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)
        return self.linear_out(context.swapaxes(1, 2).reshape(batch, rows, -1))


class BlockFeedForward(nn.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(size, hidden)
        self.w_2 = nn.Linear(hidden, size)

    def __call__(self, x: mx.array) -> mx.array:
        """Map (B, L, H) to (B, L, H)."""
        return self.w_2(nn.relu(self.w_1(x)))


class NanoBlock(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: NanoAdaptorConfig) -> None:
        super().__init__()
        size = config.output_size
        self.self_attn = BlockAttention(size, config.num_heads)
        self.feed_forward = BlockFeedForward(size, config.ffn_size)
        self.norm1 = nn.LayerNorm(size, eps=config.norm_eps)
        self.norm2 = nn.LayerNorm(size, eps=config.norm_eps)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        """Map x (B, L, H) to (B, L, H)."""
        x = x + self.self_attn(self.norm1(x), mask)
        return x + self.feed_forward(self.norm2(x))


class NanoAdaptor(nn.Module):
    """Map audio states to rows that the decoder reads like token embeddings.

    Args:
        config: Sizes, and the rule for the rows that are kept.
    """

    def __init__(self, config: NanoAdaptorConfig) -> None:
        super().__init__()
        self.config = config
        self.linear1 = nn.Linear(config.input_size, config.hidden_size)
        self.linear2 = nn.Linear(config.hidden_size, config.output_size)
        self.blocks = [NanoBlock(config) for _ in range(config.num_layers)]

    def __call__(
        self, audio_states: mx.array, mask: mx.array | None = None, *, low_frame_rate: bool | None = None
    ) -> mx.array:
        """Project audio states, and keep the rows for the decoder.

        Args:
            audio_states: (B, L, D).
            mask: (B, L), bool, True on real rows, which come first; None when there is no padding.
            low_frame_rate: Overrides the configuration's rule for the rows that are kept.

        Returns:
            Audio embeddings (B, A, H), A = ``config.rows_kept(L)``. Of an item with n real rows in a padded batch, the
            first ``config.rows_kept(n)`` have a meaning.

        Raises:
            ValueError: If the width is not the adaptor's.
        """
        batch, rows, width = audio_states.shape
        if width != self.config.input_size:
            raise ValueError(f"[NanoAdaptor] audio states must be {self.config.input_size} wide but got {width}")
        if mask is None:
            mask = mx.ones((batch, rows), dtype=mx.bool_)
        x = self.linear2(nn.relu(self.linear1(audio_states.astype(self.linear1.bias.dtype))))
        for block in self.blocks:
            x = block(x, mask)
        if low_frame_rate is None:
            low_frame_rate = self.config.low_frame_rate
        return x[:, : rows_kept(rows)] if low_frame_rate else x


def _ctc_transformer() -> NanoAdaptorConfig:
    return NanoAdaptorConfig(output_size=512, num_layers=5, ffn_size=128, low_frame_rate=False)


@dataclass(frozen=True)
class NanoCtcConfig:
    """Sizes of the CTC branch; the defaults are those of Fun-ASR-Nano's files that have one.

    Args:
        kind: ``nano``, as in `NanoAdaptorConfig`.
        transformer: The layers under the head, all of whose rows are kept.
        vocab_size: Symbols V.
        blank_id: CTC blank; None stands for the last symbol.
    """

    kind: str = KIND
    transformer: NanoAdaptorConfig = field(default_factory=_ctc_transformer)
    vocab_size: int = 60515
    blank_id: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.transformer, dict):  # as it is read from a configuration file
            object.__setattr__(self, "transformer", NanoAdaptorConfig(**self.transformer))
        if self.kind != KIND:
            raise ValueError(f"[NanoCtcConfig] kind must be {KIND!r} but got {self.kind!r}")
        if self.vocab_size < 2:
            raise ValueError(f"[NanoCtcConfig] vocab_size must be at least 2 but got {self.vocab_size}")
        if self.blank_id is None:
            object.__setattr__(self, "blank_id", self.vocab_size - 1)
        elif not 0 <= self.blank_id < self.vocab_size:
            raise ValueError(f"[NanoCtcConfig] blank_id must lie below {self.vocab_size} but got {self.blank_id}")
        if self.transformer.low_frame_rate:
            raise ValueError("[NanoCtcConfig] transformer.low_frame_rate must be False but got True")


class SymbolHead(nn.Module):
    """Linear map to the CTC symbols, under the checkpoint's name ``ctc_lo``."""

    def __init__(self, size: int, vocab_size: int) -> None:
        super().__init__()
        self.ctc_lo = nn.Linear(size, vocab_size)


class NanoCtc(nn.Module):
    """The CTC branch: a transformer of its own on the audio states, then the head.

    Fun-ASR-Nano writes its text with the language model; the branch is there for times. Files without it have no
    times to give: see `NO_CTC`.

    Args:
        config: Sizes.
    """

    def __init__(self, config: NanoCtcConfig) -> None:
        super().__init__()
        self.config = config
        self.ctc_decoder = NanoAdaptor(config.transformer)
        self.ctc = SymbolHead(config.transformer.output_size, config.vocab_size)

    def ctc_logits(self, audio_states: mx.array, mask: mx.array | None = None) -> mx.array:
        """Score the CTC symbols.

        Args:
            audio_states: (B, L, D), from the encoder.
            mask: (B, L), bool, True on real rows; None when there is no padding.

        Returns:
            Scores (B, L, V), before the softmax.
        """
        return self.ctc.ctc_lo(self.ctc_decoder(audio_states, mask))


NO_CTC = (
    "this checkpoint has no CTC branch (ctc_decoder.*, ctc.*), from which Fun-ASR-Nano's times come: "
    "its text has none, and none are made up"
)
