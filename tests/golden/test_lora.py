"""Low-rank adapters against PEFT: its directories read, logits apart, at half strength and merged."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from qwen4b_asr import decoder, lora
from qwen4b_asr.weights import adapters
from qwen4b_asr.weights.keymap import load_keymap

from .planting import Defects, Patch
from .support import GoldenMismatch, compare, fill, golden

ADAPTERS = ("plain", "patterns", "stabilised")
DEFECTS = Defects()


def build(name: str | None = None) -> decoder.Qwen3:
    """Return the decoder, with an adapter if named."""
    data = golden("lora")
    model = fill(decoder.Qwen3(decoder.DecoderConfig(**data.fact("config"))), data.weights())
    if name is not None:
        with tempfile.TemporaryDirectory() as folder:
            for file, content in data.weights(f"files/{name}/").items():
                (Path(folder) / file).write_bytes(content.tobytes())
            adapters.load_adapter(model, folder)
            mx.eval(model.parameters())
    return model


def logits(model: decoder.Qwen3) -> mx.array:
    return model(model.embed(mx.array(golden("lora")["ids"])))


def check_apart(name: str) -> None:
    """Logits with the adapter kept apart, at full and half strength."""
    model = build(name)
    compare(logits(model), golden("lora")[f"logits/{name}"], "decoder", f"logits with {name}")
    lora.set_lora_strength(model, 0.5)
    compare(logits(model), golden("lora")[f"logits/{name}/half"], "decoder", f"logits with half of {name}")


def check_merged(name: str) -> None:
    """Merged weights one by one, and their logits."""
    data, model = golden("lora"), build(name)
    lora.merge_lora(model)
    wanted = data.weights(f"merged/{name}/")
    layers = lora.lora_layers(model)
    if layers.keys() != wanted.keys():
        raise GoldenMismatch(f"{name}: layers {sorted(layers)} instead of {sorted(wanted)}")
    for path, weight in wanted.items():
        compare(layers[path].base_layer.weight, weight, "adaptor", f"merged weight of {path}")
    compare(logits(model), data[f"logits/{name}/merged"], "decoder", f"logits with {name} merged")


@pytest.mark.parametrize("name", ADAPTERS)
class TestAdapter:
    def test_apart(self, name: str) -> None:
        check_apart(name)

    def test_merged(self, name: str) -> None:
        check_merged(name)

    def test_unmerged_is_the_base_model_bit_for_bit(self, name: str) -> None:
        plain, model = build(), build(name)
        lora.merge_lora(model)
        assert not np.array_equal(np.array(logits(model)), np.array(logits(plain)))
        lora.unmerge_lora(model)
        compare(logits(model), golden("lora")[f"logits/{name}"], "decoder", f"logits with {name} after unmerging")
        lora.remove_lora(model)
        assert np.array_equal(np.array(logits(model)), np.array(logits(plain)))
        compare(logits(model), golden("lora")["logits/base"], "decoder", "logits of the base model")

    def test_within_a_checkpoint_the_names_are_the_decoders_own(self, name: str) -> None:
        data = golden("lora")
        shapes = {n: tuple(s) for n, s in data.fact("names")[name].items() if n != "base_model.model.lm_head.weight"}
        values = json.loads(data[f"files/{name}/adapter_config.json"].tobytes())
        refs = {n: SimpleNamespace(shape=s, dtype="F32") for n, s in shapes.items()}
        config = adapters.checkpoint_adapter(refs, values, file="f")
        sizes = decoder.DecoderConfig(**data.fact("config"))
        parameters = dict(tree_flatten(decoder.Qwen3(replace(sizes, lora=config)).parameters()))
        inside = {n.removeprefix("base_model.model."): s for n, s in shapes.items()}
        assert inside == {n: tuple(a.shape) for n, a in parameters.items()}
        plan = load_keymap("qwen3").plan(inside, inside, file="f")
        assert all(a.sources == (a.target,) for a in plan.assignments)


@DEFECTS.noticed_by(partial(check_apart, "plain"))
def scale_without_the_rank(patch: Patch) -> None:
    patch.setattr(lora.LoraConfig, "scale_of", lambda self, path: self.alpha)


@DEFECTS.noticed_by(partial(check_apart, "patterns"))
def alpha_pattern_ignored(patch: Patch) -> None:
    patch.setattr(lora.LoraConfig, "scale_of", lambda self, path: self.alpha / self.rank_of(path))


@DEFECTS.noticed_by(partial(check_apart, "patterns"))
def scale_by_the_common_rank(patch: Patch) -> None:
    original = lora._first_match
    patch.setattr(
        lora.LoraConfig, "scale_of", lambda self, path: original(self.alpha_pattern, path, self.alpha) / self.rank
    )


@DEFECTS.noticed_by(partial(check_merged, "stabilised"))
def not_rank_stabilised(patch: Patch) -> None:
    patch.setattr(lora.LoraConfig, "scale_of", lambda self, path: self.alpha / self.rank_of(path))


@DEFECTS.noticed_by(partial(check_apart, "plain"))
def strength_without_effect(patch: Patch) -> None:
    patch.setattr(lora.LoraLinear, "scale", lambda self, name: self._scales[name])


@DEFECTS.noticed_by(partial(check_merged, "plain"))
def merged_twice(patch: Patch) -> None:
    original = lora.LoraLinear.merged_weight
    patch.setattr(
        lora.LoraLinear, "merged_weight", lambda self: 2 * original(self) - lora.dense_weight(self.base_layer)[0]
    )


@DEFECTS.noticed_by(partial(check_merged, "plain"))
def adapter_beside_its_merged_weight(patch: Patch) -> None:
    patch.setattr(lora.LoraLinear, "merged", property(lambda self: False))


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_noticed(name: str, monkeypatch: Patch) -> None:
    DEFECTS.require_notice(name, monkeypatch)
