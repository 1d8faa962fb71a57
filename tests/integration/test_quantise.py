"""Quantising on the way into a model directory: every recipe, every family, loaded and compared with its original."""

import json
from dataclasses import replace
from math import prod

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import qwen4b_asr
from qwen4b_asr.errors import CheckpointError, ConfigError
from qwen4b_asr.model import SpeechModel
from qwen4b_asr.quantization import Quantization, Scheme, UnpackingLinear
from qwen4b_asr.weights import quantize
from qwen4b_asr.weights.convert import convert, convert_checkpoint
from qwen4b_asr.weights.load import load_model, parameter_shapes
from qwen4b_asr.weights.paths import weights_data
from qwen4b_asr.weights.quantize import quantize_rows
from qwen4b_asr.weights.recipes import PARTS, RECIPES, quantized_config, read_recipe, stored_bytes
from qwen4b_asr.weights.safetensors_file import read_safetensors_directory
from qwen4b_asr.weights.verify import verify
from tests.helpers import nano_files
from tests.helpers.quantised import WIDE, dense_twin, plain, wide_parts
from tests.helpers.weights_process import files_of

DEMO = weights_data() / "demo"
IDS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])


def logits(decoder):
    return np.array(decoder(decoder.embed(IDS)))


def sizes_on_disk(directory):
    """Bytes by part of the configuration."""
    sizes: dict[str, int] = {}
    for name, ref in read_safetensors_directory(directory).items():
        part = PARTS[name.partition(".")[0]]
        sizes[part] = sizes.get(part, 0) + ref.nbytes
    return sizes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recipe", [*RECIPES, "own"])
def test_every_recipe_makes_a_model_that_verifies_and_computes_with_its_own_numbers(tmp_path, recipe, tied):
    parts = wide_parts(tmp_path, tied=tied, llm_dtype=mx.bfloat16)
    if recipe == "own":
        rules = {"decoder": [{"modules": "*", "bits": 3}, {"modules": "*.mlp.*", "bits": 8, "layers": [0, -1]}]}
        (tmp_path / "own.json").write_text(json.dumps(rules))
    chosen = read_recipe(str(tmp_path / "own.json") if recipe == "own" else recipe, encoder=8, adaptor=6)
    out = tmp_path / "out"
    config = convert(**parts.arguments(out), recipe=chosen)
    source = replace(WIDE, decoder=replace(WIDE.decoder, tie_word_embeddings=tied))
    assert (config, plain(config)) == (quantized_config(source, chosen), source)
    report = verify(out)
    assert report.problems == ()
    assert report.parameters == sum(map(prod, parameter_shapes(SpeechModel(source)).values()))
    assert sizes_on_disk(out) == stored_bytes(config)
    own, twin = dense_twin(out)
    wanted = logits(twin)
    assert np.allclose(logits(own), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    assert json.loads((out / "provenance.json").read_text())["quantization"]["name"] == chosen.name
    model, _ = load_model(out)
    assert mx.isfinite(model.adaptor(model.audio_encoder(mx.ones((1, 9, 56)))[0])).all()


@pytest.mark.parametrize("llm", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_the_tensors_are_those_of_the_rows_that_were_there(tmp_path, llm, dtype):
    parts = wide_parts(tmp_path, llm_dtype=llm)
    convert(**parts.arguments(tmp_path / "out"), dtype=dtype, recipe=read_recipe("4", encoder=6), shard_bytes=30_000)
    refs = read_safetensors_directory(tmp_path / "out")
    kind = mx.float32 if dtype == "float32" else mx.bfloat16
    path, scheme = "decoder.model.layers.3.mlp.down_proj", Scheme(32, 4)
    wanted = quantize_rows(parts.parameters[f"{path}.weight"].astype(llm), scheme, kind)
    for name, array in wanted.items():
        assert refs[f"{path}.{name}"].read().dtype == array.dtype
        assert mx.array_equal(refs[f"{path}.{name}"].read(), array), name
    path = "audio_encoder.encoder.tp_encoders.1.feed_forward.w_1"
    wanted = quantize_rows(parts.parameters[f"{path}.weight"], Scheme(64, 6))
    assert all(mx.array_equal(refs[f"{path}.{name}"].read(), array) for name, array in wanted.items())
    untouched = [n for n, a in parts.parameters.items() if a.ndim != 2 and not n.startswith("decoder.")]
    untouched += ["audio_encoder.embed.weight", "audio_encoder.ctc.ctc_lo.weight", "adaptor.input_proj.weight"]
    assert len(untouched) > 40
    assert all(mx.array_equal(refs[name].read(), parts.parameters[name]) for name in untouched)


@pytest.mark.parametrize(("dtype", "kind"), [("float32", mx.float32), ("bfloat16", mx.bfloat16), ("auto", None)])
def test_scales_and_activations_have_the_type_that_the_device_computes_fastest(tmp_path, dtype, kind):
    if kind is None:
        kind = mx.bfloat16 if mx.default_device().type == mx.DeviceType.gpu else mx.float32
    parts = wide_parts(tmp_path, llm_dtype=mx.bfloat16)
    convert(**parts.arguments(tmp_path / "out"), recipe=read_recipe("4", encoder=8, adaptor=8))
    model, _ = load_model(tmp_path / "out", dtype=dtype)
    for name, array in tree_flatten(model.parameters()):
        last = name.rpartition(".")[2]
        if array.dtype == mx.uint32:
            assert last == "weight"
            continue
        assert array.dtype == (kind if name.startswith("decoder.") else mx.float32), name
    assert model.decoder(model.decoder.embed(IDS)).dtype == kind
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    unpacking = [path for path, m in model.named_modules() if isinstance(m, UnpackingLinear)]
    assert any(path.startswith("audio_encoder.") for path in unpacking) == on_cpu
    assert any(path.startswith("decoder.") for path in unpacking) == (on_cpu and kind == mx.float32)
    states, _ = model.audio_encoder(mx.ones((1, 9, 56)))
    assert model.adaptor(states).dtype == mx.float32


def test_quantising_twice_gives_the_same_bytes_and_so_does_another_way_there(tmp_path):
    parts, recipe = wide_parts(tmp_path, llm_dtype=mx.bfloat16), read_recipe("mixed-4-6", encoder=8)
    for name in ("a", "b"):
        convert(**parts.arguments(tmp_path / name), recipe=recipe)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    convert(**parts.arguments(tmp_path / "dense"))
    convert_checkpoint(tmp_path / "dense", tmp_path / "c", recipe=recipe)
    a, c = files_of(tmp_path / "a"), files_of(tmp_path / "c")
    assert {n for n in a if a[n] != c[n]} == {"provenance.json", "checksums.json"}
    kept = [json.loads((tmp_path / n / "provenance.json").read_text())["encoder_fingerprint"] for n in "ac"]
    assert kept[0] == kept[1]


def test_each_row_is_read_and_quantised_once(tmp_path, monkeypatch):
    taken, original = [], quantize.quantize_rows
    monkeypatch.setattr(quantize, "quantize_rows", lambda m, *rest: taken.append(m.shape[0]) or original(m, *rest))
    parts = wide_parts(tmp_path, llm_dtype=mx.bfloat16)
    convert(**parts.arguments(tmp_path / "out"), recipe=read_recipe("4", encoder=8))
    refs = read_safetensors_directory(tmp_path / "out")
    assert sum(taken) == sum(ref.shape[0] for name, ref in refs.items() if name.endswith(".scales"))
    # Scales lie behind their codes: those of one matrix are held, not those of all.
    for name, ref in refs.items():
        if name.endswith(".scales"):
            codes = refs[name.replace(".scales", ".weight")]
            assert ref.start == codes.start + codes.nbytes


def test_a_model_directory_can_be_stored_anew(tmp_path):
    parts = wide_parts(tmp_path, llm_dtype=mx.float32)
    convert(**parts.arguments(tmp_path / "dense"))
    config = convert_checkpoint(tmp_path / "dense", tmp_path / "half", dtype="bfloat16")
    assert config == WIDE
    assert verify(tmp_path / "half").ok
    refs = read_safetensors_directory(tmp_path / "half")
    name = "decoder.model.layers.0.mlp.up_proj.weight"
    assert mx.array_equal(refs[name].read(), parts.parameters[name].astype(mx.bfloat16))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "model.safetensors").unlink(), r"needs model\.safetensors"),
        (lambda d: (d / "tokenizer.json").unlink(), None),  # verify says so: nothing is made up
        (
            lambda d: rename(d, "decoder.model.norm.weight", "decoder.norm.weight"),
            r"norm\.weight is missing; .* unknown",
        ),
    ],
)
def test_a_damaged_model_directory_is_not_stored_anew(tmp_path, break_it, message):
    parts = wide_parts(tmp_path)
    convert(**parts.arguments(tmp_path / "dense"))
    break_it(tmp_path / "dense")
    if message is None:
        convert_checkpoint(tmp_path / "dense", tmp_path / "out", recipe=read_recipe("8"))
        assert "tokenizer.json" in verify(tmp_path / "out").problems[0]
        return
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path / "dense", tmp_path / "out", recipe=read_recipe("8"))
    assert not (tmp_path / "out").exists()


def rename(directory, old, new):
    """Rename a tensor of a single file."""
    arrays = mx.load(str(directory / "model.safetensors"))
    arrays[new] = arrays.pop(old)
    mx.save_safetensors(str(directory / "model.safetensors"), arrays)


def test_what_is_quantised_is_not_quantised_again_but_its_other_parts_are(tmp_path):
    convert_checkpoint(DEMO, tmp_path / "8", recipe=read_recipe("8"))
    with pytest.raises(ConfigError, match="decoder is quantised already; quantise the original instead"):
        convert_checkpoint(tmp_path / "8", tmp_path / "4", recipe=read_recipe("4"))
    assert not (tmp_path / "4").exists()
    config = convert_checkpoint(tmp_path / "8", tmp_path / "more", recipe=read_recipe(None, encoder=8))
    assert config.decoder.quantization == Quantization(Scheme(64, 8))
    assert verify(tmp_path / "more").ok
    before, after = (read_safetensors_directory(tmp_path / name) for name in ("8", "more"))
    same = [name for name in before if name.startswith("decoder.")]
    assert all(mx.array_equal(before[name].read(), after[name].read()) for name in same)


def test_weights_that_are_not_finite_are_named(tmp_path):
    parts = wide_parts(tmp_path, shards=False)
    arrays = mx.load(str(parts.llm / "model.safetensors"))
    arrays["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    mx.save_safetensors(str(parts.llm / "model.safetensors"), arrays)
    with pytest.raises(
        CheckpointError, match=r"qwen3/model\.safetensors: .*1\.mlp\.up_proj\.weight has values that are"
    ):
        convert(**parts.arguments(tmp_path / "out"), recipe=read_recipe("4"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", [{"name": "8"}, {"name": "6", "encoder": 8, "adaptor": 8}])
def test_the_demo_still_hears_its_sample(tmp_path, recipe):
    convert_checkpoint(DEMO, tmp_path / "out", recipe=read_recipe(**recipe))
    transcriber = qwen4b_asr.load(tmp_path / "out")
    assert transcriber.transcribe(DEMO / "sample.wav").text == "three one four one five"


# --- The other families --------------------------------------------------------------------------------------------


@pytest.fixture
def wide_nano(monkeypatch):
    """Tiny checkpoints of Fun-ASR-Nano get rows that hold groups."""
    monkeypatch.setattr(nano_files, "DECODER", replace(nano_files.DECODER, hidden_size=64, intermediate_size=96))
    monkeypatch.setattr(nano_files, "ADAPTOR", replace(nano_files.ADAPTOR, output_size=64, hidden_size=64, ffn_size=16))


@pytest.mark.parametrize("layout", nano_files.LAYOUTS)
def test_fun_asr_nano_in_every_layout(tmp_path, wide_nano, layout):
    values = nano_files.write_nano(tmp_path / "in", layout, ctc=layout == "funasr")
    recipe = read_recipe("4", encoder=8, adaptor=8, group_size=32)
    config = convert_checkpoint(tmp_path / "in", tmp_path / "out", recipe=recipe)
    assert verify(tmp_path / "out").problems == ()
    assert sizes_on_disk(tmp_path / "out") == stored_bytes(config)
    refs = read_safetensors_directory(tmp_path / "out")
    path = "decoder.model.layers.1.self_attn.k_proj"
    wanted = quantize_rows(values[f"{path}.weight"], Scheme(32, 4), mx.bfloat16)
    assert all(mx.array_equal(refs[f"{path}.{name}"].read(), array) for name, array in wanted.items())
    # Joined from query, key and value where they are published apart: rows are independent.
    path = "audio_encoder.encoder.encoders.1.self_attn.linear_q_k_v"
    wanted = quantize_rows(values[f"{path}.weight"], Scheme(32, 8))
    assert all(mx.array_equal(refs[f"{path}.{name}"].read(), array) for name, array in wanted.items())
    own, twin = dense_twin(tmp_path / "out")
    assert np.allclose(logits(own), logits(twin), rtol=1e-3, atol=1e-3)


def quantise_nano(folder, layout, change=None):
    """Quantise the language model of a published checkpoint as MLX's tools do, under the published names."""
    file = folder / "model.safetensors"
    arrays, root = mx.load(str(file)), "model.language_model."
    table = f"{root}embed_tokens"
    paths = [n.removesuffix(".weight") for n, a in arrays.items() if n.startswith(root) and a.ndim == 2]
    entry = {"group_size": 32, "bits": 4, table: {"group_size": 64, "bits": 8}}
    entry |= {"model.audio_tower.layers.0.self_attn.q_proj": False, f"{root}layers.1.mlp.up_proj": False}
    for path in paths:
        own = entry.get(path, {"group_size": 32, "bits": 4})
        if own:
            parts = mx.quantize(arrays.pop(f"{path}.weight"), **own)
            arrays |= {f"{path}.{name}": a for name, a in zip(("weight", "scales", "biases"), parts, strict=True)}
    for kind in ("weight", "scales", "biases"):  # the tied head is written, too
        arrays[f"lm_head.{kind}"] = arrays[f"{table}.{kind}"]
    entry["lm_head"] = entry[table]
    if change is not None:
        change(arrays, entry)
    mx.save_safetensors(str(file), arrays)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization": entry, "quantization_config": entry}))
    return arrays


@pytest.mark.parametrize("layout", ["hf", "hf-split"])
def test_a_quantised_language_model_within_a_checkpoint_arrives_as_it_is(tmp_path, wide_nano, layout):
    nano_files.write_nano(tmp_path / "in", layout)
    arrays = quantise_nano(tmp_path / "in", layout)
    config = convert_checkpoint(tmp_path / "in", tmp_path / "out")
    assert verify(tmp_path / "out").problems == ()
    assert config.decoder.quantization == Quantization(
        Scheme(32, 4), {"model.embed_tokens": Scheme(64, 8), "model.layers.1.mlp.up_proj": None}
    )
    refs = read_safetensors_directory(tmp_path / "out")
    names = [name for name in arrays if "language_model." in name]
    assert len(names) > 40
    for name in names:
        found = refs[name.replace("model.language_model.", "decoder.model.")].read()
        assert found.dtype == arrays[name].dtype
        assert mx.array_equal(found, arrays[name]), name
    own, twin = dense_twin(tmp_path / "out")
    assert np.allclose(logits(own), logits(twin), rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match="decoder is quantised already"):
        convert_checkpoint(tmp_path / "in", tmp_path / "again", recipe=read_recipe("4"))


DOWN = "model.language_model.layers.0.mlp.down_proj"


def encoder_too(arrays, entry):
    path = "model.audio_tower.layers.1.mlp.fc1"
    weight, scales, biases = mx.quantize(arrays[f"{path}.weight"], group_size=32, bits=4)
    arrays |= {f"{path}.weight": weight, f"{path}.scales": scales, f"{path}.biases": biases}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (encoder_too, r"tensor 'model\.audio_tower.*fc1\.weight' is U32, but all weights but the language model's"),
        (lambda a, e: e.update({DOWN: {"group_size": 32, "bits": 8}}), "'model.layers.0.mlp.down_proj'.*do not fit"),
        (lambda a, e: e.update(mode="int8"), r"config\.json's 'quantization': .*mode must be one of affine"),
        (lambda a, e: e.clear(), "has no 'quantization'"),
    ],
)
def test_a_quantised_checkpoint_that_cannot_be_read_is_named(tmp_path, wide_nano, change, message):
    nano_files.write_nano(tmp_path / "in", "hf")
    quantise_nano(tmp_path / "in", "hf", change)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
