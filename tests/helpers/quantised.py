"""Tiny models whose rows hold groups, and what their quantised weights stand for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from qwen4b_asr.config import ModelConfig
from qwen4b_asr.decoder import Qwen3
from qwen4b_asr.lora import dense_weight
from qwen4b_asr.weights.load import load_model
from tests.helpers.tiny import CONFIG
from tests.helpers.weights_parts import PART_CONFIG, Parts, write_parts

# The encoder's first layer has 56 columns, and the feed-forward of the decoder 96: one group of 32 too many for 64.
WIDE = replace(
    PART_CONFIG,
    encoder=replace(CONFIG.encoder, output_size=64, linear_units=96),
    adaptor=replace(CONFIG.adaptor, input_size=64, hidden_size=64, output_size=64, ffn_size=96),
    decoder=replace(CONFIG.decoder, hidden_size=64, intermediate_size=96, num_hidden_layers=5),
)


def wide_parts(folder: Path, *, tied: bool = True, scale: float = 0.2, **options) -> Parts:
    """Write the three parts of the wide model, with weights small enough that its logits are not one token's."""
    config = replace(WIDE, decoder=replace(WIDE.decoder, tie_word_embeddings=tied))
    return write_parts(folder, config=config, scale=scale, **options)


def plain(config: ModelConfig) -> ModelConfig:
    """The configuration without quantisation."""
    decoder = None if config.decoder is None else replace(config.decoder, quantization=None)
    return replace(config, decoder=decoder, quantized_stages={})


def dense_twin(directory: Path) -> tuple[Qwen3, Qwen3]:
    """The quantised decoder of a directory, and a dense one of the numbers that its codes stand for."""
    model, config = load_model(directory, dtype="float32")
    twin = Qwen3(plain(config).decoder)
    modules = dict(model.decoder.named_modules())
    values = dict(tree_flatten(model.decoder.parameters()))
    found = []
    for name, array in tree_flatten(twin.parameters()):
        path, _, last = name.rpartition(".")
        if last == "weight" and f"{path}.scales" in values:
            found.append((name, _dense(modules[path])))
        else:
            found.append((name, values[name].reshape(array.shape)))
    twin.update(tree_unflatten(found))
    return model.decoder, twin


def _dense(module) -> mx.array:
    if "embed" in type(module).__name__.lower():
        biases = module.get("biases")
        return mx.dequantize(
            module.weight, module.scales, biases, group_size=module.group_size, bits=module.bits, mode=module.mode
        )
    return dense_weight(module)[0]
