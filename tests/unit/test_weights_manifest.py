"""Manifests: exact names, shapes and counts, and a schema that is enforced."""

import json
from math import prod

import pytest

from qwen4b_asr.adaptor import AdaptorConfig
from qwen4b_asr.config import ModelConfig
from qwen4b_asr.decoder import DecoderConfig
from qwen4b_asr.errors import ConfigError
from qwen4b_asr.weights.manifest import expand_braces, load_manifest, manifest_names
from qwen4b_asr.weights.paths import weights_data


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a", ["a"]),
        ("", [""]),
        ("a.{0..2}", ["a.0", "a.1", "a.2"]),
        ("{7..7}", ["7"]),
        ("{9..11}", ["9", "10", "11"]),
        ("a.{x,y}.b", ["a.x.b", "a.y.b"]),
        ("{a,}b", ["ab", "b"]),
        ("{0..1}{x,y}", ["0x", "0y", "1x", "1y"]),
        ("{a,b.{0..1},c}.w", ["a.w", "b.0.w", "b.1.w", "c.w"]),
        ("{a.{x,y},b}", ["a.x", "a.y", "b"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern, names):
    assert list(expand_braces(pattern)) == names


@pytest.mark.parametrize("pattern", ["{", "}", "a}{b", "{a,{b}", "{a}", "{}", "{2..1}", "{01..2}", "{a,b}}", "{1..}"])
def test_malformed_braces_are_refused(pattern):
    with pytest.raises(ValueError, match="expand_braces"):
        list(expand_braces(pattern))


# Counted from the published checkpoints' files; the smaller and larger Qwen3 from their configurations.
@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("sensevoice-small", 917, 233_999_167),
        ("adaptor-4b", 54, 207_734_272),
        ("qwen3-0.6b", 310, 596_049_920),
        ("qwen3-1.7b", 310, 1_720_574_976),
        ("qwen3-4b", 398, 4_022_468_096),
        ("qwen3-8b", 399, 8_190_735_360),
        ("qwen3-4b-instruct-2507", 398, 4_022_468_096),
        ("qwen3-4b-8bit", 904, (4_022_468_096 - 196_096) // 4 + 2 * (4_022_468_096 - 196_096) // 64 + 196_096),
        ("canary-qwen-2.5b", 1686, 2_559_447_568),
        ("fun-asr-nano", 914 + 36 + 310, 829_791_840),
        ("fun-asr-mlt-nano", 914 + 36 + 310, 829_791_840),
        ("fun-asr-nano-ctc", 914 + 36 + 310 + 84 + 2, 868_857_667),
        ("fun-asr-nano-hf", 70 * 17 + 4 + 36 + 310, 829_791_840),
    ],
)
def test_counts(name, tensors, parameters):
    manifest = load_manifest(name)
    assert len(manifest.tensors) == tensors
    assert manifest.parameters == sum(prod(s) for s in manifest.tensors.values()) == parameters


def test_the_encoder_without_query_table_and_ctc_head():
    encoder = {n: s for n, s in load_manifest("sensevoice-small").tensors.items() if n.startswith("encoder.")}
    assert len(encoder) == 914
    assert sum(prod(s) for s in encoder.values()) == 221_136_992


def test_every_manifest_is_tested_here():
    assert set(manifest_names()) == {m.args[1][i][0] for m in test_counts.pytestmark for i in range(len(m.args[1]))}


def test_the_default_configuration_is_the_manifests():
    config = ModelConfig()
    assert DecoderConfig.from_huggingface(load_manifest("qwen3-4b").config) == config.decoder
    assert load_manifest("sensevoice-small").config == {"attention_heads": config.encoder.attention_heads}
    assert load_manifest("adaptor-4b").config == {"num_heads": AdaptorConfig().num_heads}


GOOD = json.loads((weights_data() / "adaptor-4b.json").read_text())


def changed(tmp_path, **values):
    """The adaptor's manifest with some keys replaced, or left out where the value is None."""
    document = {key: value for key, value in {**GOOD, **values}.items() if value is not None}
    (tmp_path / "adaptor-4b.json").write_text(json.dumps(document))
    return load_manifest("adaptor-4b", tmp_path)


def test_the_unchanged_manifest_is_good(tmp_path):
    assert changed(tmp_path).tensors == load_manifest("adaptor-4b").tensors


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schema": 2}, "schema 1"),
        ({"kind": "keymap"}, "must be a manifest"),
        ({"licence": None}, r"missing or unknown: \['licence'\]"),
        ({"extra": 1}, r"missing or unknown: \['extra'\]"),
        ({"name": "other"}, "name must be 'adaptor-4b'"),
        ({"role": "vocoder"}, "role one of"),
        ({"tensor_count": 53}, "tensor_count is 53 but the tensors give 54"),
        ({"tensor_count": "54"}, "tensor_count must be int"),
        ({"parameter_count": 1}, "parameter_count is 1 but"),
        ({"tensors": {"a": [0]}}, "the shape of 'a'"),
        ({"tensors": {"a": [True]}}, "the shape of 'a'"),
        ({"tensors": {"a": 3}}, "the shape of 'a'"),
        ({"tensors": {"a{": [1]}}, "braces must pair"),
        ({"tensors": {"a.{x,y}": [1], "{a,b}.x": [1]}}, "'a.x' is given twice"),
        ({"optional": {"norm.weight": [2560]}}, "'norm.weight' is both needed and optional"),
    ],
)
def test_a_manifest_that_breaks_its_schema_is_refused(tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        changed(tmp_path, **values)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read"):
        load_manifest("none", tmp_path)
    (tmp_path / "none.json").write_text("{")
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read"):
        load_manifest("none", tmp_path)
    with pytest.raises(ConfigError, match=r"none\.json: is no manifest"):
        manifest_names(tmp_path)
