"""The catalog: what ships, how it is read, how files are chosen, and which names mean what."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.errors import ConfigError
from qwen4b_asr.weights.catalog import (
    RECIPES,
    Source,
    any_source,
    find_known,
    load_catalog,
    matches,
    parse_repo,
    unknown_name,
)
from qwen4b_asr.weights.find import BUILT_IN
from qwen4b_asr.weights.manifest import load_manifest
from qwen4b_asr.weights.paths import weights_data

CATALOG = load_catalog()
SOURCES = {f"{name} {role}": source for name, model in CATALOG.items() for role, source in model.parts.items()}


def test_every_model_of_the_family_is_known():
    assert set(CATALOG) >= {
        "demo",
        "funasr-qwen4b",
        "sensevoice-small",
        "fun-asr-nano",
        "fun-asr-mlt-nano",
        "canary-qwen-2.5b",
        "qwen3-0.6b",
        "qwen3-1.7b",
        "qwen3-4b",
        "qwen3-8b",
    }
    assert {name for name, model in CATALOG.items() if model.recipe == "shipped"} == set(BUILT_IN)
    assert all(model.licence and model.title for model in CATALOG.values())
    assert all(model.parts for name, model in CATALOG.items() if name not in BUILT_IN)


def test_every_part_has_a_size():
    assert all(source.nbytes for source in SOURCES.values())


def test_sizes_come_from_the_manifests():
    assert CATALOG["sensevoice-small"].nbytes == 4 * 233_999_167
    assert CATALOG["funasr-qwen4b"].nbytes == 4 * (233_999_167 + 207_734_272) + 2 * 4_022_468_096
    assert CATALOG["demo"].nbytes == 0


@pytest.mark.parametrize("part", [part for part, source in SOURCES.items() if source.manifest is not None])
def test_the_files_that_a_manifest_lists_are_taken(part):
    """What is fetched is what conversion reads, as the manifest says it."""
    source = SOURCES[part]
    manifest = load_manifest(str(source.manifest))
    assert (manifest.source, manifest.licence) == (source.repo, source.licence)
    named = [name for name in manifest.files if ": " not in name]  # others lie in another repository
    names = [name.replace("-0000i-of-", "-00001-of-") for name in named]
    assert source.choose([*names, "README.md", "onnx/model.onnx"]) == names
    assert source.missing(names) == []
    assert source.missing(["README.md"]) == list(source.needed)


SOURCE = Source("a/b", needed=("config.json", "model.pt|model*.safetensors"), wanted=("*.mvn", "*/tokenizer.json"))


@pytest.mark.parametrize(
    ("listing", "chosen", "missing"),
    [
        ("config.json model.pt", "config.json model.pt", ""),
        ("model.safetensors model.pt config.json", "model.pt config.json", ""),
        ("config.json model1.safetensors model2.safetensors", "config.json model1.safetensors model2.safetensors", ""),
        ("config.json old/model.pt", "config.json", "model.pt|model*.safetensors"),
        ("am.mvn Qwen/tokenizer.json deep/er/tokenizer.json", "am.mvn Qwen/tokenizer.json",
         "config.json model.pt|model*.safetensors"),
    ],
)  # fmt: skip
def test_what_is_chosen_of_a_listing(listing, chosen, missing):
    assert SOURCE.choose(listing.split()) == chosen.split()
    assert SOURCE.missing(listing.split()) == missing.split()


LISTED = ["model.pt", "model.safetensors", "config.json", "am.mvn", "x/tokenizer.json", "y"]


@given(st.lists(st.sampled_from(LISTED), unique=True))
def test_what_is_chosen_suffices_exactly_if_the_listing_does(names):
    chosen = SOURCE.choose(names)
    assert SOURCE.missing(chosen) == SOURCE.missing(names)
    assert [name for name in names if name in chosen] == chosen


def test_a_star_stays_within_its_folder():
    assert matches("a.json", "*.json")
    assert not matches("a/b.json", "*.json")
    assert matches("a/b.json", "*/*.json")
    assert not matches("A.JSON", "*.json")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("ann/model", "ann/model"),
        ("ann/model-2.5_b@v1.0", "ann/model-2.5_b@v1.0"),
        ("ann/model@refs/pr/1", "ann/model@refs/pr/1"),
        ("model", None),
        ("./ann/model", None),
        ("../model", None),
        ("a/b/c", None),
        ("/ann/model", None),
        ("ann/model@", None),
        ("ann/model@../../x", None),
        ("ann/mo del", None),
        ("ann/..", None),
    ],
)
def test_what_can_be_a_hub_id(text, label):
    source = parse_repo(text)
    assert (source and source.label) == label
    assert source is None or source == any_source(source.repo, source.revision)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Canary-Qwen-2.5B", "canary-qwen-2.5b"),
        ("nvidia/canary-qwen-2.5b", "canary-qwen-2.5b"),
        ("iic/SenseVoiceSmall", "sensevoice-small"),
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("canary", None),
        ("ann/canary-qwen-2.5b", None),
    ],
)
def test_names_and_aliases(text, name):
    known = find_known(text)
    assert (known and known.name) == name


def test_a_near_miss_is_guessed():
    assert "did you mean fun-asr-nano?" in str(unknown_name("funasr-nano"))
    assert "did you mean" not in str(unknown_name("xyzzy"))


# --- the file --------------------------------------------------------------------------------------------------------

GOOD = json.loads((weights_data() / "catalog.json").read_text())


def changed(change) -> dict:
    values = json.loads(json.dumps(GOOD))
    change(values)
    return values


def spoil(table: str, name: str, key: str, value: object):
    return lambda values: values[table][name].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.__setitem__("schema", 2), "schema 1"),
        (lambda v: v.__setitem__("more", 1), "unknown"),
        (spoil("models", "demo", "recipe", "magic"), "unknown recipe 'magic'"),
        (spoil("models", "demo", "parts", {"model": "none"}), "unknown source 'none'"),
        (spoil("models", "demo", "aliases", ["qwen3-4b"]), "'qwen3-4b' names two models"),
        (spoil("models", "demo", "aliases", [1]), "aliases must hold words"),
        (spoil("models", "demo", "title", None), "title has the wrong type"),
        (spoil("models", "demo", "more", 1), "keys must be"),
        (spoil("sources", "qwen3-4b", "repo", "qwen3"), "repo must be owner/name"),
        (spoil("sources", "qwen3-4b", "needed", []), "something must be needed"),
        (spoil("sources", "qwen3-4b", "bytes", True), "bytes has the wrong type"),
        (spoil("sources", "qwen3-4b", "sha256", {"a": "1"}), "not a SHA-256"),
        (lambda v: v["models"].__setitem__("a/b", v["models"]["demo"]), "'a/b'"),
    ],
)
def test_a_broken_catalog_is_refused(tmp_path, change, said):
    (tmp_path / "catalog.json").write_text(json.dumps(changed(change)))
    with pytest.raises(ConfigError, match=said):
        load_catalog(tmp_path)


def test_the_recipes_are_all_used():
    assert {model.recipe for model in CATALOG.values()} == set(RECIPES)
