"""The whole network as one module tree; the names of its parameters are those of a converted checkpoint."""

from __future__ import annotations

import mlx.nn as nn

from .adaptor import Adaptor
from .config import ModelConfig
from .decoder import Qwen3
from .encoder import SenseVoiceEncoder
from .features import Frontend


class SpeechModel(nn.Module):
    """Front end, encoder, adaptor and decoder; `transcribe.Transcriber` runs them in order.

    MLX arrays are lazy, so building the full-size tree costs nothing until weights are filled in.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.frontend = Frontend(config.frontend)
        self.audio_encoder = SenseVoiceEncoder(config.encoder)
        self.adaptor = Adaptor(config.adaptor)
        self.decoder = Qwen3(config.decoder)
