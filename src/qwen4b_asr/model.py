"""The whole network as one module tree; the names of its parameters are those of a converted checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .adaptor import Adaptor, AdaptorConfig
from .config import ModelConfig
from .decoder import Qwen3
from .encoder import EncoderConfig, SenseVoiceEncoder
from .fastconformer import FastConformerConfig, FastConformerEncoder
from .features import Frontend, FrontendConfig
from .mel import MelConfig, MelFrontend
from .nano_adaptor import NanoAdaptor, NanoAdaptorConfig, NanoCtc
from .projection import Projection, ProjectionConfig
from .quantization import quantize_modules

_MODULES: dict[type[Any], Callable[[Any], nn.Module]] = {
    FrontendConfig: Frontend,
    MelConfig: MelFrontend,
    EncoderConfig: SenseVoiceEncoder,
    FastConformerConfig: FastConformerEncoder,
    AdaptorConfig: Adaptor,
    NanoAdaptorConfig: NanoAdaptor,
    ProjectionConfig: Projection,
}


class SpeechModel(nn.Module):
    """Front end, encoder, and what comes behind them; `transcribe` and `recognise` run them in order.

    Attributes that a model does not have are missing: a recogniser without a language model has neither ``adaptor``
    nor ``decoder``. MLX arrays are lazy, so building the full-size tree costs nothing until weights are filled in.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.frontend = _build(config.frontend)
        self.audio_encoder = _build(config.encoder)
        if config.adaptor is not None:
            self.adaptor = _build(config.adaptor)
        if config.decoder is not None:
            self.decoder = Qwen3(config.decoder)
        if config.ctc is not None:
            self.ctc = NanoCtc(config.ctc)
        for stage, quantization in config.quantized_stages.items():
            quantize_modules(self.audio_encoder if stage == "encoder" else self.adaptor, quantization)

    def ctc_logits(self, audio_states: mx.array) -> mx.array:
        """Score the CTC symbols of audio states (B, R, D): (B, R, V), before the softmax.

        Raises:
            AttributeError: If the model has no CTC head.
        """
        head = self.ctc if "ctc" in self else self.audio_encoder
        logits: mx.array = head.ctc_logits(audio_states)
        return logits


def _build(config: Any) -> Any:
    return _MODULES[type(config)](config)
