"""The adaptor of Canary-Qwen: one linear map from encoder rows to decoder rows.

Source: ``AudioPerceptionModule.proj`` in NeMo's ``nemo/collections/speechlm2/modules/perception.py``.
Shapes: B batch, A audio rows, D encoder width, H decoder width.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class ProjectionConfig:
    """Sizes of the projection; the defaults are Canary-Qwen's.

    Args:
        kind: Names this adaptor in a model's configuration.
        input_size: Encoder width D.
        output_size: Decoder width H.
    """

    kind: str = "projection"
    input_size: int = 1024
    output_size: int = 2048

    def __post_init__(self) -> None:
        if self.kind != "projection":
            raise ValueError(f"[ProjectionConfig] kind must be 'projection' but got {self.kind!r}")
        for name in ("input_size", "output_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"[ProjectionConfig] {name} must be at least 1 but got {getattr(self, name)}")


class Projection(nn.Module):
    """Map audio states to rows that the decoder reads like token embeddings.

    Args:
        config: Sizes.
    """

    def __init__(self, config: ProjectionConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Linear(config.input_size, config.output_size)

    def __call__(self, audio_states: mx.array, mask: mx.array | None = None) -> mx.array:
        """Project audio states.

        Args:
            audio_states: (B, A, D).
            mask: Takes the place that other adaptors have for it; each row is mapped by itself.

        Returns:
            Audio embeddings (B, A, H).

        Raises:
            ValueError: If the width is not the projection's.
        """
        width = audio_states.shape[-1]
        if width != self.config.input_size:
            raise ValueError(f"[Projection] audio states must be {self.config.input_size} wide but got {width}")
        return self.proj(audio_states.astype(self.proj.bias.dtype))
