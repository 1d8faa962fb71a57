"""Canary-Qwen and SenseVoiceSmall, quantised as they are converted: near the original, and what is near is measured."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qwen4b_asr
from qwen4b_asr.errors import CheckpointError, ConfigError
from qwen4b_asr.lora import lora_layers
from qwen4b_asr.quantization import Quantization, Scheme
from qwen4b_asr.weights.convert import convert_checkpoint
from qwen4b_asr.weights.fidelity import compare_directories
from qwen4b_asr.weights.recipes import Recipe, Rule, read_recipe
from qwen4b_asr.weights.safetensors_file import read_safetensors_directory
from qwen4b_asr.weights.verify import verify
from tests.helpers.quantised import dense_twin

from . import checks
from .support import golden
from .test_converted_families import lay_out_canary

IDS = mx.array([[3, 1, 4, 1, 5]])


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return lay_out_canary(tmp_path_factory.mktemp("canary"))


@pytest.mark.parametrize("lora", ["keep", "merge"])
def test_canary_with_its_adapter_apart_or_merged(tmp_path: Path, published: tuple[Path, Path], lora: str) -> None:
    source, tokenizer = published
    options = {"tokenizer": tokenizer, "lora": lora}
    convert_checkpoint(source, tmp_path / "dense", **options)
    rules = Rule("*", 8, 32), Rule("*.q_proj", 6, 32)
    recipe = Recipe("own", rules, read_recipe(None, encoder=8, group_size=32).encoder)
    config = convert_checkpoint(source, tmp_path / "out", recipe=recipe, **options)
    assert verify(tmp_path / "out").problems == ()
    # An adapter hides no layer, and is not quantised itself.
    assert config.decoder is not None
    paths = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    assert config.decoder.quantization == Quantization(Scheme(32, 8), dict.fromkeys(paths, Scheme(32, 6)))
    assert {path for path, scheme in config.quantized_stages["encoder"].overrides.items() if scheme} == set()
    transcriber = qwen4b_asr.load(tmp_path / "out", dtype="float32")
    assert bool(lora_layers(transcriber.model.decoder)) == (lora == "keep")
    refs = read_safetensors_directory(tmp_path / "out")
    factors = [name for name in refs if ".lora_" in name]
    assert bool(factors) == (lora == "keep")
    assert {refs[name].dtype for name in factors} <= {"BF16"}
    own, twin = dense_twin(tmp_path / "out")
    wanted = np.array(twin(twin.embed(IDS)))
    assert np.allclose(np.array(own(own.embed(IDS))), wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())
    near = compare_directories(tmp_path / "out", tmp_path / "dense")
    assert near.problem is None
    assert near.audio_error is not None
    assert 0 < near.audio_error < 0.02
    first, last = golden("canary")["speech/range"].tolist()
    assert transcriber.transcribe(np.asarray(checks.waveform("speech"))[first:last], max_tokens=4).tokens


def quantise_canary(source: Path, folder: Path) -> dict[str, mx.array]:
    """Write the checkpoint again with its language model quantised by MLX, under the published names."""
    folder.mkdir()
    arrays = {name: mx.array(value) for name, value in load_file(source / "model.safetensors").items()}
    entry = {"group_size": 32, "bits": 8, "llm.base_model.model.model.layers.1.mlp.down_proj": {"bits": 4}}
    entry["llm.base_model.model.model.layers.1.mlp.down_proj"] = {"group_size": 32, "bits": 4}
    for name in [n for n in arrays if n.startswith("llm.") and n.endswith(".weight") and arrays[n].ndim == 2]:
        path = name.removesuffix(".weight")
        if ".lora_" in name or path.endswith("lm_head"):
            continue
        own = entry.get(path.replace(".base_layer", ""), {"group_size": 32, "bits": 8})
        parts = mx.quantize(arrays.pop(name), **own)
        arrays |= {f"{path}.{part}": array for part, array in zip(("weight", "scales", "biases"), parts, strict=True)}
    save_file({name: np.array(array) for name, array in arrays.items()}, folder / "model.safetensors")
    settings = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "quantization": entry}))
    return arrays


def test_a_quantised_canary_arrives_as_it_is(tmp_path: Path, published: tuple[Path, Path]) -> None:
    source, tokenizer = published
    arrays = quantise_canary(source, tmp_path / "in")
    config = convert_checkpoint(tmp_path / "in", tmp_path / "out", tokenizer=tokenizer)
    assert verify(tmp_path / "out").problems == ()
    assert config.decoder is not None
    form = config.decoder.quantization
    assert form is not None
    assert form.scheme("model.layers.0.self_attn.q_proj") == Scheme(32, 8)
    assert form.scheme("model.layers.1.mlp.down_proj") == Scheme(32, 4)
    refs = read_safetensors_directory(tmp_path / "out")
    scales = [name for name in arrays if name.endswith(".scales")]
    assert len(scales) >= 14
    for name in scales:
        target = "decoder." + name.removeprefix("llm.").removeprefix("base_model.model.")
        assert mx.array_equal(refs[target].read(), arrays[name]), name
    assert compare_directories(tmp_path / "out", tmp_path / "in").mean_kl == 0
    with pytest.raises(CheckpointError, match="cannot be merged into quantised"):
        convert_checkpoint(tmp_path / "in", tmp_path / "merged", tokenizer=tokenizer, lora="merge")


def test_a_recogniser_has_an_encoder_to_quantise(tmp_path: Path) -> None:
    data, wanted = golden("sensevoice"), golden("sensevoice").fact("sound")
    source = tmp_path / "published"
    source.mkdir()
    save_file(golden("encoder").weights() | data.weights("sound/"), source / "model.safetensors")
    (source / "am.mvn").write_bytes(golden("features")["source/am_mvn"].tobytes())
    (source / "config.yaml").write_text(f"encoder_conf:\n    attention_heads: {wanted['config']['attention_heads']}\n")
    (source / "chn_jpn_yue_eng_ko_spectok.bpe.model").write_bytes(data["vocabulary/speech"].tobytes())
    with pytest.raises(ConfigError, match="has no decoder to quantise"):
        convert_checkpoint(source, tmp_path / "out", recipe=read_recipe("8"))
    config = convert_checkpoint(source, tmp_path / "out", recipe=read_recipe(None, encoder=8, group_size=32))
    assert verify(tmp_path / "out").ok
    assert list(config.quantized_stages) == ["encoder"]
    near = compare_directories(tmp_path / "out", source)
    assert (near.positions, near.problem) == (0, None)
    assert near.audio_error is not None
    assert near.ctc_agreement is not None
    assert 0 < near.audio_error < 0.02
    assert near.ctc_agreement > 0.9
    assert len(near.lines()) == 1
    assert qwen4b_asr.load(tmp_path / "out").transcribe(np.asarray(checks.waveform("speech"))) is not None
