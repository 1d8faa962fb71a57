"""Fun-ASR-Nano's files: every published layout fills the same parameters; the wrong model is refused by name."""

import hashlib
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from qwen4b_asr.decoder import DecoderConfig
from qwen4b_asr.encoder import EncoderConfig
from qwen4b_asr.errors import CheckpointError
from qwen4b_asr.nano_adaptor import NanoAdaptorConfig
from qwen4b_asr.nano_prompt import MLT_NANO_LANGUAGES, NANO_LANGUAGES
from qwen4b_asr.weights.keymap import load_keymap
from qwen4b_asr.weights.manifest import load_manifest
from qwen4b_asr.weights.nano import keymap_name, name_tensors, read_nano
from qwen4b_asr.weights.pairing import encoder_fingerprint, family
from tests.golden.support import golden
from tests.helpers import nano_files as files

OLD_REVISIONS = Path(__file__).parents[1] / "data" / "nano"


def filled(checkpoint):
    """What each parameter gets, in its own shape, as conversion would write it."""
    shapes = files.shapes_of(files.whole(checkpoint.encoder, checkpoint.adaptor, checkpoint.decoder, checkpoint.ctc))
    sources = {name: ref.shape for name, ref in checkpoint.tensors.items()}
    values = {}
    for a in checkpoint.keymap.plan(sources, shapes, file="f").assignments:
        parts = [checkpoint.tensors[name].read().reshape(-1) for name in a.sources]
        values[a.target] = mx.concatenate(parts).reshape(shapes[a.target]).astype(mx.float32)
    return values


@pytest.mark.parametrize("layout", files.LAYOUTS)
def test_every_layout_gives_the_same_values(tmp_path, layout):
    wanted = files.write_nano(tmp_path, layout)
    checkpoint = read_nano(tmp_path)
    assert (checkpoint.encoder, checkpoint.adaptor, checkpoint.decoder) == (files.ENCODER, files.ADAPTOR, files.DECODER)
    assert checkpoint.ctc is None
    assert not checkpoint.frontend.cmvn
    assert checkpoint.frontend.output_size == files.ENCODER.input_size
    found = filled(checkpoint)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert np.array_equal(np.array(found[name]), np.array(array)), name
    assert all(path.is_file() for path in checkpoint.used)
    assert len(set(checkpoint.used)) == len(checkpoint.used)


def test_the_ctc_branch_is_read_where_there_is_one(tmp_path):
    wanted = files.write_nano(tmp_path, ctc=True)
    checkpoint = read_nano(tmp_path)
    assert checkpoint.ctc == files.CTC
    found = filled(checkpoint)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(np.array(found[name]), np.array(array)) for name, array in wanted.items())


@pytest.mark.parametrize("layout", ["funasr", "hf"])
def test_a_file_may_lack_the_branch(tmp_path, layout):
    files.write_nano(tmp_path, layout)
    assert read_nano(tmp_path).ctc is None


def test_half_a_ctc_branch_is_an_error(tmp_path):
    files.write_nano(tmp_path, ctc=True)
    values = files.published(files.parameters(), "funasr")
    del values["ctc.ctc_lo.weight"]
    files.write_pt(tmp_path / "model.pt", values)
    with pytest.raises(CheckpointError, match=r"CTC branch: it has no 'ctc\.ctc_lo\.weight'"):
        read_nano(tmp_path)


def test_names_and_values_of_transformers_own_model():
    """The names that transformers' port has, and which values stand under each: recorded from the port itself."""
    data = golden("nano")
    port = {name: tuple(shape) for name, (shape, _) in data.fact("port").items()}
    digests = {name: digest for name, (_, digest) in data.fact("port").items()}
    own = name_tensors({name: name for name in port}, file="port")
    weights = data.weights()
    sizes = {n: tuple(a.shape) for n, a in weights.items() if not n.startswith("ctc")}
    targets = {a.target: a for a in load_keymap("nano").plan(sizes, shapes_like(sizes), file="pt").assignments}
    plan = load_keymap("nano-hf").plan({n: port[old] for n, old in own.items()}, shapes_like(sizes), file="port")
    assert {a.target for a in plan.assignments} == set(targets)
    for a in plan.assignments:
        original = weights[targets[a.target].sources[0]]
        for source, part in zip(a.sources, np.split(original, len(a.sources)), strict=True):
            digest = hashlib.sha256(np.ascontiguousarray(part).tobytes()).hexdigest()[:16]
            assert digest == digests[own[source]], (a.target, source)


def shapes_like(sizes):
    """Parameter shapes of the golden model, from its own modules."""
    data = golden("nano")
    modules = files.whole(
        EncoderConfig(**data.fact("encoder"), num_queries=0, vocab_size=0),
        NanoAdaptorConfig(**data.fact("adaptor")),
        DecoderConfig(**data.fact("decoder")),
        None,
    )
    shapes = files.shapes_of(modules)
    assert sum(np.prod(s) for s in shapes.values()) == sum(np.prod(s) for s in sizes.values())
    return shapes


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["stem.fc1.weight", "layers.0.final_layernorm.weight"], "either by group"),
        (["layers.0.mlp.fc1.weight"], "either by group"),
        (["layers.0.final_layernorm.weight", "layers.1.mlp.fc1.weight"], r"of the encoder's 2 layers .* but \[0\] do"),
        ([f"layers.{i}.final_layernorm.weight" for i in range(3)], r"but \[0, 1, 2\] do"),
        (["stem.fc1.weight", "encoders0.0.fc1.weight"], "two tensors are both"),
    ],
)
def test_layers_that_cannot_be_told_apart_are_an_error(names, message):
    with pytest.raises(CheckpointError, match=message):
        name_tensors(dict.fromkeys(f"model.audio_tower.{name}" for name in names), file="f")


def test_one_group_of_layers_alone_is_understood():
    names = ["layers.0.mlp.fc1.bias", "layers.1.mlp.fc1.bias", "layers.1.final_layernorm.bias"]
    named = name_tensors({f"audio_tower.{name}": name for name in names}, file="f")
    assert named == {
        "audio_tower.encoders0.0.mlp.fc1.bias": names[0],
        "audio_tower.encoders.0.mlp.fc1.bias": names[1],
        "audio_tower.after_norm.bias": names[2],
    }


def test_other_names_stay():
    names = {"audio_encoder.encoders.0.norm1.bias": 1, "llm.model.norm.weight": 2}
    assert name_tensors(names, file="f") == names
    assert keymap_name(names) == "nano"


@pytest.mark.parametrize(("low_frame_rate", "kept"), [("true", 2), ("false", 11)])
def test_the_low_frame_rate_follows_config_yaml(tmp_path, low_frame_rate, kept):
    files.write_nano(tmp_path, use_low_frame_rate=low_frame_rate)
    assert read_nano(tmp_path).adaptor.rows_kept(11) == kept


def test_the_low_frame_rate_is_on_where_nothing_is_said(tmp_path):
    files.write_nano(tmp_path)
    text = (tmp_path / "config.yaml").read_text().replace("use_low_frame_rate", "x")
    (tmp_path / "config.yaml").write_text(text)
    assert read_nano(tmp_path).adaptor.low_frame_rate


def test_another_word_for_the_low_frame_rate_is_an_error(tmp_path):
    files.write_nano(tmp_path, use_low_frame_rate="maybe")
    with pytest.raises(CheckpointError, match="use_low_frame_rate as 'maybe'"):
        read_nano(tmp_path)


def test_the_epsilon_is_the_one_of_training_in_every_layout(tmp_path):
    files.write_nano(tmp_path, "hf")
    assert read_nano(tmp_path).adaptor.norm_eps == 1e-12


def test_mlt_nano_is_known_by_its_directory_or_by_word(tmp_path):
    files.write_nano(tmp_path / "Fun-ASR-MLT-Nano-2512")
    files.write_nano(tmp_path / "Fun-ASR-Nano-2512")
    assert read_nano(tmp_path / "Fun-ASR-MLT-Nano-2512").prompt.languages == MLT_NANO_LANGUAGES
    assert read_nano(tmp_path / "Fun-ASR-Nano-2512").prompt.languages == NANO_LANGUAGES
    assert read_nano(tmp_path / "Fun-ASR-Nano-2512", multilingual=True).prompt.languages == MLT_NANO_LANGUAGES


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"weights are missing: model\.pt or model\.safetensors"):
        read_nano(tmp_path)
    files.write_nano(tmp_path)
    (tmp_path / "Qwen3-tiny" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
        read_nano(tmp_path)
    (tmp_path / "Qwen3-tiny" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"\(Qwen3-0\.6B\), but there is none"):
        read_nano(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="but there are a, b"):
        read_nano(tmp_path)


@pytest.mark.parametrize("layout", ["funasr", "hf"])
def test_the_language_models_files_may_lie_elsewhere(tmp_path, layout):
    files.write_nano(tmp_path / "nano", layout)
    inside = tmp_path / "nano" / ("Qwen3-tiny" if layout == "funasr" else ".")
    elsewhere = tmp_path / "llm"
    elsewhere.mkdir()
    (inside / "tokenizer.json").rename(elsewhere / "tokenizer.json")
    if layout == "funasr":
        (inside / "config.json").rename(elsewhere / "config.json")
    checkpoint = read_nano(tmp_path / "nano", llm=elsewhere)
    assert checkpoint.llm == elsewhere
    assert checkpoint.decoder == files.DECODER


def test_a_configuration_without_a_language_model_is_an_error(tmp_path):
    files.write_nano(tmp_path, "hf")
    (tmp_path / "config.json").write_text(json.dumps({"audio_config": {"num_attention_heads": 4}}))
    with pytest.raises(CheckpointError, match="no 'text_config'"):
        read_nano(tmp_path)


def test_sensevoice_in_place_of_nano_is_refused_by_name(tmp_path):
    files.write_nano(tmp_path)
    sense = {"encoder.encoders0.0.norm1.weight": mx.ones(3), "embed.weight": mx.ones((16, 3))}
    files.write_pt(tmp_path / "model.pt", sense)
    with pytest.raises(CheckpointError, match=r"this is SenseVoiceSmall, not Fun-ASR-Nano .*different weights"):
        read_nano(tmp_path)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("sensevoice-small", "sensevoice"),
        ("fun-asr-nano", "fun-asr-nano"),
        ("fun-asr-nano-hf", "fun-asr-nano"),
        ("hf-split-memory", "fun-asr-nano"),
        ("canary-qwen-2.5b", "canary-qwen"),
        ("qwen3-0.6b", "qwen3"),
        ("adaptor-4b", None),
    ],
)
def test_families_are_told_by_their_names(name, wanted):
    folder = OLD_REVISIONS if name.startswith("hf-") else None
    manifest = load_manifest(name, folder)
    assert family(manifest.tensors) == wanted
    assert family([]) is None


def fingerprint(folder):
    checkpoint = read_nano(folder)
    shapes = {name: ref.shape for name, ref in checkpoint.tensors.items()}
    prefix = "audio_encoder.encoder."
    names = {t.removeprefix(prefix): s[0] for t, s in checkpoint.keymap.rename(shapes).items() if t.startswith(prefix)}
    return encoder_fingerprint(checkpoint.tensors, names)


def test_the_fingerprint_is_the_weights_not_the_layouts(tmp_path):
    for layout in files.LAYOUTS:
        files.write_nano(tmp_path / layout, layout)
    files.write_nano(tmp_path / "wide", dtype=mx.float32, exact=False)
    files.write_nano(tmp_path / "other", seed=1)
    prints = {path.name: fingerprint(path) for path in tmp_path.iterdir()}
    assert len(prints.pop("other")) == 16
    assert len(set(prints.values())) == 1
    assert fingerprint(tmp_path / "other") not in prints.values()
