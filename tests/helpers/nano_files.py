"""Tiny checkpoints of Fun-ASR-Nano as users have them on disk, in each of the published layouts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from qwen4b_asr.decoder import DecoderConfig, Qwen3
from qwen4b_asr.encoder import EncoderConfig, SenseVoiceEncoder
from qwen4b_asr.nano_adaptor import NanoAdaptor, NanoAdaptorConfig, NanoCtc, NanoCtcConfig
from tests.helpers.tiny import byte_tokenizer
from tests.helpers.weights_parts import write_pt

Arrays = dict[str, mx.array]
Shapes = dict[str, tuple[int, ...]]

LAYOUTS = ("funasr", "hf", "hf-split", "hf-split-memory")
ENCODER = EncoderConfig(
    input_size=56, output_size=32, attention_heads=4, linear_units=48, num_blocks=3, tp_blocks=2, kernel_size=5,
    num_queries=0, vocab_size=0,
)  # fmt: skip
ADAPTOR = NanoAdaptorConfig(input_size=32, hidden_size=40, output_size=24, num_heads=4, ffn_size=6)
CTC = NanoCtcConfig(
    transformer=NanoAdaptorConfig(
        input_size=32, hidden_size=36, output_size=16, num_layers=3, num_heads=4, ffn_size=4, low_frame_rate=False
    ),
    vocab_size=19,
)
DECODER = DecoderConfig(
    vocab_size=300, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=4096,
)  # fmt: skip

_PARTS = {"audio_encoder.encoder": "audio_encoder", "adaptor": "audio_adaptor", "decoder": "llm", "ctc.ctc": "ctc"}
_GROUPED = {
    "encoders0.0.": "stem.", "encoders.": "layers.", "tp_encoders.": "timestamp_prediction_layers.",
    "after_norm.": "layer_norm.", "tp_norm.": "timestamp_prediction_layer_norm.",
}  # fmt: skip
_NAMES = {
    "hf": {
        "linear_out.": "o_proj.", "fsmn_block.": "fsmn.conv.", "feed_forward.w_": "mlp.fc",
        "norm1.": "input_layernorm.", "norm2.": "post_attention_layernorm.",
    },
    "hf-split": {
        "linear_out.": "out_proj.", "self_attn.fsmn_block.": "fsmn.conv.", "feed_forward.w_": "fc",
        "norm1.": "self_attn_layer_norm.", "norm2.": "final_layer_norm.",
    },
}  # fmt: skip
_NAMES["hf-split-memory"] = _NAMES["hf-split"] | {"self_attn.fsmn_block.": "feedforward_sequential_memory.conv."}
_BLOCKS = {
    "hf": "model.multi_modal_projector.layers.",
    "hf-split": "model.multi_modal_projector.blocks.",
    "hf-split-memory": "model.audio_adaptor.blocks.",
}


def whole(
    encoder: EncoderConfig, adaptor: NanoAdaptorConfig, decoder: DecoderConfig, ctc: NanoCtcConfig | None
) -> dict[str, nn.Module]:
    """The modules of a model by the place that they have in it."""
    modules = {
        "audio_encoder": SenseVoiceEncoder(encoder),
        "adaptor": NanoAdaptor(adaptor),
        "decoder": Qwen3(decoder),
    }
    return modules if ctc is None else {**modules, "ctc": NanoCtc(ctc)}


def shapes_of(modules: dict[str, nn.Module]) -> Shapes:
    """Shape of every parameter under its name in the whole model; nothing is evaluated."""
    flat = [(f"{part}.{n}", a) for part, module in modules.items() for n, a in tree_flatten(module.parameters())]
    return {name: tuple(array.shape) for name, array in flat}


def parameters(ctc: bool = True, seed: int = 0, exact: bool = True) -> Arrays:
    """Values for every parameter of the tiny model; if `exact`, such that bfloat16 holds them."""
    rng = np.random.default_rng(seed)
    shapes = shapes_of(whole(ENCODER, ADAPTOR, DECODER, CTC if ctc else None))
    noise = {name: mx.array(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}
    return {name: array.astype(mx.bfloat16).astype(mx.float32) if exact else array for name, array in noise.items()}


def published(values: Arrays, layout: str) -> Arrays:
    """The same under the names of a layout; only FunASR's has the CTC branch."""
    values = {n: a.transpose(0, 2, 1) if n.endswith("fsmn_block.weight") else a for n, a in values.items()}
    if layout == "funasr":
        return {_funasr_name(name): array for name, array in values.items()}
    tensors: Arrays = {}
    for name, array in values.items():
        if name.startswith("decoder."):
            tensors[f"model.language_model.{name.removeprefix('decoder.model.')}"] = array
        elif name.startswith("adaptor."):
            tensors[_projector_name(name.removeprefix("adaptor."), layout)] = array
        elif name.startswith("audio_encoder."):
            rest = name.removeprefix("audio_encoder.encoder.")
            rest = _numbered(rest) if layout == "hf" else _replaced(rest, _GROUPED)
            parts = zip("qkv", mx.split(array, 3), strict=True) if "linear_q_k_v" in name else [("", array)]
            for letter, part in parts:
                renamed = _replaced(rest.replace("linear_q_k_v", f"{letter}_proj"), _NAMES[layout])
                tensors[f"model.audio_tower.{renamed}"] = part
    return tensors


def _funasr_name(name: str) -> str:
    if name.startswith("ctc.ctc_decoder."):
        return name.removeprefix("ctc.")
    old = next(old for old in _PARTS if name.startswith(f"{old}."))
    return _PARTS[old] + name.removeprefix(old)


def _numbered(rest: str) -> str:
    """Count the layers through: those of ``encoders0``, ``encoders`` and ``tp_encoders`` one after another."""
    for group, number in (
        ("after_norm", ENCODER.num_blocks - 1),
        ("tp_norm", ENCODER.num_blocks + ENCODER.tp_blocks - 1),
    ):
        if rest.startswith(f"{group}."):
            return f"layers.{number}.final_layernorm.{rest.partition('.')[2]}"
    group, number, tail = rest.split(".", 2)
    return f"layers.{int(number) + {'encoders0': 0, 'encoders': 1, 'tp_encoders': ENCODER.num_blocks}[group]}.{tail}"


def _projector_name(rest: str, layout: str) -> str:
    if rest.startswith("linear"):
        return f"model.multi_modal_projector.{rest.replace('linear', 'linear_')}"
    for letter in "qkv":
        rest = rest.replace(f"linear_{letter}.", f"{letter}_proj.")
    return _BLOCKS[layout] + _replaced(rest.removeprefix("blocks."), _NAMES[layout])


def _replaced(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        if text.startswith(old) or f".{old}" in text:
            return text.replace(old, new, 1)
    return text


def write_nano(
    folder: Path,
    layout: str = "funasr",
    *,
    ctc: bool = False,
    lm_head: bool = True,
    dtype: mx.Dtype = mx.bfloat16,
    exact: bool = True,
    seed: int = 0,
    **adaptor: Any,
) -> Arrays:
    """Write a checkpoint and what lies beside it; `adaptor` are lines of its part of config.yaml.

    Returns:
        The values that a model filled with it must have.
    """
    values = parameters(ctc, seed, exact)
    tensors = published({name: array.astype(dtype) for name, array in values.items()}, layout)
    embedding = values["decoder.model.embed_tokens.weight"].astype(dtype)
    ends = json.dumps({"eos_token_id": 258})
    text = {"model_type": "qwen3", **{k: v for k, v in asdict(DECODER).items() if k not in ("quantization", "lora")}}
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "funasr":
        if lm_head:
            tensors["llm.lm_head.weight"] = embedding
        write_pt(folder / "model.pt", tensors, ("state_dict",))
        settings = {"use_low_frame_rate": "true", "attention_heads": ADAPTOR.num_heads, **adaptor}
        lines = "".join(f"    {key}: {value}\n" for key, value in settings.items())
        (folder / "config.yaml").write_text(
            f"model: FunASRNano\naudio_encoder_conf:\n    attention_heads: {ENCODER.attention_heads}\n"
            f"audio_adaptor_conf:\n{lines}"
            f"ctc_decoder_conf:\n    attention_heads: {CTC.transformer.num_heads}\n"
            "frontend_conf:\n    fs: 16000\n    window: hamming\n    n_mels: 8\n    lfr_m: 7\n    cmvn_file: null\n"
        )
        folder = folder / "Qwen3-tiny"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(text))
    else:
        if lm_head:
            tensors["lm_head.weight"] = embedding
        mx.save_safetensors(str(folder / "model.safetensors"), {n: mx.contiguous(a) for n, a in tensors.items()})
        (folder / "config.json").write_text(json.dumps(_ported_config(layout, text)))
    (folder / "generation_config.json").write_text(ends)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return values


def _ported_config(layout: str, text: dict[str, Any]) -> dict[str, Any]:
    if layout == "hf":
        audio = {"num_mel_bins": 8, "num_stacked_frames": 7, "num_attention_heads": ENCODER.attention_heads}
        return {
            "model_type": "fun_asr_nano",
            "audio_config": audio,
            "adaptor_config": {"num_attention_heads": ADAPTOR.num_heads, "layer_norm_eps": 1e-5},
            "text_config": text,
        }
    audio = {"num_mel_bins": 8, "num_stacked_frames": 7, "encoder_attention_heads": ENCODER.attention_heads}
    return {"encoder_config": audio, "adaptor_num_attention_heads": ADAPTOR.num_heads, "text_config": text}
