"""Models to time: random weights of true shapes as a converted directory, and the files that the peers read.

Peers read what the original code's checkpoints look like: ``listen.safetensors`` with FunASR's names (``encoder.*``,
``embed.*``, ``ctc.*``; ``adaptor.*`` beside them) and a Hugging Face directory of the decoder, so that every side
computes with the same numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from qwen4b_asr.adaptor import AdaptorConfig
from qwen4b_asr.config import GenerationConfig, ModelConfig
from qwen4b_asr.decoder import DecoderConfig, Qwen3
from qwen4b_asr.encoder import EncoderConfig
from qwen4b_asr.features import FrontendConfig, frame_count
from qwen4b_asr.model import SpeechModel
from qwen4b_asr.nano_adaptor import NanoAdaptorConfig
from qwen4b_asr.nano_prompt import NanoPromptConfig
from qwen4b_asr.quantization import Quantization, Scheme

INDEX = "model.safetensors.index.json"
PROMPT_TOKENS = 24
"""Text rows around the audio rows, about as many as the prompts of the published models have."""

_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
_QWEN3: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        **{"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
        "num_attention_heads": 16,
    },
    "qwen3-1.7b": {
        **{"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28},
        "num_attention_heads": 16,
    },
    "qwen3-4b": {},
}
SHAPES = tuple(_QWEN3)
"""``qwen3-0.6b`` is Fun-ASR-Nano's composition; the others are the 4B system's, its adaptor as wide as they need."""


def shape_config(
    name: str, *, bits: int | None = None, layers: int | None = None, listens: bool = False
) -> ModelConfig:
    """Return the configuration of a model of true shapes.

    Args:
        name: One of `SHAPES`.
        bits: Bits of the decoder's matrices, in groups of 64; None leaves them as they are.
        layers: Layers of the decoder; None means all of them.
        listens: Leave out all of the decoder but its width.
    """
    quantization = None if bits is None else Quantization(Scheme(bits=bits))
    decoder = DecoderConfig(**_QWEN3[name], quantization=quantization)
    if layers is not None:
        decoder = replace(decoder, num_hidden_layers=layers)
    if listens:
        decoder = DecoderConfig(hidden_size=decoder.hidden_size, vocab_size=1, num_hidden_layers=0)
    front, stop = FrontendConfig(cmvn=False), GenerationConfig(stop_token_ids=(decoder.vocab_size - 1,))
    if name == "qwen3-0.6b":
        encoder = EncoderConfig(num_queries=0, vocab_size=0)
        return ModelConfig(name, front, encoder, NanoAdaptorConfig(), decoder, None, NanoPromptConfig(), stop)
    adaptor = AdaptorConfig(output_size=decoder.hidden_size)
    return ModelConfig(name, front, EncoderConfig(), adaptor, decoder, generation=stop)


def feature_rows(config: ModelConfig, seconds: float) -> int:
    """Return the rows L that so many seconds of audio give; encoders without low-frame-rate rows are not asked."""
    front = config.frontend
    assert isinstance(front, FrontendConfig)
    return math.ceil(frame_count(round(seconds * front.sample_rate), front) / front.lfr_n)


def prompt_length(config: ModelConfig, seconds: float) -> int:
    """Return the rows S of a prompt with so many seconds of audio."""
    if isinstance(config.frontend, FrontendConfig):
        rows = feature_rows(config, seconds) + config.query_frames - config.dropped_rows
    else:
        rows = math.ceil(seconds / 0.08)  # FastConformer's rows
    if isinstance(config.adaptor, NanoAdaptorConfig):
        rows = config.adaptor.rows_kept(rows)
    return PROMPT_TOKENS + rows


def write_random(config: ModelConfig, directory: Path, *, dtype: str = "float32", seed: int = 0) -> None:
    """Write a converted directory filled with noise, without a tokenizer.

    Args:
        config: Sizes.
        directory: Where to; made if it is not there.
        dtype: Of the decoder; the rest is float32.
        seed: Of the noise.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config.save(directory)
    rng = np.random.default_rng(seed)
    placed: dict[str, str] = {}
    flat: Any = tree_flatten(SpeechModel(config).parameters())  # lazy: shapes alone
    names = {name: value.shape for name, value in flat if not name.startswith("decoder.")}
    tensors = {name: noise(rng, name, shape) for name, shape in names.items()}
    _save(directory / "audio.safetensors", tensors, placed)
    tensors.clear()
    if config.decoder is not None:
        decoder = {f"decoder.{name}": value for name, value in _decoder_noise(rng, config.decoder, _DTYPES[dtype])}
        _save(directory / "decoder.safetensors", decoder, placed)
    index = {"metadata": {}, "weight_map": placed}
    (directory / INDEX).write_text(json.dumps(index), encoding="utf-8")


def noise(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> mx.array:
    """Return a parameter's noise, evaluated: matrices keep their input's scale, norms are near one, biases small."""
    value = mx.array(rng.standard_normal(shape, dtype=np.float32))  # ten times as fast as MLX's on a CPU
    if "embed" in name:
        value = value * 0.05  # so that the layers, and not the last token, decide what a tied head says
    elif len(shape) > 1:
        value = value / math.sqrt(math.prod(shape[1:]))
    else:
        value = 0.1 * value if name.endswith("bias") else 1 + 0.1 * value
    mx.eval(value)
    return value


def export_listen(model: SpeechModel, path: Path) -> None:
    """Write encoder, CTC head and adaptor with FunASR's names and layout."""
    tensors: dict[str, mx.array] = {}
    encoder: Any = tree_flatten(model.audio_encoder.parameters())
    for name, value in encoder:
        tensors[name] = value.transpose(0, 2, 1) if name.endswith("fsmn_block.weight") else value
    if "adaptor" in model:
        adaptor: Any = tree_flatten(model.adaptor.parameters())
        tensors |= {f"adaptor.{name}": value for name, value in adaptor}
    mx.save_safetensors(str(path), tensors)


def export_decoder(decoder: Qwen3, directory: Path) -> None:
    """Write the decoder as a Hugging Face directory that mlx-lm and transformers load."""
    directory.mkdir(parents=True, exist_ok=True)
    sizes = asdict(decoder.config)
    quantization = sizes.pop("quantization")
    sizes.pop("lora")
    config: dict[str, Any] = {
        **{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu"},
        **{"attention_bias": False, "use_sliding_window": False, "rope_scaling": None},
        **sizes,
    }
    if quantization:
        named = {path: scheme or False for path, scheme in quantization["overrides"].items()}
        config["quantization"] = {**quantization["default"], **named}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    flat: Any = tree_flatten(decoder.parameters())
    mx.save_safetensors(str(directory / "model.safetensors"), dict(flat), {"format": "mlx"})


def matrix_bytes(decoder: Qwen3) -> int:
    """Return the bytes of weights that one token reads: all but an embedding table that is no head."""
    flat: Any = tree_flatten(decoder.parameters())
    tied = decoder.config.tie_word_embeddings
    return sum(value.nbytes for name, value in flat if tied or not name.startswith("model.embed_tokens"))


def _decoder_noise(rng: np.random.Generator, config: DecoderConfig, dtype: mx.Dtype) -> Iterator[tuple[str, mx.array]]:
    flat: Any = tree_flatten(Qwen3(replace(config, quantization=None, lora=None)).parameters())
    for name, like in flat:
        value = noise(rng, name, like.shape)
        path = name.removesuffix(".weight")
        scheme = config.quantization.scheme(path) if config.quantization and len(like.shape) > 1 else None
        if scheme is None:
            arrays = {name: value.astype(dtype)}
        else:
            codes = mx.quantize(value.astype(dtype), scheme.group_size, scheme.bits, mode=scheme.mode)
            arrays = {
                f"{path}.{part}": array for part, array in zip(("weight", "scales", "biases"), codes, strict=False)
            }
        mx.eval(list(arrays.values()))
        yield from arrays.items()


def _save(path: Path, tensors: dict[str, mx.array], placed: dict[str, str]) -> None:
    mx.save_safetensors(str(path), tensors)
    placed.update(dict.fromkeys(tensors, path.name))
