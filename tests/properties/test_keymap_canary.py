"""Canary-Qwen's key map: its manifest onto the stages' own parameters, tensor by tensor."""

from collections import Counter
from functools import cache
from math import prod

import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from qwen4b_asr.decoder import DecoderConfig, Qwen3
from qwen4b_asr.errors import CheckpointError
from qwen4b_asr.fastconformer import FastConformerConfig, FastConformerEncoder
from qwen4b_asr.lora import LoraConfig, build_lora
from qwen4b_asr.mel import MelConfig, MelFrontend
from qwen4b_asr.projection import Projection, ProjectionConfig
from qwen4b_asr.weights.keymap import load_keymap
from qwen4b_asr.weights.manifest import load_manifest

MANIFEST = load_manifest("canary-qwen-2.5b")
KEYMAP = load_keymap("canary")


class Stages(nn.Module):
    """The stages under the names that they have in a model; nothing is evaluated, so full size costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.frontend = MelFrontend(MelConfig())
        self.audio_encoder = FastConformerEncoder(FastConformerConfig())
        self.adaptor = Projection(ProjectionConfig())
        self.decoder = Qwen3(DecoderConfig.from_huggingface(load_manifest("qwen3-1.7b").config))
        facts = MANIFEST.config
        build_lora(self.decoder, LoraConfig(facts["lora_r"], facts["lora_alpha"], tuple(facts["lora_modules"])))


@cache
def parameters() -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of the full-size model."""
    return {name: tuple(value.shape) for name, value in tree_flatten(Stages().parameters())}


def sources(optional: bool = False) -> dict[str, tuple[int, ...]]:
    """The published file's tensors, with all that it may hold besides."""
    return dict(MANIFEST.tensors) | (dict(MANIFEST.optional) if optional else {})


@pytest.mark.parametrize("optional", [False, True])
def test_every_tensor_fills_one_parameter_or_is_dropped_with_a_reason(optional):
    tensors = sources(optional)
    plan = KEYMAP.plan(tensors, parameters(), file="model.safetensors")
    used = Counter(name for a in plan.assignments for name in a.sources)
    used.update(list(plan.dropped))
    assert used == Counter(dict.fromkeys(tensors, 1))
    assert Counter(a.target for a in plan.assignments) == Counter(dict.fromkeys(parameters(), 1))
    assert all(prod(tensors[a.sources[0]]) == prod(parameters()[a.target]) for a in plan.assignments)
    assert plan.dropped.keys() == (MANIFEST.optional.keys() if optional else set())
    assert all(len(reason) > 10 for reason in plan.dropped.values())


def test_convolutions_change_their_shape_and_nothing_else_does():
    plan = KEYMAP.plan(sources(), parameters(), file="f")
    reshaped = Counter(a.transform for a in plan.assignments)
    assert reshaped == {"conv2d": 3, "pointwise": 2 + 2 * 32, "conv1d": 32, "identity": 1686 - 3 - 66 - 32}
    for a in plan.assignments:
        if a.transform == "identity":
            assert MANIFEST.tensors[a.sources[0]] == parameters()[a.target]


def test_the_counts_of_the_parts():
    parts = Counter()
    for name, shape in MANIFEST.tensors.items():
        parts[".".join(name.split(".")[:2])] += prod(shape)
    assert parts["perception.encoder"] == 811_049_984
    assert parts["perception.proj"] == 2_099_200
    lora = sum(prod(shape) for name, shape in MANIFEST.tensors.items() if ".lora_" in name)
    assert lora == 28 * 128 * (2048 + 2048 + 2048 + 1024)
    decoder = sum(prod(shape) for name, shape in MANIFEST.tensors.items() if name.startswith(("llm.", "embed_tokens.")))
    assert decoder - lora == load_manifest("qwen3-1.7b").parameters


@given(st.data())
def test_a_tensor_that_is_gone_or_misshapen_is_named(data):
    name = data.draw(st.sampled_from(sorted(MANIFEST.tensors)))
    target = next(a.target for a in KEYMAP.plan(sources(), parameters(), file="f").assignments if name in a.sources)
    tensors = sources()
    del tensors[name]
    with pytest.raises(CheckpointError, match="nothing fills") as caught:
        KEYMAP.plan(tensors, parameters(), file="the/file")
    assert repr(target) in str(caught.value)
    shape = MANIFEST.tensors[name]
    axis = data.draw(st.integers(0, len(shape) - 1))
    tensors[name] = tuple(size + (i == axis) for i, size in enumerate(shape))
    with pytest.raises(CheckpointError, match="shape") as caught:
        KEYMAP.plan(tensors, parameters(), file="f")
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("perception.encoder.pre_encode.conv.2.weight", (256, 256, 3, 3), "not that of a convolution of one input"),
        ("perception.encoder.pre_encode.conv.2.weight", (256, 3, 3, 1), "not that of a convolution of one input"),
        ("perception.encoder.pre_encode.conv.3.weight", (256, 256, 3, 3), "not that of a pointwise convolution"),
        ("perception.encoder.layers.7.conv.pointwise_conv2.weight", (1024, 1024), "not that of a pointwise"),
        ("perception.encoder.layers.7.conv.depthwise_conv.weight", (1024, 9, 1), "not that of a depthwise"),
        ("perception.encoder.layers.32.norm_out.weight", (1024,), "which this model does not have"),
        ("llm.base_model.model.model.layers.0.self_attn.q_proj.weight", (2048, 2048), "does not have"),
        ("llm.base_model.model.model.layers.0.self_attn.k_proj.lora_A.default.weight", (128, 2048), "does not have"),
        ("perception.modality_adapter.weight", (3,), "is not known"),
    ],
)
def test_what_does_not_belong_is_named(name, shape, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        KEYMAP.plan(sources() | {name: shape}, parameters(), file="f")
    assert repr(name) in str(caught.value)
