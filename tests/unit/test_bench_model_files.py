"""tools/bench/model_files.py: random weights of true shapes, and the files that other implementations read."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from bench import model_files
from qwen4b_asr.adaptor import AdaptorConfig
from qwen4b_asr.config import GenerationConfig, ModelConfig
from qwen4b_asr.decoder import DecoderConfig, Qwen3
from qwen4b_asr.encoder import EncoderConfig
from qwen4b_asr.features import FrontendConfig
from qwen4b_asr.quantization import Quantization, Scheme
from qwen4b_asr.weights.load import load_model


def small(**decoder: Any) -> ModelConfig:
    listening = {"output_size": 32, "attention_heads": 2, "linear_units": 48, "num_blocks": 2, "tp_blocks": 1}
    return ModelConfig(
        frontend=FrontendConfig(cmvn=False),
        encoder=EncoderConfig(**listening, vocab_size=9),
        adaptor=AdaptorConfig(input_size=32, hidden_size=16, output_size=64, num_layers=1, num_heads=2, ffn_size=24),
        decoder=DecoderConfig(
            vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, **decoder,
        ),
        generation=GenerationConfig(stop_token_ids=(1,)),
    )  # fmt: skip


@pytest.mark.parametrize("bits", [None, 4])
def test_random_weights_load_like_converted_ones(tmp_path, bits):
    quantization = None if bits is None else Quantization(Scheme(bits=bits))
    model_files.write_random(small(quantization=quantization), tmp_path)
    model, config = load_model(tmp_path)
    assert config == small(quantization=quantization)
    norm = np.array(model.audio_encoder.encoder.after_norm.weight)
    assert 0 < norm.std() < 0.3  # not all ones: a side that left them out would be seen
    other = tmp_path / "other"
    model_files.write_random(small(quantization=quantization), other)
    for a, b in zip(tree_flatten(model.parameters()), tree_flatten(load_model(other)[0].parameters()), strict=True):
        assert a[0] == b[0]
        assert np.array_equal(a[1], b[1])


def test_exported_weights_have_the_original_names_and_layout(tmp_path):
    model_files.write_random(small(), tmp_path / "model")
    model, _ = load_model(tmp_path / "model")
    model_files.export_listen(model, tmp_path / "listen.safetensors")
    tensors: Any = mx.load(str(tmp_path / "listen.safetensors"))
    assert tensors["encoder.encoders0.0.self_attn.fsmn_block.weight"].shape == (32, 1, 11)
    assert {"embed.weight", "ctc.ctc_lo.weight", "adaptor.transformer.layers.0.self_attn.in_proj_weight"} <= set(
        tensors
    )
    model_files.export_decoder(model.decoder, tmp_path / "decoder")
    config = json.loads((tmp_path / "decoder" / "config.json").read_text(encoding="utf-8"))
    assert DecoderConfig.from_huggingface(config) == model.decoder.config
    stored: Any = mx.load(str(tmp_path / "decoder" / "model.safetensors"))
    assert "model.layers.0.mlp.up_proj.weight" in stored


def test_a_quantised_decoder_says_so_as_mlx_does(tmp_path):
    model_files.write_random(small(quantization=Quantization(Scheme(bits=8))), tmp_path / "model")
    model, _ = load_model(tmp_path / "model")
    model_files.export_decoder(model.decoder, tmp_path / "decoder")
    config = json.loads((tmp_path / "decoder" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization"] == {"group_size": 64, "bits": 8, "mode": "affine"}


def test_bytes_that_a_token_reads():
    tied, apart = (Qwen3(small(tie_word_embeddings=tie).decoder) for tie in (True, False))  # type: ignore[arg-type]
    assert model_files.matrix_bytes(tied) == model_files.matrix_bytes(apart)  # the table counts once, as the head


def test_the_shapes_are_the_published_ones():
    assert model_files.shape_config("qwen3-4b").decoder == DecoderConfig()
    nano = model_files.shape_config("qwen3-0.6b", bits=4, layers=3)
    assert nano.decoder is not None
    assert (nano.decoder.num_hidden_layers, nano.decoder.quantization) == (3, Quantization(Scheme(bits=4)))
    only = model_files.shape_config("qwen3-4b", listens=True)
    assert only.decoder is not None
    assert (only.decoder.num_hidden_layers, only.decoder.vocab_size, only.adaptor) == (0, 1, AdaptorConfig())
    assert (nano.query_frames, nano.ctc_size) == (0, 0)
    # 10 s are 998 frames, 167 rows; Nano's decoder gets an eighth, the 4B one all and the four query frames.
    assert model_files.feature_rows(nano, 10.0) == 167
    assert model_files.prompt_length(nano, 10.0) == model_files.PROMPT_TOKENS + 21
    assert model_files.prompt_length(model_files.shape_config("qwen3-4b"), 10.0) == model_files.PROMPT_TOKENS + 171
