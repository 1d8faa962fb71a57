"""From a checkpoint in MLX's quantised layout to a model that is loaded: no code is touched on the way."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from qwen4b_asr.decoder import Qwen3
from qwen4b_asr.errors import CheckpointError
from qwen4b_asr.quantization import Quantization, Scheme, quantize_modules
from qwen4b_asr.weights.convert import convert
from qwen4b_asr.weights.load import load_model
from qwen4b_asr.weights.verify import verify
from tests.helpers.tiny import CONFIG, randomise
from tests.helpers.weights_parts import PART_CONFIG, write_llm, write_parts

BASE = {"group_size": 32, "bits": 4}
DOWN = "model.layers.1.mlp.down_proj"
MIXED = Quantization(
    Scheme(32, 4),
    {DOWN: Scheme(32, 6), "model.embed_tokens": Scheme(64, 8), "model.layers.0.mlp.up_proj": None},
)


def sizes(tied: bool):
    decoder = replace(CONFIG.decoder, hidden_size=64, intermediate_size=96, tie_word_embeddings=tied)
    return replace(PART_CONFIG, adaptor=replace(CONFIG.adaptor, output_size=64), decoder=decoder)


def write_mlx(folder: Path, tied: bool, quantization: Quantization = MIXED, entry: dict | None = None, shards=True):
    """Parts with a decoder in MLX's layout, bfloat16 scales; the decoder itself."""
    config = sizes(tied)
    parts = write_parts(folder, config=config, shards=shards)
    model = randomise(Qwen3(config.decoder), 7)
    model.set_dtype(mx.bfloat16)
    quantize_modules(model, quantization)
    for file in parts.llm.glob("model*"):
        file.unlink()
    write_llm(parts.llm, config, dict(tree_flatten(model.parameters())), shards)
    path = parts.llm / "config.json"
    values = json.loads(path.read_text())
    entry = {**BASE, DOWN: {"group_size": 32, "bits": 6}} if entry is None else entry
    path.write_text(json.dumps({**values, "quantization": entry, "quantization_config": entry}))
    return parts, model


def run(model: Qwen3) -> np.ndarray:
    return np.array(model(model.embed(mx.array([[3, 1, 4, 1, 5]]))).astype(mx.float32))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [True, False])
def test_a_mixed_checkpoint_arrives_as_it_is(tmp_path, tied, shards):
    parts, source = write_mlx(tmp_path / "parts", tied, shards=shards)
    convert(**parts.arguments(tmp_path / "model"))
    assert verify(tmp_path / "model").problems == ()
    model, config = load_model(tmp_path / "model", dtype="bfloat16")
    assert config.decoder.quantization == MIXED
    wanted, found = (dict(tree_flatten(m.parameters())) for m in (source, model.decoder))
    assert wanted.keys() == found.keys()
    assert all(a.dtype == found[n].dtype and mx.array_equal(a, found[n]) for n, a in wanted.items())
    assert np.array_equal(run(model.decoder), run(source))


def test_in_float32_the_codes_stay_and_the_numbers_widen(tmp_path):
    parts, source = write_mlx(tmp_path / "parts", True)
    convert(**parts.arguments(tmp_path / "model"), dtype="float32")
    model, _ = load_model(tmp_path / "model", dtype="float32")
    embedding = model.decoder.model.embed_tokens
    assert (embedding.weight.dtype, embedding.scales.dtype) == (mx.uint32, mx.float32)
    assert mx.array_equal(embedding.weight, source.model.embed_tokens.weight)
    assert model.decoder(model.decoder.embed(mx.array([[1, 2]]))).dtype == mx.float32
    source.set_dtype(mx.float32)
    assert np.array_equal(run(model.decoder), run(source))


def test_floating_point_codes_have_scales_of_a_byte(tmp_path):
    scheme = Scheme(32, 4, "mxfp4")
    entry = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    parts, source = write_mlx(tmp_path / "parts", True, Quantization(scheme), entry)
    convert(**parts.arguments(tmp_path / "model"))
    assert verify(tmp_path / "model").ok
    model, _ = load_model(tmp_path / "model", dtype="bfloat16")
    assert model.decoder.model.embed_tokens.scales.dtype == mx.uint8
    assert np.array_equal(run(model.decoder), run(source))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "config.json: .*quant_method 'awq'"),
        ({**BASE, DOWN: {"group_size": 32, "bits": 4}}, "down_proj.*do not fit"),
        ({**BASE, "model.layers.0.mlp.up_proj": {"bits": 4}}, "is quantised, but there is no"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, entry, message):
    parts, _ = write_mlx(tmp_path / "parts", True, entry=entry)
    with pytest.raises(CheckpointError, match=message):
        convert(**parts.arguments(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_codes_in_another_type_are_refused(tmp_path):
    parts, source = write_mlx(tmp_path / "parts", True, shards=False)
    tensors = dict(tree_flatten(source.parameters()))
    tensors["model.norm.weight"] = tensors["model.norm.weight"].view(mx.uint16)
    mx.save_safetensors(str(parts.llm / "model.safetensors"), tensors)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight' is stored as U16, but weights are float"):
        convert(**parts.arguments(tmp_path / "model"))
    tensors = dict(tree_flatten(source.parameters()))
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"].view(mx.float32)
    mx.save_safetensors(str(parts.llm / "model.safetensors"), tensors)
    with pytest.raises(CheckpointError, match=rf"{DOWN}\.weight' is stored as F32, but .* U32"):
        convert(**parts.arguments(tmp_path / "model"))
