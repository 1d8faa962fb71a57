"""Canary-Qwen's configuration from shapes and training settings."""

from dataclasses import replace

import pytest

from qwen4b_asr.decoder import DecoderConfig
from qwen4b_asr.errors import CheckpointError
from qwen4b_asr.fastconformer import FastConformerConfig
from qwen4b_asr.mel import MelConfig
from qwen4b_asr.projection import ProjectionConfig
from qwen4b_asr.weights.canary import canary_configs
from qwen4b_asr.weights.manifest import load_manifest
from qwen4b_asr.weights.pairing import family
from tests.golden.support import golden

SHAPES = dict(load_manifest("canary-qwen-2.5b").tensors)
SETTINGS = {
    "pretrained_llm": "Qwen/Qwen3-1.7B",
    "perception": {
        "preprocessor": {
            "sample_rate": 16000, "window_size": 0.025, "window_stride": 0.01, "window": "hann", "features": 128,
            "n_fft": 512, "normalize": "per_feature", "log": True, "frame_splicing": 1, "dither": 1e-5,
        },
        "encoder": {
            "subsampling": "dw_striding", "subsampling_factor": 8, "xscaling": False, "self_attention_model": "rel_pos",
            "att_context_size": [-1, -1], "conv_norm_type": "batch_norm", "conv_context_size": None, "reduction": None,
        },
        "modality_adapter": {"_target_": "nemo.collections.speechlm2.modules.perception.IdentityConnector"},
    },
}  # fmt: skip


def changed(section: str, **values):
    """The settings with some values of a section of ``perception`` replaced."""
    perception = SETTINGS["perception"]
    return {"perception": {**perception, section: {**perception[section], **values}}}


@pytest.mark.parametrize("settings", [{}, SETTINGS])
def test_the_published_model_is_the_default(settings):
    configs = canary_configs(SHAPES, settings, file="f")
    assert configs.frontend == MelConfig()
    assert configs.encoder == FastConformerConfig()
    assert configs.adaptor == ProjectionConfig()
    assert configs.decoder == DecoderConfig.from_huggingface(load_manifest("qwen3-1.7b").config)


def test_a_tiny_checkpoint():
    data = golden("canary")
    shapes = {name: value.shape for name, value in data.weights().items()}
    shapes |= {"perception.preprocessor.featurizer.fb": (1, 128, 257)}
    shapes |= {"perception.preprocessor.featurizer.window": (400,)}
    configs = canary_configs(shapes, {}, file="f")
    assert configs.encoder == FastConformerConfig(**data.fact("encoder"))
    wanted = data.fact("decoder")
    assert configs.decoder == replace(DecoderConfig(**wanted), max_position_embeddings=40960)
    assert family(shapes) == "canary-qwen"


def test_adapters_that_are_merged_leave_the_plain_names():
    merged = {n.replace(".base_layer", ""): s for n, s in SHAPES.items() if ".lora_" not in n}
    assert canary_configs(merged, {}, file="f").decoder == canary_configs(SHAPES, {}, file="f").decoder


def test_settings_that_no_shape_tells():
    configs = canary_configs(SHAPES, changed("encoder", xscaling=True), file="f")
    assert configs.encoder == FastConformerConfig(scale_input=True)
    settings = changed("preprocessor", preemph=0.9, window_stride=0.02)
    assert canary_configs(SHAPES, settings, file="f").frontend == MelConfig(preemphasis=0.9, frame_shift_ms=20.0)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("preprocessor", {"window": "hamming"}, "perception.preprocessor.window as 'hamming'; only 'hann'"),
        ("preprocessor", {"normalize": "all_features"}, "only 'per_feature' can be computed"),
        ("preprocessor", {"features": 80}, "features as 80, but the tensors say 128"),
        ("preprocessor", {"n_fft": 1024}, "n_fft as 1024, but the tensors say 512"),
        ("preprocessor", {"window_size": 0.02}, r"window_size as 0\.02, but the tensors say 0\.025"),
        ("encoder", {"subsampling": "striding"}, "only 'dw_striding'"),
        ("encoder", {"att_context_size": [70, 1]}, r"att_context_size as \[70, 1\]"),
        ("encoder", {"conv_norm_type": "layer_norm"}, "only 'batch_norm'"),
        ("encoder", {"self_attention_model": "rel_pos_local_attn"}, "only 'rel_pos'"),
        ("modality_adapter", {"_target_": "a.QformerConnector"}, "puts a.QformerConnector before the projection"),
    ],
)
def test_what_would_be_other_maths_is_refused(section, values, message):
    with pytest.raises(CheckpointError, match=rf"the/file: config\.json .*{message}"):
        canary_configs(SHAPES, changed(section, **values), file="the/file")


def test_settings_that_are_no_object_are_refused():
    with pytest.raises(CheckpointError, match=r"must hold an object as perception\.encoder but holds 3"):
        canary_configs(SHAPES, {"perception": {"encoder": 3}}, file="f")


@pytest.mark.parametrize(
    "name",
    [
        "perception.preprocessor.featurizer.fb",
        "perception.encoder.pre_encode.out.weight",
        "perception.encoder.layers.0.self_attn.pos_bias_u",
        "perception.proj.weight",
        "embed_tokens.weight",
    ],
)
def test_a_missing_tensor_is_named(name):
    shapes = {n: s for n, s in SHAPES.items() if n != name}
    with pytest.raises(CheckpointError, match="f: is not Canary-Qwen: it has no"):
        canary_configs(shapes, {}, file="f")


def test_impossible_sizes_name_the_file():
    name = "perception.encoder.layers.0.self_attn.pos_bias_u"
    with pytest.raises(CheckpointError, match=r"f: \[FastConformerConfig\] attention_heads must divide"):
        canary_configs({**SHAPES, name: (7, 128)}, {}, file="f")


def test_other_models_are_told_apart():
    assert family(SHAPES) == "canary-qwen"
    assert family(load_manifest("sensevoice-small").tensors) == "sensevoice"
    assert family(load_manifest("qwen3-1.7b").tensors) != "canary-qwen"
