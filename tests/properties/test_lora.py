"""Low-rank adapters: merged equals apart, unmerged is the layer of before, several add up, in any order."""

from dataclasses import asdict, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from qwen4b_asr.decoder import DecoderConfig, Qwen3
from qwen4b_asr.lora import (
    LoraConfig,
    LoraLinear,
    add_lora,
    fuse_lora,
    layer_shape,
    lora_layers,
    merge_lora,
    remove_lora,
    set_lora_strength,
    unmerge_lora,
)
from qwen4b_asr.quantization import Quantization, Scheme, quantize_modules
from tests.helpers.tiny import CONFIG, max_abs, randomise, rows

SIZES = replace(CONFIG.decoder, vocab_size=40, hidden_size=64, intermediate_size=96)
QUANTISED = replace(SIZES, quantization=Quantization(Scheme(32, 8), {"model.layers.0.self_attn.q_proj": None}))
LAYERS = sorted(p for p, m in Qwen3(SIZES).named_modules() if isinstance(m, nn.Linear))

targets = st.lists(st.sampled_from(LAYERS), min_size=1, max_size=5, unique=True)
alphas = st.floats(0.5, 8) | st.integers(1, 8)


def build(sizes: DecoderConfig, seed: int) -> Qwen3:
    """A decoder with noise in every parameter, the numbers of quantised ones made of codes."""
    model = randomise(Qwen3(replace(sizes, quantization=None)), seed)
    if sizes.quantization is not None:
        quantize_modules(model, sizes.quantization)
    return model


def factors(model: Qwen3, paths: list[str], rank: int, seed: int) -> dict[str, tuple[mx.array, mx.array]]:
    """Noise for both factors of every layer."""
    modules, made = dict(model.named_modules()), {}
    for i, path in enumerate(paths):
        layer = modules[path]
        height, width = layer_shape(layer.base_layer if isinstance(layer, LoraLinear) else layer)
        made[path] = rows(rank, width, seed + 2 * i) * 0.2, rows(height, rank, seed + 2 * i + 1) * 0.2
    return made


def run(model: Qwen3) -> np.ndarray:
    return np.array(model(model.embed(mx.array([[3, 1, 4, 1, 5, 9]]))))


def parameters(model: Qwen3) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in tree_flatten(model.parameters())}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def near(found: np.ndarray, wanted: np.ndarray, bound: float = 2e-4) -> bool:
    return float(np.abs(found - wanted).max()) <= bound * max(1.0, float(np.abs(wanted).max()))


@given(st.sampled_from([SIZES, QUANTISED]), targets, st.integers(1, 6), alphas, st.integers(0, 99))
def test_merged_equals_apart_and_unmerged_is_exactly_what_was(sizes, paths, rank, alpha, seed):
    model = build(sizes, seed)
    base, before = run(model), parameters(model)
    add_lora(model, factors(model, paths, rank, seed), LoraConfig(rank, alpha))
    apart, kept = run(model), parameters(model)
    assert not near(apart, base)
    merge_lora(model)
    merge_lora(model)  # a second time changes nothing
    assert near(run(model), apart)
    assert all(layer.merged for layer in lora_layers(model).values())
    unmerge_lora(model)
    assert same(parameters(model), kept)
    assert np.array_equal(run(model), apart)
    merge_lora(model)
    remove_lora(model)
    assert same(parameters(model), before)
    assert not lora_layers(model)


@given(targets, targets, st.integers(0, 99))
def test_two_adapters_add_up_in_any_order(first, second, seed):
    one, other = build(SIZES, seed), build(SIZES, seed)
    a, b = factors(one, first, 2, seed), factors(one, second, 3, seed + 50)
    add_lora(one, a, LoraConfig(2, 3.0, name="a"))
    add_lora(one, b, LoraConfig(3, 2.0, name="b"))
    add_lora(other, b, LoraConfig(3, 2.0, name="b"))
    only_b = run(other)
    merge_lora(other)
    add_lora(other, a, LoraConfig(2, 3.0, name="a"))  # beside layers that are merged already
    both = run(one)
    assert near(run(other), both)
    fuse_lora(other)
    assert near(run(other), both)
    assert type(dict(other.named_modules())[first[0]]) is nn.Linear
    remove_lora(one, "a")
    assert near(run(one), only_b)


@given(targets, st.floats(-2, 2), st.booleans(), st.integers(0, 99))
def test_strength_multiplies_the_scale_merged_or_not(paths, strength, merged, seed):
    model, scaled = build(SIZES, seed), build(SIZES, seed)
    base = run(model)
    made = factors(model, paths, 3, seed)
    add_lora(model, made, LoraConfig(3, 4.0))
    add_lora(scaled, made, LoraConfig(3, 4.0 * strength))
    if merged:
        merge_lora(model)
    set_lora_strength(model, strength)
    assert all(layer.merged == merged for layer in lora_layers(model).values())
    assert near(run(model), run(scaled))
    set_lora_strength(model, 0.0)
    assert np.array_equal(run(model), base)


@given(st.lists(st.sampled_from(["q_proj", "down_proj", "layers.1.mlp.up_proj"]), min_size=1, unique=True), alphas)
def test_a_configuration_alone_gives_the_parameters(names, alpha):
    config = replace(SIZES, lora=LoraConfig(3, alpha, tuple(names), {"1.self_attn.q_proj": 2}))
    model = Qwen3(config)
    layers = lora_layers(model)
    assert set(layers) == {path for path in LAYERS if any(path.endswith(f".{name}") for name in names)}
    for path, layer in layers.items():
        rank = 2 if path == "model.layers.1.self_attn.q_proj" else 3
        assert layer.lora_A["default"].weight.shape[0] == rank
        assert layer.scale("default") == alpha / rank
    assert DecoderConfig(**asdict(config)) == config
    plain = randomise(Qwen3(SIZES), 4)
    filled = {name.replace(".base_layer", ""): name for name in parameters(model) if ".lora_" not in name}
    held = dict(tree_flatten(plain.parameters()))
    model.load_weights([(name, held[plainly]) for plainly, name in filled.items()], strict=False)
    assert np.array_equal(run(model), run(plain))  # factors of zeros change nothing


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_is_rounded_once(dtype):
    layer = LoraLinear(nn.Linear(32, 24))
    layer.base_layer.weight = layer.base_layer.weight.astype(dtype)
    bias = layer.base_layer.bias = rows(1, 24, 3)[0].astype(dtype)
    a, b = rows(4, 32, 1).astype(dtype), rows(24, 4, 2).astype(dtype)
    layer.add("default", a, b, 0.3)
    x = rows(5, 32, 5).astype(dtype)
    assert layer(x).dtype == dtype
    wide = LoraLinear(layer.base_layer)
    wide.add("default", a.astype(mx.float32), b.astype(mx.float32), 0.3)
    assert wide(x).dtype == dtype
    layer.merge()
    assert mx.array_equal(layer.merged_weight(), layer.base_layer.weight)
    exact = layer._unmerged[0].weight.astype(mx.float32) + 0.3 * (b.astype(mx.float32) @ a.astype(mx.float32))
    assert layer.base_layer.weight.dtype == dtype
    assert mx.array_equal(layer.base_layer.weight, exact.astype(dtype))
    assert max_abs(layer(x).astype(mx.float32) - (x.astype(mx.float32) @ exact.T + bias)) < 0.1
    layer.remove("default")
    assert not layer.merged
