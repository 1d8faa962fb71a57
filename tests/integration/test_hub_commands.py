"""The commands download, models and info, and what --model finds, against a hub on this machine."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from qwen4b_asr.cli.main import main
from qwen4b_asr.errors import CheckpointError, ConfigError, ModelNotFoundError
from qwen4b_asr.weights import describe, obtain
from qwen4b_asr.weights.catalog import load_catalog
from qwen4b_asr.weights.find import find_model, models_folder
from qwen4b_asr.weights.hub import Hub
from qwen4b_asr.weights.manifest import Manifest
from qwen4b_asr.weights.obtain import obtain_model
from qwen4b_asr.weights.paths import weights_data
from tests.helpers.hub_server import free_port, serving
from tests.helpers.tiny import CONFIG
from tests.helpers.weights_parts import write_parts
from tests.helpers.weights_process import PACKAGE_PARENT

DEMO = weights_data() / "demo"
DEMO_FILES = {name: (DEMO / name).read_bytes() for name in ("config.json", "model.safetensors", "tokenizer.json")}
NAMES = {"encoder": "FunAudioLLM/SenseVoiceSmall", "adaptor": "yuechen/funasr-qwen4b-mlx", "llm": "Qwen/Qwen3-4B"}


def use_hub(monkeypatch, cache: Path, address: str) -> None:
    """Have `Hub()` mean this one, whatever the environment was when huggingface_hub read it."""
    monkeypatch.setattr(Hub.__init__, "__defaults__", (cache, address, False))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def server(tmp_path_factory, monkeypatch, tmp_path):
    """A hub with the three parts of the 4B system, tiny, and a model directory; all that follows uses no other."""
    parts = write_parts(tmp_path_factory.mktemp("published"))
    repos = {
        NAMES["encoder"]: {path.name: path.read_bytes() for path in parts.encoder.iterdir()},
        NAMES["adaptor"]: {"README.md": b"?", "adaptor_phase2_final.pt": parts.adaptor.read_bytes()},
        NAMES["llm"]: {path.name: path.read_bytes() for path in parts.llm.iterdir()},
        "ann/spoken-numbers": {**DEMO_FILES, "checksums.json": (DEMO / "checksums.json").read_bytes()},
    }
    with serving(repos) as running:
        use_hub(monkeypatch, tmp_path / "hub", running.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", os.devnull)
        monkeypatch.setenv("QWEN4B_ASR_MODELS", str(tmp_path / "models"))
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.chdir(tmp_path)
        # The tiny adaptor has other heads than the published one, and no file tells.
        tiny = functools.partial(obtain.convert, adaptor_heads=CONFIG.adaptor.num_heads)
        monkeypatch.setattr(obtain, "convert", tiny)
        yield running


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    return status, out, err


def objects(text: str) -> dict[str, dict]:
    return {value.get("name") or value["title"]: value for value in map(json.loads, text.splitlines())}


# --- download, and the name works ------------------------------------------------------------------------------------


def test_a_name_is_fetched_converted_and_then_found_without_a_network(server, capsys, tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"funasr-qwen4b: not on this machine; qwen4b-asr download"):
        find_model("funasr-qwen4b")
    status, out, _ = run(capsys, "download", "funasr-qwen4b")
    made = tmp_path / "models" / "funasr-qwen4b"
    assert (status, out) == (0, f"{made}\n")
    assert run(capsys, "verify", str(made))[0] == 0
    asked = len(server.requests)
    assert find_model("funasr-qwen4b") == obtain_model("FunASR-Qwen4B") == made
    assert run(capsys, "download", "funasr-qwen4b")[1] == f"{made}\n"
    assert len(server.requests) == asked
    before = (made / "provenance.json").stat().st_ino
    assert run(capsys, "download", "--update", "funasr-qwen4b")[0] == 0
    assert len(server.requests) == asked + 3  # one listing for each part, and no content
    assert (made / "provenance.json").stat().st_ino != before


def test_a_quantised_one_stands_beside_it_under_its_own_name(server, capsys, tmp_path, monkeypatch):
    words = ("download", "funasr-qwen4b", "--quantize", "4", "--group-size", "32")
    status, out, err = run(capsys, *words)
    made = tmp_path / "models" / "funasr-qwen4b-4-g32"
    assert (status, out) == (0, f"{made}\n")
    assert f"{made}: KL divergence mean 0." in err
    assert find_model("funasr-qwen4b-4-g32") == made
    assert run(capsys, "verify", str(made))[0] == 0
    with pytest.raises(ModelNotFoundError):
        find_model("funasr-qwen4b")
    asked = len(server.requests)
    status, out, err = run(capsys, *words)  # it is there: nothing is fetched, made or compared
    assert (status, out, err) == (0, f"{made}\n", "")
    assert run(capsys, "download", "funasr-qwen4b")[1] == f"{tmp_path / 'models' / 'funasr-qwen4b'}\n"
    assert len(server.requests) == asked
    assert find_model("funasr-qwen4b") != made
    for bad, said in (
        (("funasr-qwen4b", "--quantize", "4", "--no-convert"), "not with --no-convert"),
        (("ann/spoken-numbers", "--quantize", "4"), "is not converted here, so it cannot be quantised"),
    ):
        status, _, err = run(capsys, "download", *bad)
        assert status != 0
        assert said in err


def test_output_makes_it_elsewhere_and_replaces_only_by_force(server, capsys, tmp_path):
    words = ("download", "funasr-qwen4b", "--output", str(tmp_path / "here"))
    assert run(capsys, *words)[:2] == (0, f"{tmp_path / 'here'}\n")
    assert not models_folder().exists()
    status, _, err = run(capsys, *words)
    assert status == 1
    assert "exists already" in err
    assert run(capsys, *words, "--force")[0] == 0


def test_the_file_of_a_part_is_found_among_what_other_tools_fetched(tmp_path):
    model = load_catalog()["funasr-qwen4b"]
    for name in ("README.md", "adaptor_cached.pt", "adaptor_phase2_final.pt", "old/adaptor_phase2_final.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert obtain.Parts(model, {"adaptor": tmp_path}).file("adaptor") == tmp_path / "adaptor_phase2_final.pt"


def test_without_conversion_the_folders_are_told(server, capsys):
    status, out, _ = run(capsys, "download", "--no-convert", "funasr-qwen4b")
    folders = dict(line.split("\t") for line in out.splitlines())
    assert (status, folders.keys()) == (0, NAMES.keys())
    assert (Path(folders["llm"]) / "model-00002-of-00002.safetensors").is_file()
    assert not models_folder().exists()


def test_a_part_is_fetched_by_its_own_name(server, capsys):
    status, out, _ = run(capsys, "download", "qwen3-4b")
    assert (Path(out.strip()) / "tokenizer.json").is_file()
    assert status == 0
    with pytest.raises(ModelNotFoundError, match="a language model, no recogniser"):
        obtain_model("Qwen/Qwen3-4B")


def test_a_hub_id_of_a_model_directory_works_like_a_path(server, capsys):
    with pytest.raises(ModelNotFoundError, match=r"not in the hub's cache; qwen4b-asr download ann/spoken-numbers"):
        find_model("ann/spoken-numbers")
    path = obtain_model("ann/spoken-numbers")
    asked = len(server.requests)
    assert path == find_model("ann/spoken-numbers") == find_model("ann/spoken-numbers@main")
    assert {name: (path / name).read_bytes() for name in DEMO_FILES} == DEMO_FILES
    assert run(capsys, "--model", "ann/spoken-numbers", str(DEMO / "sample.wav"))[:2] == (
        0,
        (DEMO / "sample.txt").read_text(),
    )
    assert len(server.requests) == asked


def test_a_hub_id_of_a_checkpoint_is_no_model(server):
    server.repos["ann/other"] = server.repos[NAMES["llm"]]
    with pytest.raises(ModelNotFoundError, match="a checkpoint, not a model directory"):
        obtain_model("ann/other")


def test_a_directory_of_that_name_comes_first(server, tmp_path):
    for name in ("funasr-qwen4b", "ann/spoken-numbers"):
        (tmp_path / name).mkdir(parents=True)
        assert obtain_model(name) == find_model(name) == Path(name)
    assert server.requests == []


def test_what_was_fetched_and_does_not_fit_is_refused_whole(server, capsys):
    adaptor = server.repos[NAMES["adaptor"]]
    adaptor["adaptor_phase2_final.pt"] = adaptor["adaptor_phase2_final.pt"][:-100]
    with pytest.raises(CheckpointError):
        obtain_model("funasr-qwen4b")
    assert list(models_folder().glob("*")) == []


def test_a_recipe_without_a_conversion_is_said(server, monkeypatch):
    monkeypatch.setattr(obtain, "CONVERSIONS", {})
    with pytest.raises(ConfigError, match="no conversion for it"):
        obtain_model("funasr-qwen4b")
    assert server.requests == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("demoo", "did you mean demo?"),
        ("nonsense", "no model of that name"),
        ("./a/b", "no such model directory"),
        ("a/b/c", "no such model directory"),
        ("ann/none", "the hub has no such model"),
        ("ann/spoken-numbers@v9", "not this revision"),
    ],
)
def test_an_unknown_name_is_one_line(server, capsys, name, said):
    status, out, err = run(capsys, "download", name)
    assert (status, out) == (1, "")
    assert err.startswith(f"qwen4b-asr: {name}: ")
    assert said in err


# --- models ----------------------------------------------------------------------------------------------------------


def test_models_tells_what_is_here(server, capsys, tmp_path):
    rows = objects(run(capsys, "models", "--json")[1])
    assert list(rows) == list(load_catalog())
    assert {name: row["state"] for name, row in rows.items() if row["state"] != "-"} == {"demo": "ready"}
    assert rows["qwen3-4b"]["bytes"] == 2 * 4_022_468_096
    run(capsys, "download", "qwen3-4b")
    rows = objects(run(capsys, "models", "--json")[1])
    states = {name: row["state"] for name, row in rows.items()}
    assert (states["qwen3-4b"], states["funasr-qwen4b"], states["qwen3-8b"]) == ("cached", "partly", "-")
    assert rows["qwen3-4b"]["bytes"] == sum(
        len(data) for name, data in server.repos[NAMES["llm"]].items() if name != "README.md"
    )
    run(capsys, "download", "funasr-qwen4b")
    shutil.copytree(DEMO, tmp_path / "models" / "mine")
    (tmp_path / "models" / "stray").mkdir()
    asked = len(server.requests)
    rows = objects(run(capsys, "models", "--json")[1])
    assert rows["funasr-qwen4b"]["state"] == "ready"
    assert rows["funasr-qwen4b"]["path"] == str(tmp_path / "models" / "funasr-qwen4b")
    assert [name for name in rows if name not in load_catalog()] == [str(tmp_path / "models" / "mine")]
    assert len(server.requests) == asked


def test_the_table_lines_up(server, capsys):
    status, out, err = run(capsys, "models")
    table = out.partition("\n\n")[0].splitlines()
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in table] == ["name", *load_catalog()]
    column = table[0].index("licence")
    assert all(line[column - 1] == " " and line[column] != " " for line in table)
    assert re.search(r"^qwen3-4b +- +~8\.04 GB .* Apache-2\.0$", out, re.MULTILINE)


# --- info ------------------------------------------------------------------------------------------------------------


def test_info_of_a_model_directory(capsys, tmp_path, server):
    status, out, err = run(capsys, "info", "demo")
    assert (status, err) == (0, "")
    assert "CC BY-SA 4.0" in out
    (value,) = map(json.loads, run(capsys, "info", "--json", str(DEMO))[1].splitlines())
    parts = {part["name"]: part for part in value["parts"]}
    assert list(parts) == ["frontend", "audio_encoder", "adaptor", "decoder"]
    assert value["total"]["parameters"] == sum(part["parameters"] for part in parts.values()) == 1_532_281
    assert value["total"]["bytes"] == 4 * 1_532_281
    assert value["total"]["dtypes"] == ["F32"]


def test_info_of_published_files_and_of_manifests(capsys, server):
    run(capsys, "download", "--no-convert", "sensevoice-small")
    found = [json.loads(line) for line in run(capsys, "info", "--json", "funasr-qwen4b")[1].splitlines()]
    assert [value["title"] for value in found] == [
        "unknown checkpoint",  # the tiny one on this machine
        "adaptor-4b by its manifest",
        "qwen3-4b by its manifest",
    ]
    assert [value["total"]["parameters"] for value in found[1:]] == [207_734_272, 4_022_468_096]
    assert [part["name"] for part in found[0]["parts"]] == ["embed", "encoder", "ctc"]
    (file,) = Path(found[0]["path"]).glob("model.pt")
    (again,) = map(json.loads, run(capsys, "info", "--json", str(file))[1].splitlines())
    assert again["parts"] == found[0]["parts"]


def test_info_counts_what_packed_tensors_stand_for(capsys, tmp_path, server):
    matrix = mx.random.normal((8, 128))
    tensors = {"decoder.norm.weight": mx.ones((128,))}
    for name, bits, group in (("decoder.a", 4, 32), ("decoder.b", 8, 64)):
        packed = mx.quantize(matrix, bits=bits, group_size=group)
        tensors |= {f"{name}.{key}": value for key, value in zip(("weight", "scales", "biases"), packed, strict=True)}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    settings = {"bits": 8, "group_size": 64, "a": {"bits": 4, "group_size": 32}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization": settings}))
    (value,) = map(json.loads, run(capsys, "info", "--json", str(tmp_path))[1].splitlines())
    assert value["total"]["parameters"] == 8 * 128 * 2 + 128
    assert value["total"]["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert "U32" in value["total"]["dtypes"]
    assert "packed   bits 8, group_size 64; 1 tensors otherwise" in run(capsys, "info", str(tmp_path))[1]


def test_info_of_a_quantised_manifest(capsys, server):
    (value,) = map(json.loads, run(capsys, "info", "--json", "qwen3-4b-8bit")[1].splitlines())
    assert value["total"]["parameters"] == 4_022_468_096
    assert value["total"]["bytes"] == pytest.approx(4_022_468_096 * (8 + 32 / 64) / 8, rel=1e-3)


def test_info_names_every_manifest_that_fits(capsys, server, monkeypatch, tmp_path):
    shapes = {"a.weight": (2, 3), "b": (4,)}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {name: mx.zeros(shape) for name, shape in shapes.items()})
    known = {
        "one": Manifest("one", "decoder", "", "MIT", {}, "F32", shapes, {}, {}),
        "two": Manifest("two", "decoder", "", "MIT", {}, "F32", {"b": (4,)}, {"a.weight": (2, 3)}, {}),
        "other shape": Manifest("other shape", "decoder", "", "", {}, "F32", shapes | {"b": (5,)}, {}, {}),
        "more": Manifest("more", "decoder", "", "", {}, "F32", shapes | {"c": (1,)}, {}, {}),
        "less": Manifest("less", "decoder", "", "", {}, "F32", {"b": (4,)}, {}, {}),
    }
    monkeypatch.setattr(describe, "manifest_names", lambda: list(known))
    monkeypatch.setattr(describe, "load_manifest", known.__getitem__)
    assert describe.describe_path(tmp_path).manifests == ("one", "two")


def test_info_of_nothing(capsys, tmp_path, server):
    (tmp_path / "empty").mkdir()
    for name, said in (("nonsense", "no model of that name"), ("empty", "model.safetensors"), ("a/b", "no such dir")):
        status, out, err = run(capsys, "info", name)
        assert (status, out) == (1, "")
        assert said in err


# --- the environment -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offline", [False, True])
def test_the_environment_is_honoured(server, tmp_path, offline):
    settings = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": str(int(offline))}
    keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    keep["PYTHONPATH"] = str(PACKAGE_PARENT)
    command = [sys.executable, "-m", "qwen4b_asr", "download", "ann/spoken-numbers"]
    done = subprocess.run(command, capture_output=True, text=True, env=keep | settings)
    if offline:
        assert (done.returncode, done.stdout, server.requests) == (1, "", [])
        assert re.fullmatch("qwen4b-asr: ann/spoken-numbers: not in the cache .*HF_HUB_OFFLINE.*\n", done.stderr)
    else:
        assert (done.returncode, done.stderr) == (0, "")
        assert Path(done.stdout.strip()).is_relative_to(tmp_path / "home")


def test_no_network_and_no_cache_is_one_line(server, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    use_hub(monkeypatch, tmp_path / "hub", f"http://127.0.0.1:{free_port()}")
    status, out, err = run(capsys, "download", "sensevoice-small")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("qwen4b-asr: FunAudioLLM/SenseVoiceSmall: not in the cache, and the hub cannot be reached")
