# mypy: disable-error-code="import-not-found,import-untyped,no-any-return"
"""mlx-audio's side of `tools/bench_transcribe.py`: its sensevoice and fun_asr_nano modules, on the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_audio.stt.models.fun_asr_nano import fun_asr_nano as nano
from mlx_audio.stt.models.fun_asr_nano.config import AdaptorConfig, SenseVoiceEncoderConfig
from mlx_audio.stt.models.sensevoice import config as sensevoice_config
from mlx_audio.stt.models.sensevoice.sensevoice import SenseVoiceSmall

from bench.mlx_peer import about, evaluated, peak, to_numpy
from bench.worker import Stage, Worker


def build(setup: dict[str, Any]) -> Worker:
    """Fill SenseVoiceSmall, or Nano's encoder and adaptor where the encoder has no query frames."""
    config = setup["config"]
    weights: Any = mx.load(str(Path(setup["home"]) / "listen.safetensors"))
    stages = _nano(config, weights) if not config["encoder"]["num_queries"] else _sensevoice(config, weights)
    return Worker(about("mlx-audio"), stages, to_numpy, peak)


def _sizes(encoder: dict[str, Any]) -> dict[str, Any]:
    same = ("output_size", "attention_heads", "linear_units", "num_blocks", "tp_blocks", "kernel_size", "sanm_shift")
    return {name: encoder[name] for name in same}


def _sensevoice(config: dict[str, Any], weights: dict[str, mx.array]) -> Any:
    encoder = config["encoder"]
    model = SenseVoiceSmall(
        sensevoice_config.ModelConfig(
            vocab_size=encoder["vocab_size"],
            input_size=encoder["input_size"],
            encoder_conf=sensevoice_config.EncoderConfig(**_sizes(encoder)),
            frontend_conf=sensevoice_config.FrontendConfig(),
        )
    )
    own = {name: value for name, value in weights.items() if not name.startswith("adaptor.")}
    model.load_weights(list(SenseVoiceSmall.sanitize(own).items()))
    model.eval()
    mx.eval(model.parameters())

    def encode(features: mx.array) -> mx.array:
        text_norm, query = model._build_query(1)
        return evaluated(model.encoder(mx.concatenate([query, text_norm, features], axis=1)))

    def stages(inputs: Mapping[str, np.ndarray]) -> dict[str, Stage]:
        samples, features, states = (mx.array(inputs[name]) for name in ("samples", "features", "states"))
        found: dict[str, Stage] = {
            "encoder": lambda: encode(features),
            "ctc head": lambda: evaluated(model.ctc_lo(states)),
        }
        front = config["frontend"]
        if not front["cmvn"] and (front["lfr_m"], front["lfr_n"]) == (7, 6):  # the statistics do not travel
            found["features"] = lambda: evaluated(model._extract_features(samples))
        return found

    return stages


def _nano(config: dict[str, Any], weights: dict[str, mx.array]) -> Any:
    encoder_config, adaptor_config = config["encoder"], config["adaptor"]
    encoder = nano.SenseVoiceEncoderSmall(
        encoder_config["input_size"], SenseVoiceEncoderConfig(**_sizes(encoder_config))
    )
    adaptor = nano.AudioAdaptorTransformer(
        AdaptorConfig(
            ffn_dim=adaptor_config["hidden_size"],
            llm_dim=adaptor_config["output_size"],
            encoder_dim=adaptor_config["input_size"],
            n_layer=adaptor_config["num_layers"],
            attention_heads=adaptor_config["num_heads"],
        )
    )
    for module, prefix in ((encoder, "encoder."), (adaptor, "adaptor.")):
        own = {
            name.removeprefix(prefix): value.transpose(0, 2, 1) if "fsmn_block" in name else value
            for name, value in weights.items()
            if name.startswith(prefix)
        }
        module.load_weights(list(own.items()))
        module.eval()
        mx.eval(module.parameters())

    def stages(inputs: Mapping[str, np.ndarray]) -> dict[str, Stage]:
        features, states = mx.array(inputs["features"]), mx.array(inputs["states"])
        rows = mx.array([features.shape[1]])
        heard = states.shape[1]
        kept = -(-heard // 8) if adaptor_config["low_frame_rate"] else heard
        return {
            "encoder": lambda: evaluated(encoder(features, rows)[0]),
            "adaptor": lambda: evaluated(adaptor(states, rows)[0])[:, :kept],
        }

    return stages
