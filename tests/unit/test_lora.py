"""Adapters on a module tree: what is refused, and that an error changes nothing."""

import math

import mlx.core as mx
import mlx.nn as nn
import pytest

from qwen4b_asr.decoder import DecoderConfig, Qwen3
from qwen4b_asr.lora import (
    LoraConfig,
    LoraLinear,
    add_lora,
    build_lora,
    lora_layers,
    remove_lora,
    set_lora_strength,
)
from tests.helpers.tiny import CONFIG

Q, NORM = "model.layers.0.self_attn.q_proj", "model.norm"


def test_scales():
    patterns = {r"layers\.[01]\.self_attn\.q_proj": 4, "q_proj": 16}
    config = LoraConfig(2, 8, ("q_proj",), patterns, {"2.self_attn.q_proj": 32})
    assert [config.rank_of(f"model.layers.{i}.self_attn.q_proj") for i in (0, 1, 2, 10)] == [4, 4, 16, 16]
    assert config.rank_of("model.layers.0.self_attn.q_projection") == 2
    assert [config.scale_of(f"layers.{i}.self_attn.q_proj") for i in (0, 2, 3)] == [2, 2, 0.5]
    stabilised = LoraConfig(16, 8, ("q_proj",), rank_stabilised=True)
    assert stabilised.scale_of(Q) == 8 / math.sqrt(16)


def test_targets_are_cut_at_a_dot():
    config = LoraConfig(2, 8, ("q_proj", "layers.3.mlp.up_proj"))
    assert config.targets(Q)
    assert config.targets("model.layers.3.mlp.up_proj")
    assert not config.targets("model.layers.13.mlp.up_proj")
    assert not config.targets("model.layers.0.seq_proj")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank of 'rank' must be an integer of at least 1 but got 0"),
        ({"alpha": math.inf}, "alpha of 'alpha' must be a finite number but got inf"),
        ({"alpha_pattern": {"q": math.nan}}, "alpha of 'q'"),
        ({"rank_pattern": {"(": 1}}, "patterns must be regular expressions"),
        ({"name": "a.b"}, "name must be text without a dot but got 'a.b'"),
        ({"name": ""}, "name must be text"),
    ],
)
def test_a_wrong_configuration_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**{"rank": 2, "alpha": 4, **values})


def test_factors_that_do_not_fit_are_all_named_and_nothing_is_changed():
    model = Qwen3(CONFIG.decoder)
    good = mx.zeros((2, 24)), mx.zeros((32, 2))
    with pytest.raises(ValueError, match=r"model\.norm is RMSNorm of this model; nowhere is no layer") as caught:
        add_lora(model, {Q: good, NORM: good, "nowhere": good}, LoraConfig(2, 4))
    assert "[add_lora]" in str(caught.value)
    with pytest.raises(ValueError, match=r"q_proj \[32, 24\] at rank 3 has A \[2, 24\] and B \[32, 2\]"):
        add_lora(model, {Q: good}, LoraConfig(3, 4))
    with pytest.raises(ValueError, match="there are no factors"):
        add_lora(model, {}, LoraConfig(3, 4))
    assert not lora_layers(model)
    with pytest.raises(ValueError, match=r"lora_A must be \(r, 24\) and lora_B \(32, r\)"):
        LoraLinear(nn.Linear(24, 32)).add("default", mx.zeros((2, 24)), mx.zeros((32, 3)), 1.0)


def test_a_target_that_matches_nothing_is_named():
    with pytest.raises(ValueError, match="target_modules must name linear layers but got 'z_proj'"):
        build_lora(Qwen3(CONFIG.decoder), LoraConfig(2, 4, ("q_proj", "z_proj")))
    with pytest.raises(ValueError, match="there are no factors"):
        Qwen3(DecoderConfig(**{**CONFIG.decoder.__dict__, "lora": {"rank": 2, "alpha": 4}}))


def test_an_unknown_adapter_is_named():
    model = Qwen3(CONFIG.decoder)
    build_lora(model, LoraConfig(2, 4, ("q_proj",), name="songs"))
    for act in (lambda: remove_lora(model), lambda: set_lora_strength(model, 0.5)):
        with pytest.raises(ValueError, match=r"adapter must be one of \['songs'\] but got 'default'"):
            act()
