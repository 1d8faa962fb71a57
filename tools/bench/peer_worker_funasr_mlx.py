# mypy: disable-error-code="import-not-found,import-untyped,no-any-return"
"""funasr-mlx's side of `tools/bench_transcribe.py`: its SenseVoice encoder and Nano adaptor, on the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from funasr_mlx.models import fun_asr_nano, sensevoice

from bench.mlx_peer import about, evaluated, peak, to_numpy
from bench.worker import Stage, Worker


def build(setup: dict[str, Any]) -> Worker:
    """Fill SenseVoiceSmall, or the encoder alone and Nano's adaptor where it has no query frames."""
    config = setup["config"]
    sizes = dict(config["encoder"])
    sizes["sanm_shfit"] = sizes.pop("sanm_shift")
    encoder_config = sensevoice.SenseVoiceEncoderSmallConfig.from_dict(sizes)
    weights: Any = mx.load(str(Path(setup["home"]) / "listen.safetensors"))
    queries = bool(sizes["num_queries"])
    model = sensevoice.SenseVoiceSmall(
        sensevoice.SenseVoiceSmallConfig(
            input_size=sizes["input_size"], vocab_size=max(sizes["vocab_size"], 2), encoder_conf=encoder_config
        )
    )
    target, prefix = (model, "") if queries else (model.encoder, "encoder.")
    own = {n.removeprefix(prefix): v for n, v in weights.items() if not n.startswith("adaptor.")}
    sensevoice.load_strict(target, own, convert=True)
    mx.eval(target.parameters())
    adaptor = None if queries else _adaptor(config["adaptor"], weights)

    def stages(inputs: Mapping[str, np.ndarray]) -> dict[str, Stage]:
        features, states = mx.array(inputs["features"]), mx.array(inputs["states"])
        rows = mx.array([features.shape[1]], dtype=mx.int32)
        if adaptor is None:
            return {
                "encoder": lambda: evaluated(model.encode(features, rows)[0]),
                "ctc head": lambda: evaluated(model.ctc(states)),
            }
        heard = states.shape[1]
        kept = -(-heard // 8) if config["adaptor"]["low_frame_rate"] else heard
        return {
            "encoder": lambda: evaluated(model.encoder(features, rows)[0]),
            "adaptor": lambda: evaluated(adaptor(states))[:, :kept],
        }

    return Worker(about("funasr-mlx"), stages, to_numpy, peak)


def _adaptor(config: dict[str, Any], weights: dict[str, mx.array]) -> Any:
    adaptor = fun_asr_nano.TransformerAdaptor(
        fun_asr_nano.AdaptorConfig(
            encoder_dim=config["input_size"],
            llm_dim=config["output_size"],
            ffn_dim=config["hidden_size"],
            n_layer=config["num_layers"],
            attention_heads=config["num_heads"],
        )
    )
    own = {name.removeprefix("adaptor."): value for name, value in weights.items() if name.startswith("adaptor.")}
    adaptor.load_weights(list(own.items()))
    mx.eval(adaptor.parameters())
    return adaptor
