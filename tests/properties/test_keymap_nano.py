"""Fun-ASR-Nano's key maps: every published layout onto the stages' own parameters, tensor by tensor."""

from collections import Counter
from functools import cache
from math import prod
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.decoder import DecoderConfig
from qwen4b_asr.encoder import EncoderConfig
from qwen4b_asr.errors import CheckpointError
from qwen4b_asr.nano_adaptor import NanoAdaptorConfig, NanoCtcConfig
from qwen4b_asr.weights.keymap import load_keymap
from qwen4b_asr.weights.manifest import load_manifest
from qwen4b_asr.weights.nano import keymap_name, name_tensors
from tests.helpers import nano_files as files

OLD_REVISIONS = Path(__file__).parents[1] / "data" / "nano"
MANIFESTS = {
    "fun-asr-nano": None,
    "fun-asr-mlt-nano": None,
    "fun-asr-nano-ctc": None,
    "fun-asr-nano-hf": None,
    "hf-split": OLD_REVISIONS,
    "hf-split-memory": OLD_REVISIONS,
}


@pytest.mark.parametrize("with_optional", [False, True])
@pytest.mark.parametrize("name", MANIFESTS)
def test_every_published_layout_fills_the_full_size_model(name, with_optional):
    manifest = load_manifest(name, MANIFESTS[name])
    sources = dict(manifest.tensors) | (dict(manifest.optional) if with_optional else {})
    decoder = DecoderConfig.from_huggingface(load_manifest(manifest.config["decoder"]).config)
    ctc = NanoCtcConfig() if name == "fun-asr-nano-ctc" else None
    encoder = EncoderConfig(num_queries=0, vocab_size=0, attention_heads=manifest.config["attention_heads"])
    adaptor = NanoAdaptorConfig(num_heads=manifest.config["adaptor_heads"])
    wanted = files.shapes_of(files.whole(encoder, adaptor, decoder, ctc))
    named = name_tensors(sources, file=name)
    assert sorted(named.values()) == sorted(sources.values())
    plan = load_keymap(keymap_name(sources)).plan(named, wanted, file=name)
    used = Counter(source for a in plan.assignments for source in a.sources) + Counter(list(plan.dropped))
    assert used == Counter(dict.fromkeys(named, 1))
    assert {a.target for a in plan.assignments} == set(wanted)
    assert len(plan.dropped) == len(manifest.optional) * with_optional == int(with_optional)
    assert sum(prod(shape) for shape in wanted.values()) == manifest.parameters


@cache
def tiny(layout):
    """Key map, sources under the names that it knows, and parameters of the tiny model in one layout."""
    values = files.parameters(ctc=layout == "funasr")
    sources = {name: tuple(array.shape) for name, array in files.published(values, layout).items()}
    return (
        load_keymap(keymap_name(sources)),
        name_tensors(sources, file="f"),
        {name: tuple(array.shape) for name, array in values.items()},
    )


@given(st.sampled_from(files.LAYOUTS), st.data())
def test_any_order_gives_the_same_plan(layout, data):
    keymap, sources, parameters = tiny(layout)
    shuffled = {name: sources[name] for name in data.draw(st.permutations(list(sources)))}
    assert keymap.plan(shuffled, parameters, file="f") == keymap.plan(sources, parameters, file="f")


@given(st.sampled_from(files.LAYOUTS), st.data())
def test_a_missing_tensor_is_named(layout, data):
    keymap, sources, parameters = tiny(layout)
    gone = data.draw(st.sampled_from(sorted(sources)))
    target = next(a.target for a in keymap.plan(sources, parameters, file="f").assignments if gone in a.sources)
    with pytest.raises(CheckpointError, match="nothing fills") as caught:
        keymap.plan({n: s for n, s in sources.items() if n != gone}, parameters, file="the/file")
    assert repr(target) in str(caught.value)
    assert "the/file" in str(caught.value)


@given(st.sampled_from(files.LAYOUTS), st.data())
def test_a_misshapen_tensor_is_named(layout, data):
    keymap, sources, parameters = tiny(layout)
    bad = data.draw(st.sampled_from(sorted(sources)))
    axis = data.draw(st.integers(0, len(sources[bad]) - 1))
    shape = tuple(size + 7 * (i == axis) for i, size in enumerate(sources[bad]))
    with pytest.raises(CheckpointError, match=r"shape|cannot be joined") as caught:
        keymap.plan({**sources, bad: shape}, parameters, file="f")
    assert repr(bad) in str(caught.value)


@given(st.sampled_from(files.LAYOUTS), st.text("abc.0w_", min_size=1, max_size=12))
def test_an_unknown_tensor_is_named(layout, extra):
    keymap, sources, parameters = tiny(layout)
    for prefix in ("", "audio_encoder.", "model.audio_tower.", "llm."):
        with pytest.raises(CheckpointError, match=r"is not known|would fill") as caught:
            keymap.plan({**sources, f"{prefix}{extra}?": (1,)}, parameters, file="f")
        assert repr(f"{prefix}{extra}?") in str(caught.value)


def test_queries_keys_and_values_keep_their_order():
    for layout in files.LAYOUTS[1:]:
        keymap, sources, parameters = tiny(layout)
        joined = [a for a in keymap.plan(sources, parameters, file="f").assignments if len(a.sources) > 1]
        assert len(joined) == 2 * 5
        for a in joined:
            assert [name.split(".")[-2] for name in a.sources] == ["q_proj", "k_proj", "v_proj"], a.target


def test_recomputed_tables_are_dropped_with_a_reason():
    for layout, name in (
        ("funasr", "llm.model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("hf", "model.language_model.rotary_emb.inv_freq"),
        ("hf-split", "model.language_model.layers.1.self_attn.rotary_emb.inv_freq"),
    ):
        keymap, sources, parameters = tiny(layout)
        assert "rope_theta" in keymap.plan({**sources, name: (4,)}, parameters, file="f").dropped[name]
