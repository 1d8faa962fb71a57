"""Tiny models with seeded random weights, and hypothesis strategies for what goes into them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qwen4b_asr.adaptor import AdaptorConfig
from qwen4b_asr.config import GenerationConfig, ModelConfig
from qwen4b_asr.decoder import DecoderConfig
from qwen4b_asr.encoder import EncoderConfig
from qwen4b_asr.features import FrontendConfig
from qwen4b_asr.model import SpeechModel
from qwen4b_asr.prompt import PromptConfig

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CONFIG = ModelConfig(
    name="tiny",
    frontend=FrontendConfig(num_mel_bins=8, lfr_m=7, lfr_n=6),
    encoder=EncoderConfig(
        input_size=56,
        output_size=32,
        attention_heads=2,
        linear_units=48,
        num_blocks=3,
        tp_blocks=2,
        kernel_size=5,
        vocab_size=11,
    ),
    adaptor=AdaptorConfig(input_size=32, hidden_size=40, output_size=24, num_layers=2, num_heads=4, ffn_size=56),
    decoder=DecoderConfig(
        vocab_size=300,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
    ),
    prompt=PromptConfig(),
    generation=GenerationConfig(stop_token_ids=(258, 256)),
)


def randomise(module: nn.Module, seed: int, scale: float = 0.3) -> nn.Module:
    """Give every parameter, norms and biases included, its own random values, and leave training mode."""
    keys = iter(mx.random.split(mx.random.key(seed), 4096))
    module.update(tree_map(lambda p: mx.random.normal(p.shape, key=next(keys)) * scale, module.parameters()))
    module.eval()
    mx.eval(module.parameters())
    return module


@lru_cache(maxsize=4)
def tiny_model(seed: int = 0) -> SpeechModel:
    """Return a whole tiny model; shared, so do not change it."""
    model = SpeechModel(CONFIG)
    randomise(model, seed)
    return model


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer whose tokens are the 256 bytes and Qwen's specials: it can spell everything."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def save_tiny(directory: Path, seed: int = 0) -> Path:
    """Write the tiny model as a model directory."""
    directory.mkdir(parents=True, exist_ok=True)
    CONFIG.save(directory)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    flat = dict(tree_flatten(tiny_model(seed).parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), flat, metadata={"format": "mlx"})
    return directory


def rows(length: int, width: int, seed: int = 0) -> mx.array:
    """Return random rows (length, width)."""
    return mx.random.normal((length, width), key=mx.random.key(seed))


def max_abs(x: mx.array) -> float:
    """Return the largest magnitude; 0 for an empty array."""
    return float(mx.max(mx.abs(x))) if x.size else 0.0


@st.composite
def ragged_lengths(draw: st.DrawFn, most: int = 40, batch: int = 4) -> list[int]:
    """Lengths of the utterances of a batch."""
    return draw(st.lists(st.integers(1, most), min_size=1, max_size=batch))


@st.composite
def chunkings(draw: st.DrawFn, most: int = 40) -> list[int]:
    """Sizes of consecutive chunks that cover a sequence."""
    return draw(st.lists(st.integers(1, 9), min_size=1, max_size=most // 4))
