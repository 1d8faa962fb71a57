"""Model directories: loading is strict, verify finds every kind of damage, writing is all or nothing."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from qwen4b_asr.errors import CheckpointError, ConfigError
from qwen4b_asr.weights.config_yaml import read_config_yaml
from qwen4b_asr.weights.directory import file_sha256, save_model, staged_directory, write_checksums
from qwen4b_asr.weights.load import load_model, resolve_dtype
from qwen4b_asr.weights.paths import weights_data
from qwen4b_asr.weights.verify import verify
from tests.helpers.tiny import CONFIG, byte_tokenizer, tiny_model

FIRST = "audio_encoder.encoder.encoders0.0.norm1.weight"
TABLE = "decoder.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A good model directory; copy it before changing it."""
    folder = tmp_path_factory.mktemp("saved")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    save_model(folder / "model", tiny_model(), CONFIG, folder / "tokenizer.json", provenance={"made": "by a test"})
    return folder / "model"


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of it to change."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def rewrite(folder, change, checksums=True):
    """Change the tensors of a directory; `checksums` says whether its list is made to agree."""
    path = folder / "model.safetensors"
    arrays = dict(mx.load(str(path)))
    mx.eval(list(arrays.values()))
    change(arrays)
    mx.save_safetensors(str(path), arrays)
    if checksums:
        relist(folder)


def relist(folder):
    """Write the checksums anew."""
    (folder / "checksums.json").unlink(missing_ok=True)
    write_checksums(folder, {path.name: file_sha256(path) for path in folder.iterdir()})


def test_what_is_saved_verifies_and_loads(saved):
    assert verify(saved).problems == ()
    model, config = load_model(saved, dtype="float32")
    assert config == CONFIG
    want = dict(tree_flatten(tiny_model().parameters()))
    found = dict(tree_flatten(model.parameters()))
    assert found.keys() == want.keys()
    assert all(mx.array_equal(found[name], array) for name, array in want.items())


def put(name, array):
    """A change that sets a tensor."""
    return lambda arrays: arrays.__setitem__(name, array)


def take(name):
    """A change that removes a tensor."""
    return lambda arrays: arrays.pop(name)


BAD_TENSORS = [
    (take(FIRST), f"{FIRST} is missing"),
    (take(TABLE), f"{TABLE} is missing"),
    (put("decoder.lm_head.weight", mx.zeros((300, 24))), r"decoder\.lm_head\.weight is unknown"),
    (put(FIRST, mx.zeros((57,))), rf"{FIRST} has shape \[57\] instead of \[56\]"),
    (put(FIRST, mx.zeros((56, 1))), rf"{FIRST} has shape \[56, 1\] instead of \[56\]"),
    (put(TABLE, mx.zeros((24, 300))), rf"{TABLE} has shape \[24, 300\] instead of \[300, 24\]"),
    (put(FIRST, mx.zeros((56,), mx.int32)), f"'{FIRST}' is stored as I32"),
    (put(TABLE, mx.zeros((300, 24), mx.float16)), f"'{TABLE}' is stored as F16, whose range Qwen3 exceeds"),
]


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS)
def test_loading_and_verifying_are_strict(copy, change, message):
    rewrite(copy, change)
    with pytest.raises(CheckpointError, match=message):
        load_model(copy)
    with pytest.raises(CheckpointError, match=message):
        verify(copy).raise_if_bad()


def test_an_encoder_in_half_precision_is_taken(copy):
    # The demo's size depends on it; only the decoder's activations overflow.
    rewrite(copy, put(FIRST, mx.ones((56,), mx.float16)))
    assert verify(copy).ok
    model, _ = load_model(copy)
    assert dict(tree_flatten(model.parameters()))[FIRST].dtype == mx.float32


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "checksums.json").unlink(), r"^checksums\.json is missing$"),
        (lambda f: (f / "checksums.json").write_text("[]"), r"checksums\.json cannot be read"),
        (lambda f: edit(f / "checksums.json", schema=9), r"checksums\.json cannot be read: .*schema 1"),
        (lambda f: edit(f / "checksums.json", files={"../x": ""}), r"'\.\./x' is not the name of a file beside it"),
        (lambda f: edit(f / "checksums.json", files={"config.json": ""}), r"^tokenizer\.json is not listed"),
        (lambda f: (f / "tokenizer.json").unlink(), r"^tokenizer\.json is missing$"),
        (lambda f: (f / "model.safetensors").unlink(), r"needs model\.safetensors"),
        (lambda f: (f / "config.json").unlink(), r"config\.json: missing"),
        (lambda f: (f / "provenance.json").write_text("{}"), r"^provenance\.json does not have the checksum"),
        (lambda f: flip(f / "model.safetensors", -1), r"^model\.safetensors does not have the checksum"),
        (lambda f: cut(f / "model.safetensors"), r"cut short"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), r"tokenizer\.json: not a tokenizer"),
        (lambda f: rewrite(f, put(FIRST, mx.full((56,), float("nan")))), f"'{FIRST}' has 56 values that are not"),
        (lambda f: rewrite(f, put(TABLE, infinite())), f"'{TABLE}' has 1 values that are not finite"),
        (lambda f: rewrite(f, put(FIRST, mx.ones((56,))), False), r"^model\.safetensors does not have the checksum"),
        (lambda f: smaller_vocabulary(f), r"tokenizer\.json has 259 tokens, the decoder 258|stop tokens"),
    ],
)
def test_verify_finds_the_damage(copy, damage, message):
    damage(copy)
    report = verify(copy)
    assert not report.ok
    assert any(re.search(message, problem) for problem in report.problems), report.problems


def edit(path, **values):
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def flip(path, at):
    """Change one byte."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def cut(path):
    """Lose the last byte."""
    path.write_bytes(path.read_bytes()[:-1])


def infinite():
    """A table in bfloat16 with one infinity."""
    return mx.where(mx.arange(300 * 24).reshape(300, 24) == 77, float("inf"), 1.0).astype(mx.bfloat16)


def smaller_vocabulary(folder):
    """A decoder with fewer rows than the tokenizer has tokens."""
    config = json.loads((folder / "config.json").read_text())
    config["decoder"]["vocab_size"] = 258
    config["generation"]["stop_token_ids"] = [256]
    (folder / "config.json").write_text(json.dumps(config))
    rewrite(folder, lambda arrays: arrays.__setitem__(TABLE, arrays[TABLE][:258]))


def test_verify_needs_a_directory_and_tells_its_progress(saved, tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        verify(tmp_path / "none")
    seen = []
    report = verify(saved, on_progress=lambda *args: seen.append(args))
    assert seen[-1][1] == seen[-1][2] > 2 * report.nbytes
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_dtype_policy():
    on_gpu = mx.default_device() == mx.gpu
    assert resolve_dtype("auto") == (mx.bfloat16 if on_gpu else mx.float32)
    assert resolve_dtype("float32") == mx.float32
    assert resolve_dtype("bfloat16") == mx.bfloat16
    with pytest.raises(ConfigError, match="65504"):
        resolve_dtype("float16")
    with pytest.raises(ConfigError, match="'half': choose one of auto, float32, bfloat16"):
        resolve_dtype("half")


# --- Staging ---------------------------------------------------------------------------------------------------------


def test_a_block_that_fails_leaves_nothing(tmp_path):
    def fail(stage):
        (stage / "a").write_text("x")
        assert stage.parent == tmp_path
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), staged_directory(tmp_path / "out", force=False) as stage:
        fail(stage)
    assert list(tmp_path.iterdir()) == []


def dead_process() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_left_overs_of_dead_runs_are_cleared_and_others_kept(tmp_path):
    host = socket.gethostname()
    dead, alive = dead_process(), os.getppid()
    gone = [f".out.partial-{host}-{dead}", f".out.replaced-{host}-{dead}"]
    kept = [f".out.partial-{host}-{alive}", f".out.partial-elsewhere-{dead}", f".other.partial-{host}-{dead}", "mine"]
    for name in gone + kept:
        (tmp_path / name).mkdir()
    (tmp_path / "out").mkdir()
    with staged_directory(tmp_path / "out", force=False):
        assert {path.name for path in tmp_path.iterdir()} >= set(kept)
        assert not {path.name for path in tmp_path.iterdir()} & set(gone)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "out"])


def test_a_model_that_was_moved_aside_by_a_killed_run_is_put_back(saved, tmp_path):
    shutil.copytree(saved, tmp_path / f".out.replaced-{socket.gethostname()}-{dead_process()}")
    with pytest.raises(CheckpointError, match="exists already"), staged_directory(tmp_path / "out", force=False):
        pass
    assert verify(tmp_path / "out").ok
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_model_comes_back_if_the_new_one_cannot_be_moved_in(saved, tmp_path, monkeypatch):
    out = Path(shutil.copytree(saved, tmp_path / "out"))
    rename = Path.rename

    def fail(self, target):
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with (
        pytest.raises(CheckpointError, match=r"cannot be put in place .Input/output error"),
        staged_directory(out, force=True) as stage,
    ):
        (stage / "a").write_text("x")
    assert verify(out).ok
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_appears_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "out"

    def meanwhile(stage):
        (stage / "a").write_text("x")
        out.mkdir()
        (out / "b").write_text("y")

    with pytest.raises(CheckpointError, match="exists already"), staged_directory(out, force=False) as stage:
        meanwhile(stage)
    assert [path.name for path in out.iterdir()] == ["b"]


# --- Small readers ---------------------------------------------------------------------------------------------------


def test_config_yaml_scalars_under_dotted_keys(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "# head\na: 1\nb:\n    c: 'x # y'\n    d: 2 # two\n    e:\n        f: \"q\"\n    g: null\n"
        "list:\n- 1\n- k: 2\nh: {i: 3}\n"
    )
    found = read_config_yaml(path)
    assert {key: found[key] for key in ("a", "b.d", "b.e.f", "b.g")} == {
        "a": "1",
        "b.d": "2",
        "b.e.f": "q",
        "b.g": "null",
    }
    assert "list.k" not in found
    path.write_bytes(b"\xff\xff")
    with pytest.raises(CheckpointError, match=r"config\.yaml: cannot be read as text"):
        read_config_yaml(path)


def test_the_data_folder_is_the_checkouts_or_the_packages():
    assert (weights_data() / "qwen3-4b.json").is_file()
