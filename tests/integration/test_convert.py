"""Parts on disk -> convert -> verify -> load, as a user does it, with a tiny model on the same path."""

import hashlib
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from qwen4b_asr.errors import CheckpointError, ConfigError
from qwen4b_asr.weights.convert import convert
from qwen4b_asr.weights.load import load_model
from qwen4b_asr.weights.safetensors_file import read_safetensors_directory
from qwen4b_asr.weights.verify import verify
from tests.helpers.tiny import CONFIG
from tests.helpers.weights_parts import PART_CONFIG, adaptor_tensors, encoder_tensors, kaldi_text, write_parts, write_pt
from tests.helpers.weights_process import files_of


def leaves(model):
    """Name -> array of a loaded model."""
    return dict(tree_flatten(model.parameters()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"naming": "split", "adaptor_suffix": ".safetensors"},
        {"naming": "blocks", "shards": False},
        {"naming": "split_ffn", "lm_head": True},
    ],
)
def test_parts_become_a_model_that_verifies_and_loads(tmp_path, options):
    parts = write_parts(tmp_path, **options)
    seen = []
    config = convert(**parts.arguments(tmp_path / "out"), on_progress=lambda *args: seen.append(args))
    assert config == PART_CONFIG
    report = verify(tmp_path / "out")
    assert report.problems == ()
    assert (report.tensors, report.parameters) == (
        len(parts.parameters),
        sum(array.size for array in parts.parameters.values()),
    )
    model, loaded = load_model(tmp_path / "out", dtype="float32")
    assert loaded == config
    found = leaves(model)
    assert found.keys() == parts.parameters.keys()
    for name, array in found.items():
        assert array.dtype == mx.float32
        assert mx.array_equal(array, parts.parameters[name]), name
    done = [count for _, count, _ in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1][2]
    assert {name for name, _, _ in seen} >= parts.parameters.keys()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_provenance_says_what_was_used_and_what_dropped(tmp_path):
    parts = write_parts(tmp_path, lm_head=True)
    convert(**parts.arguments(tmp_path / "out"))
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    for part, folder in (("encoder", parts.encoder), ("llm", parts.llm)):
        for name, digest in provenance["sources"][part].items():
            assert files_of(folder)[name] == digest
    digest = hashlib.sha256(parts.adaptor.read_bytes()).hexdigest()
    assert provenance["sources"]["adaptor"] == {"adaptor.pt": digest}
    assert set(provenance["sources"]["llm"]) >= {"model-00001-of-00002.safetensors", "config.json", "tokenizer.json"}
    assert list(provenance["dropped"]) == ["lm_head.weight"]
    assert provenance["tool"].startswith("qwen4b-asr ")


@pytest.mark.parametrize(
    ("llm_dtype", "dtype", "stored"),
    [
        (mx.bfloat16, None, "BF16"),
        (mx.float32, None, "F32"),
        (mx.float16, None, "F32"),
        (mx.float32, "bfloat16", "BF16"),
        (mx.bfloat16, "float32", "F32"),
    ],
)
def test_the_decoder_is_stored_without_loss_unless_asked(tmp_path, llm_dtype, dtype, stored):
    parts = write_parts(tmp_path, llm_dtype=llm_dtype)
    convert(**parts.arguments(tmp_path / "out"), dtype=dtype)
    refs = read_safetensors_directory(tmp_path / "out")
    assert {ref.dtype for name, ref in refs.items() if name.startswith("decoder.")} == {stored}
    assert {ref.dtype for name, ref in refs.items() if not name.startswith("decoder.")} == {"F32"}
    name = "decoder.model.layers.1.mlp.up_proj.weight"
    want = parts.parameters[name].astype(llm_dtype)
    assert mx.array_equal(refs[name].read(), want.astype(mx.bfloat16 if stored == "BF16" else mx.float32))


@pytest.mark.parametrize(("dtype", "decoder"), [("float32", mx.float32), ("bfloat16", mx.bfloat16)])
def test_loading_gives_the_types_asked_for(tmp_path, dtype, decoder):
    parts = write_parts(tmp_path, llm_dtype=mx.bfloat16)
    convert(**parts.arguments(tmp_path / "out"))
    model, _ = load_model(tmp_path / "out", dtype=dtype)
    kinds = {name: array.dtype for name, array in leaves(model).items()}
    assert {kind for name, kind in kinds.items() if name.startswith("decoder.")} == {decoder}
    assert {kind for name, kind in kinds.items() if not name.startswith("decoder.")} == {mx.float32}


def test_float16_is_refused_with_the_reason(tmp_path):
    parts = write_parts(tmp_path)
    with pytest.raises(ConfigError, match=r"65504.*use bfloat16 or float32"):
        convert(**parts.arguments(tmp_path / "out"), dtype="float16")
    with pytest.raises(ConfigError, match=r"65504.*use bfloat16 or float32"):
        load_model(tmp_path, dtype="float16")
    with pytest.raises(ConfigError, match="'int8': choose one of float32, bfloat16"):
        convert(**parts.arguments(tmp_path / "out"), dtype="int8")


def test_shards_and_the_text_of_the_ctc_symbols(tmp_path):
    parts = write_parts(tmp_path)
    (parts.encoder / "tokens.json").write_text("[]")
    convert(**parts.arguments(tmp_path / "out"), shard_bytes=50_000)
    names = sorted(path.name for path in (tmp_path / "out").glob("model-*.safetensors"))
    assert len(names) > 3
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert (tmp_path / "out" / "tokens.json").read_text() == "[]"
    assert verify(tmp_path / "out").ok
    model, _ = load_model(tmp_path / "out", dtype="float32")
    assert all(mx.array_equal(array, parts.parameters[name]) for name, array in leaves(model).items())


def test_converting_twice_gives_the_same_bytes(tmp_path):
    parts = write_parts(tmp_path)
    for name in ("a", "b"):
        convert(**parts.arguments(tmp_path / name))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_heads_come_from_config_yaml_or_the_caller(tmp_path):
    parts = write_parts(tmp_path)
    (parts.encoder / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"heads cannot be told from a width of 32; .*--encoder-heads"):
        convert(**parts.arguments(tmp_path / "out"))
    config = convert(**parts.arguments(tmp_path / "out"), encoder_heads=2)
    assert config.encoder == CONFIG.encoder
    arguments = parts.arguments(tmp_path / "again") | {"adaptor_heads": None, "encoder_heads": 2}
    assert convert(**arguments).adaptor.num_heads == 8  # the real adaptor's: no file tells
    with pytest.raises(CheckpointError, match=r"num_heads must divide hidden_size 40 but got 7; give --adaptor-heads"):
        convert(**(arguments | {"adaptor_heads": 7, "output": tmp_path / "third"}))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda p: (p.encoder / "am.mvn").unlink(), r"sensevoice: am\.mvn is missing"),
        (lambda p: (p.encoder / "model.pt").unlink(), r"sensevoice: the weights are missing: model\.pt or model\."),
        (lambda p: p.adaptor.unlink(), r"adaptor\.pt: --adaptor must be a file"),
        (lambda p: (p.llm / "tokenizer.json").unlink(), r"qwen3: tokenizer\.json is missing"),
        (lambda p: (p.llm / "config.json").unlink(), r"qwen3: config\.json is missing"),
        (lambda p: (p.llm / "model.safetensors.index.json").unlink(), "qwen3: the weights are missing"),
        (lambda p: (p.llm / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002.* is missing"),
        (lambda p: shutil.rmtree(p.llm), "qwen3: --llm must be a directory"),
        (lambda p: shutil.rmtree(p.encoder), "sensevoice: --encoder must be a directory"),
        (lambda p: (p.llm / "config.json").write_text('{"model_type": "llama"}'), "model_type must be 'qwen3'"),
        (lambda p: (p.llm / "config.json").write_text("{"), r"config\.json: cannot be read as JSON"),
        (lambda p: edit_json(p.llm / "config.json", quantization={"bits": 4}), "quantised"),
        (lambda p: edit_json(p.llm / "config.json", num_hidden_layers=3), r"nothing fills 'model\.layers\.2\."),
        (lambda p: edit_json(p.llm / "config.json", num_hidden_layers=1), r"'model\.layers\.1\..* does not have"),
        (lambda p: edit_json(p.llm / "config.json", tie_word_embeddings=False), r"nothing fills 'lm_head\.weight'"),
        (
            lambda p: edit_json(p.llm / "config.json", head_dim=16),
            r"q_proj\.weight' .*\[32, 24\] instead of \[64, 24\]",
        ),
        (lambda p: edit_json(p.llm / "config.json", vocab_size=200), "259 tokens, but the language model only 200"),
        (lambda p: edit_json(p.llm / "config.json", hidden_size=32), "gives rows of 24, but .* is 32 wide"),
        (lambda p: edit_json(p.llm / "generation_config.json", eos_token_id=5000), "stop tokens must lie below 300"),
        (lambda p: (p.llm / "tokenizer.json").write_text("{}"), r"tokenizer\.json: not a tokenizer"),
        (lambda p: (p.encoder / "am.mvn").write_text(kaldi_text(*np.ones((2, 8)))), "rows of 8, .* takes 56"),
        (lambda p: yaml(p, "frontend_conf:\n  n_mels: 80\n"), r"7 x 80 = 560, but the encoder takes 56"),
        (lambda p: yaml(p, "frontend_conf:\n  window: povey\n"), "asks for 'povey'"),
        (lambda p: yaml(p, "frontend_conf:\n  lfr_m: seven\n"), r"frontend_conf\.lfr_m as 'seven'"),
        (lambda p: write_pt(p.encoder / "model.pt", {"a.b": mx.zeros((2,))}), "is not a SenseVoice encoder"),
        (lambda p: write_pt(p.adaptor, {"a.b": mx.zeros((2,))}), "is not an adaptor"),
        (lambda p: shutil.copy(p.encoder / "model.pt", p.adaptor), r"adaptor\.pt: is not an adaptor"),
        (lambda p: edit_adaptor(p, drop="norm.bias"), r"nothing fills 'norm\.bias' \[24\]"),
        (lambda p: edit_adaptor(p, extra="proj.weight"), r"tensor 'proj\.weight' is not known"),
        (lambda p: edit_adaptor(p, integer="norm.bias"), r"tensor 'norm\.bias' is I32"),
        (lambda p: narrow_adaptor(p), "takes rows of 30, but the encoder in .* is 32 wide"),
    ],
)
def test_parts_that_do_not_fit_are_named(tmp_path, break_it, message):
    parts = write_parts(tmp_path)
    break_it(parts)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message):
        convert(**parts.arguments(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def edit_json(path, **values):
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def yaml(parts, text):
    """A config.yaml that tells the heads and then something else."""
    (parts.encoder / "config.yaml").write_text("encoder_conf:\n  attention_heads: 2\n" + text)


def edit_adaptor(parts, drop=None, extra=None, integer=None):
    """Leave a tensor out, add one, or change a type."""
    tensors = adaptor_tensors(parts.parameters)
    tensors.pop(drop, None)
    if extra:
        tensors[extra] = mx.zeros((2, 2))
    if integer:
        tensors[integer] = tensors[integer].astype(mx.int32)
    write_pt(parts.adaptor, tensors)


def narrow_adaptor(parts):
    """An adaptor for an encoder of another width."""
    tensors = adaptor_tensors(parts.parameters)
    write_pt(parts.adaptor, tensors | {"input_proj.weight": tensors["input_proj.weight"][:, :30]})


def test_an_encoder_under_safetensors(tmp_path):
    parts = write_parts(tmp_path)
    tensors = {name: mx.contiguous(array) for name, array in encoder_tensors(parts.parameters).items()}
    mx.save_safetensors(str(parts.encoder / "model.safetensors"), tensors)
    (parts.encoder / "model.pt").unlink()
    convert(**parts.arguments(tmp_path / "out"))
    model, _ = load_model(tmp_path / "out", dtype="float32")
    assert all(mx.array_equal(array, parts.parameters[name]) for name, array in leaves(model).items())


# --- Overwriting ---------------------------------------------------------------------------------------------------


def test_an_existing_output_is_kept_unless_forced(tmp_path):
    parts = write_parts(tmp_path)
    out = tmp_path / "out"
    convert(**parts.arguments(out))
    before = files_of(out)
    with pytest.raises(CheckpointError, match=r"exists already; .*--force"):
        convert(**parts.arguments(out), dtype="bfloat16")
    assert files_of(out) == before
    convert(**parts.arguments(out), dtype="bfloat16", force=True)
    assert verify(out).ok
    assert files_of(out) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adaptor.pt", "out", "qwen3", "sensevoice"]


def test_force_replaces_nothing_but_model_directories(tmp_path):
    parts = write_parts(tmp_path)
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.txt").write_text("x")
    with pytest.raises(CheckpointError, match="not a model directory"):
        convert(**parts.arguments(precious), force=True)
    assert (precious / "chapter1.txt").read_text() == "x"
    (tmp_path / "empty").mkdir()
    convert(**parts.arguments(tmp_path / "empty"))
    assert verify(tmp_path / "empty").ok
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(**parts.arguments(tmp_path / "file"), force=True)
