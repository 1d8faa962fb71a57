"""Key maps: from manifests alone, every tensor is used once or dropped with a reason, every parameter filled once."""

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from qwen4b_asr.config import ModelConfig
from qwen4b_asr.decoder import DecoderConfig
from qwen4b_asr.errors import CheckpointError, ConfigError
from qwen4b_asr.model import SpeechModel
from qwen4b_asr.weights.keymap import Plan, load_keymap
from qwen4b_asr.weights.load import parameter_shapes
from qwen4b_asr.weights.manifest import load_manifest
from qwen4b_asr.weights.paths import weights_data
from tests.helpers.tiny import CONFIG
from tests.helpers.weights_parts import NAMINGS, adaptor_tensors, decoder_tensors, encoder_tensors, random_parameters


@cache
def full_shapes(part: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a part of the real 4B model, from its own module tree."""
    config = ModelConfig()
    if part.startswith("decoder:"):
        manifest = load_manifest(part.partition(":")[2])
        decoder = DecoderConfig.from_huggingface(manifest.config)
        config = replace(config, decoder=decoder, adaptor=replace(config.adaptor, output_size=decoder.hidden_size))
        part = "decoder"
    shapes = parameter_shapes(SpeechModel(config))
    return {n.removeprefix(f"{part}."): s for n, s in shapes.items() if n.startswith(f"{part}.")}


def check_bijection(plan: Plan, sources, parameters) -> None:
    """Say again, without the planner, what it promises."""
    used = Counter(name for a in plan.assignments for name in a.sources)
    used.update(list(plan.dropped))
    assert used == Counter(dict.fromkeys(sources, 1))
    assert Counter(a.target for a in plan.assignments) == Counter(dict.fromkeys(parameters, 1))
    assert all(len(reason) > 10 for reason in plan.dropped.values())
    for a in plan.assignments:
        assert sum(prod(sources[name]) for name in a.sources) == prod(parameters[a.target])


def real_adaptor(naming: str) -> dict[str, tuple[int, ...]]:
    """The real adaptor's shapes under any naming; the arrays are never evaluated."""
    tensors = {f"adaptor.{n}": mx.zeros(shape) for n, shape in load_manifest("adaptor-4b").tensors.items()}
    return {n: tuple(array.shape) for n, array in adaptor_tensors(tensors, naming).items()}


def test_the_real_encoder():
    sources, parameters = dict(load_manifest("sensevoice-small").tensors), full_shapes("audio_encoder")
    plan = load_keymap("sensevoice").plan(sources, parameters, file="model.pt")
    check_bijection(plan, sources, parameters)
    assert not plan.dropped
    assert {a.target for a in plan.assignments if a.transform == "conv1d"} == {
        n for n in sources if n.endswith("fsmn_block.weight")
    }


@pytest.mark.parametrize("naming", NAMINGS)
def test_the_real_adaptor_in_every_naming(naming):
    sources, parameters = real_adaptor(naming), full_shapes("adaptor")
    assert len(sources) == (54 if naming == "torch" else 54 + 4 * 2 * 2)
    plan = load_keymap("adaptor").plan(sources, parameters, file="adaptor.pt")
    check_bijection(plan, sources, parameters)
    packed = {a.target: a.sources for a in plan.assignments}["transformer.layers.3.self_attn.in_proj_weight"]
    if naming != "torch":
        assert [name.rpartition(".")[0][-6:] for name in packed] == ["q_proj", "k_proj", "v_proj"]


def test_the_namings_of_the_task():
    assert "layers.0.q_proj.weight" in real_adaptor("split_ffn")
    assert "layers.0.ffn_linear1.weight" in real_adaptor("split_ffn")
    assert "adaptor.layers.0.linear2.bias" in real_adaptor("split")
    assert "adaptor.blocks.3.norm2.bias" in real_adaptor("blocks")


@pytest.mark.parametrize(
    "name", ["qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-4b-instruct-2507", "qwen3-4b-8bit", "qwen3-8b"]
)
@pytest.mark.parametrize("with_optional", [False, True])
def test_every_real_decoder(name, with_optional):
    manifest = load_manifest(name)
    sources = dict(manifest.tensors) | (dict(manifest.optional) if with_optional else {})
    parameters = full_shapes(f"decoder:{name}")
    plan = load_keymap("qwen3").plan(sources, parameters, file="qwen3")
    check_bijection(plan, sources, parameters)
    assert plan.dropped.keys() == (manifest.optional.keys() if with_optional else set())
    assert all("tie_word_embeddings" in reason for reason in plan.dropped.values())


def test_the_whole_tree_of_the_model_is_covered():
    names = {n for n, _ in tree_flatten(SpeechModel(ModelConfig()).parameters())}
    parts = {f"{p}.{n}" for p in ("audio_encoder", "adaptor", "decoder") for n in full_shapes(p)}
    assert names - parts == {"frontend.cmvn_shift", "frontend.cmvn_scale"}
    assert len(names) == 917 + 54 + 398 + 2


TINY = random_parameters(CONFIG)
CASES = {
    "sensevoice": (encoder_tensors(TINY), "audio_encoder."),
    "qwen3": (decoder_tensors(TINY), "decoder."),
    **{f"adaptor {naming}": (adaptor_tensors(TINY, naming), "adaptor.") for naming in NAMINGS},
}


def case(name):
    """Key map, source shapes and parameter shapes of a tiny case."""
    tensors, prefix = CASES[name]
    parameters = {n.removeprefix(prefix): tuple(a.shape) for n, a in TINY.items() if n.startswith(prefix)}
    return load_keymap(name.split()[0]), {n: tuple(a.shape) for n, a in tensors.items()}, parameters


@given(st.sampled_from(sorted(CASES)), st.data())
def test_any_order_gives_the_same_plan(name, data):
    keymap, sources, parameters = case(name)
    shuffled = {n: sources[n] for n in data.draw(st.permutations(list(sources)))}
    plan = keymap.plan(shuffled, parameters, file="f")
    assert plan == keymap.plan(sources, parameters, file="f")
    check_bijection(plan, sources, parameters)


@given(st.sampled_from(sorted(CASES)), st.data())
def test_a_missing_tensor_is_named(name, data):
    keymap, sources, parameters = case(name)
    gone = data.draw(st.sampled_from(sorted(sources)))
    target = next(a.target for a in keymap.plan(sources, parameters, file="f").assignments if gone in a.sources)
    del sources[gone]
    with pytest.raises(CheckpointError, match="nothing fills") as caught:
        keymap.plan(sources, parameters, file="the/file")
    assert repr(target) in str(caught.value)
    assert "the/file" in str(caught.value)


@given(st.sampled_from(sorted(CASES)), st.data())
def test_a_misshapen_tensor_is_named(name, data):
    keymap, sources, parameters = case(name)
    bad = data.draw(st.sampled_from(sorted(sources)))
    axis = data.draw(st.integers(0, len(sources[bad]) - 1))
    change = data.draw(st.sampled_from([-1, 1, 7]))
    sources[bad] = tuple(n + change * (i == axis) for i, n in enumerate(sources[bad]))
    with pytest.raises(CheckpointError, match=r"shape|cannot be joined") as caught:
        keymap.plan(sources, parameters, file="f")
    assert repr(bad) in str(caught.value)


@given(st.sampled_from(sorted(CASES)), st.text("abc.0w_", min_size=1, max_size=12))
def test_an_unknown_tensor_is_named(name, extra):
    keymap, sources, parameters = case(name)
    sources[extra + "?"] = (1,)
    with pytest.raises(CheckpointError, match=r"is not known|would fill") as caught:
        keymap.plan(sources, parameters, file="f")
    assert repr(extra + "?") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "extra", "message"),
    [
        ("sensevoice", "encoder.encoders.7.norm1.weight", "would fill 'encoder.encoders.7.norm1.weight', which this"),
        ("adaptor torch", "adaptor.norm.weight", "'norm.weight' both fill 'norm.weight'"),
        ("adaptor torch", "layers.0.q_proj.weight", r"both fill 'transformer\.layers\.0\.self_attn\.in_proj_weight'"),
        ("adaptor split_ffn", "layers.0.q_proj.scales", "'layers.0.q_proj.scales' is not known"),
        ("adaptor blocks", "adaptor.blocks.01.norm1.bias", "is not known"),
        ("qwen3", "layers.0.mlp.up_proj.weight", "both fill 'model.layers.0.mlp.up_proj.weight'"),
        ("qwen3", "model.layers.0.self_attn.q_proj.bias", "which this model does not have"),
    ],
)
def test_a_second_source_for_a_parameter_is_an_error(name, extra, message):
    keymap, sources, parameters = case(name)
    sources[extra] = (1,)
    with pytest.raises(CheckpointError, match=message):
        keymap.plan(sources, parameters, file="f")


def test_a_part_of_the_packed_projection_that_is_missing_is_told_apart():
    keymap, sources, parameters = case("adaptor split_ffn")
    del sources["layers.1.k_proj.bias"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.in_proj_bias' \[120\] \(of its 3 parts only 2"):
        keymap.plan(sources, parameters, file="f")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((32, 1, 6), r"shape \[32, 6, 1\] instead of \[32, 5, 1\]"),
        ((32, 5, 1), r"shape \[32, 5, 1\] is not that of a depthwise convolution \[D, 1, K\]"),
        ((32, 5), "not that of a depthwise convolution"),
    ],
)
def test_the_memory_blocks_layout_is_checked(shape, message):
    keymap, sources, parameters = case("sensevoice")
    sources["encoder.tp_encoders.1.self_attn.fsmn_block.weight"] = shape
    with pytest.raises(CheckpointError, match=message):
        keymap.plan(sources, parameters, file="f")


def test_a_transposed_matrix_is_named():
    keymap, sources, parameters = case("sensevoice")
    sources["encoder.after_norm.weight"] = (1, 32)
    sources["encoder.encoders.0.feed_forward.w_1.weight"] = (32, 48)
    with pytest.raises(CheckpointError, match=r"w_1\.weight': shape \[32, 48\] instead of \[48, 32\].*\[1, 32\]"):
        keymap.plan(sources, parameters, file="f")


def test_recomputed_buffers_are_dropped_with_a_reason():
    keymap, sources, parameters = case("qwen3")
    sources["model.layers.0.self_attn.rotary_emb.inv_freq"] = (4,)
    assert "rope_theta" in keymap.plan(sources, parameters, file="f").dropped[list(sources)[-1]]


def rules(tmp_path, *rules, **changes):
    """A key map with these rules."""
    document = {"schema": 1, "kind": "keymap", "name": "x", "target": "y", "rules": list(rules), **changes}
    (tmp_path / "keymap-x.json").write_text(json.dumps(document))
    return load_keymap("x", tmp_path)


@pytest.mark.parametrize(
    "rule",
    [
        3,
        {},
        {"from": "a"},
        {"from": "a", "to": "b", "drop": "why"},
        {"from": "a", "to": 3},
        {"from": "a", "to": "b", "other": 1},
        {"from": "a", "to": "b", "transform": "swap"},
        {"from": "a", "to": "b", "part": [3, 3]},
        {"from": "a", "to": "b", "part": "q"},
        {"from": "a", "to": "b.{i}"},
        {"from": "a", "drop": "why", "unless": 3},
    ],
)
def test_a_malformed_rule_is_refused(tmp_path, rule):
    with pytest.raises(ConfigError, match=r"keymap-x\.json: rule"):
        rules(tmp_path, rule)


def test_a_malformed_key_map_is_refused(tmp_path):
    for changes in ({"schema": 0}, {"kind": "manifest"}, {"name": "z"}, {"rules": {}}, {"more": 1}):
        with pytest.raises(ConfigError, match=r"keymap-x\.json"):
            rules(tmp_path, **changes)


def test_the_first_rule_that_matches_decides(tmp_path):
    keymap = rules(tmp_path, {"from": "a.{i}", "to": "n.{i}"}, {"from": "a.{path}", "to": "p.{path}"})
    plan = keymap.plan({"a.3": (1,), "a.x.3": (2,)}, {"n.3": (1,), "p.x.3": (2,)}, file="f")
    assert {a.target: a.sources for a in plan.assignments} == {"n.3": ("a.3",), "p.x.3": ("a.x.3",)}


# Key maps that have a test file of their own, test_keymap_NAME.py; it also tests NAME-anything.
ELSEWHERE = {path.stem.removeprefix("test_keymap_") for path in Path(__file__).parent.glob("test_keymap_*.py")}


def test_every_key_map_of_the_package_is_tested():
    found = {path.stem.removeprefix("keymap-") for path in weights_data().glob("keymap-*.json")}
    families = {name.partition("-")[0] for name in found}
    assert families >= ELSEWHERE
    assert {n for n in found if n.partition("-")[0] not in ELSEWHERE} == {name.split()[0] for name in CASES}
