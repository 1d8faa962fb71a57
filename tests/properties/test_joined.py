"""Joined projections: the bits of the separate ones, and the separate ones again when they are wanted."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from qwen4b_asr.decoder import DecoderConfig, Qwen3
from qwen4b_asr.joined import GROUPS, JoinedLinear, apart, can_join, join_projections, split_projections
from qwen4b_asr.lora import LoraConfig, add_lora, fuse_lora, lora_layers, merge_lora, remove_lora
from qwen4b_asr.quantization import Quantization, Scheme
from tests.helpers.tiny import CONFIG, max_abs, randomise, rows

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
FORMS = [
    Scheme(),
    Scheme(32, 8),
    Scheme(128, 2),
    Scheme(64, 6),
    Scheme(32, 4, "mxfp4"),
    Scheme(32, 8, "mxfp8"),
    Scheme(16, 4, "nvfp4"),
]


def bits_of(x: mx.array) -> np.ndarray:
    return np.array(x.view(mx.uint32 if x.dtype.size == 4 else mx.uint16 if x.dtype.size == 2 else mx.uint8))


def same_bits(a: mx.array, b: mx.array) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(bits_of(a), bits_of(b))


def dense(outputs: int, inputs: int, dtype: mx.Dtype, seed: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.weight = (mx.random.normal((outputs, inputs), key=mx.random.key(seed)) * 0.3).astype(dtype)
    return layer


@given(
    st.lists(st.integers(1, 200) | st.sampled_from([64, 256, 512]), min_size=1, max_size=3),
    st.integers(1, 300),
    st.integers(1, 9),
    st.sampled_from(sorted(DTYPES)),
    st.integers(0, 99),
)
def test_dense_parts_keep_their_bits(widths, inputs, positions, dtype, seed):
    parts = [dense(width, inputs, DTYPES[dtype], seed + i) for i, width in enumerate(widths)]
    x = mx.random.normal((1, positions, inputs), key=mx.random.key(seed + 9)).astype(DTYPES[dtype])
    joined = JoinedLinear(parts)
    for part, again, y in zip(parts, joined.split(), joined(x), strict=True):
        assert same_bits(y, part(x))
        assert same_bits(again.weight, part.weight)


@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from(FORMS),
    st.sampled_from(["float32", "bfloat16"]),
    st.integers(0, 99),
)
def test_quantised_parts_keep_their_bits(widths, blocks, positions, form, dtype, seed):
    inputs = 128 * blocks
    options = {"group_size": form.group_size, "bits": form.bits, "mode": form.mode}
    parts = [
        nn.QuantizedLinear.from_linear(dense(width, inputs, DTYPES[dtype], seed + i), **options)
        for i, width in enumerate(widths)
    ]
    x = mx.random.normal((1, positions, inputs), key=mx.random.key(seed + 9)).astype(DTYPES[dtype])
    joined = JoinedLinear(parts)
    for part, again, y in zip(parts, joined.split(), joined(x), strict=True):
        assert same_bits(y, part(x))
        for name in ("weight", "scales"):
            assert same_bits(again[name], part[name])
        assert type(again) is type(part)
        assert (again.group_size, again.bits, again.mode) == (part.group_size, part.bits, part.mode)


def decoder(dtype: mx.Dtype = mx.bfloat16, quantization: Quantization | None = None, seed: int = 3) -> Qwen3:
    sizes = CONFIG.decoder.__dict__ | {"hidden_size": 64, "intermediate_size": 96}
    model = randomise(Qwen3(DecoderConfig(**sizes)), seed)
    model.set_dtype(dtype)
    if quantization is not None:
        quantised = Qwen3(DecoderConfig(**sizes | {"quantization": quantization}))
        for path, module in quantised.named_modules():
            if isinstance(module, nn.QuantizedLinear):
                source = dict(model.named_modules())[path]
                options = {name: getattr(module, name) for name in ("group_size", "bits", "mode")}
                module.update(nn.QuantizedLinear.from_linear(source, **options).parameters())
        return quantised
    return model


def flat(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


@pytest.mark.parametrize("quantization", [None, Quantization(Scheme(32, 8), {"model.embed_tokens": None})])
def test_a_joined_decoder_gives_the_same_logits_and_splits_into_what_it_was(quantization):
    model = decoder(quantization=quantization)
    x = rows(7, 64).astype(mx.bfloat16)[None]
    before, parameters = model(x), flat(model)
    joined = join_projections(model)
    assert joined == [
        f"model.layers.{layer}.{path}" for layer in (0, 1) for path in ("mlp.gate_up_proj", "self_attn.qkv_proj")
    ]
    assert not any(f".{member}." in name for name in flat(model) for members in GROUPS.values() for member in members)
    assert same_bits(model(x), before)
    assert join_projections(model) == []
    assert split_projections(model) == joined
    after = flat(model)
    assert after.keys() == parameters.keys()
    assert all(same_bits(after[name], parameters[name]) for name in after)
    assert same_bits(model(x), before)


def test_float32_on_the_cpu_is_left_apart():
    if mx.default_device().type != mx.cpu:
        pytest.skip("the default device is a GPU")
    assert join_projections(decoder(mx.float32)) == []


def test_parts_of_different_forms_are_left_apart():
    mixed = Quantization(
        Scheme(32, 4), {"model.layers.0.self_attn.v_proj": Scheme(32, 8), "model.layers.1.mlp.up_proj": None}
    )
    model = decoder(quantization=mixed)
    assert join_projections(model) == ["model.layers.0.mlp.gate_up_proj", "model.layers.1.self_attn.qkv_proj"]


def test_layers_of_other_widths_types_and_kinds_do_not_join():
    a = dense(4, 8, mx.float32, 0)
    with_bias = nn.Linear(8, 4)
    assert can_join([a, dense(3, 8, mx.float32, 1)])
    assert can_join([with_bias, nn.Linear(8, 2)])
    for other in (dense(4, 9, mx.float32, 1), dense(4, 8, mx.bfloat16, 1), with_bias, nn.Identity()):
        assert not can_join([a, other])
    assert not can_join([nn.Identity(), nn.Identity()])
    with pytest.raises(ValueError, match="parts must be linear layers of one form"):
        JoinedLinear([a, with_bias])


def test_a_bias_goes_along():
    parts = [nn.Linear(8, 4), nn.Linear(8, 2)]
    x = rows(2, 8)
    for part, y in zip(parts, JoinedLinear(parts)(x), strict=True):
        assert max_abs(y - part(x)) == 0


def adapter(model: Qwen3, target: str) -> tuple[dict, LoraConfig]:
    shapes = {path: m.weight.shape for path, m in model.named_modules() if path.endswith(target)}
    factors = {
        path: (rows(2, shape[1], 5).astype(mx.bfloat16), rows(shape[0], 2, 6).astype(mx.bfloat16))
        for path, shape in shapes.items()
    }
    return factors, LoraConfig(rank=2, alpha=4, target_modules=(target,))


def test_an_adapter_added_later_splits_its_own_projections_alone():
    plain, model = decoder(), decoder()
    factors, config = adapter(plain, "v_proj")
    add_lora(plain, factors, config)
    join_projections(model)
    add_lora(model, factors, config)
    x = rows(5, 64).astype(mx.bfloat16)[None]
    assert same_bits(model(x), plain(x))
    assert sorted(lora_layers(model)) == sorted(factors)
    held = flat(model)
    assert not any("qkv_proj" in name for name in held)
    assert any("gate_up_proj" in name for name in held)
    remove_lora(model)
    assert len(join_projections(model)) == 2
    assert same_bits(model(x), decoder()(x))


def test_a_wrong_adapter_leaves_the_projections_joined():
    model = decoder()
    joined = join_projections(model)
    with pytest.raises(ValueError, match="is no layer of this model"):
        add_lora(model, {"model.nothing": (mx.zeros((2, 64)), mx.zeros((64, 2)))}, LoraConfig(2, 4))
    assert split_projections(model) == joined


def test_adapters_that_can_be_taken_away_stay_apart_and_fused_ones_are_joined():
    model = decoder()
    factors, config = adapter(model, "q_proj")
    add_lora(model, factors, config)
    merge_lora(model)
    assert not any("qkv_proj" in path for path in join_projections(model))
    x = rows(5, 64).astype(mx.bfloat16)[None]
    before = model(x)
    fuse_lora(model)
    assert len(join_projections(model)) == 2
    assert same_bits(model(x), before)


def test_apart_joins_again_only_what_was_joined():
    model = decoder()
    with apart(model):
        pass
    assert split_projections(model) == []
    joined = join_projections(model)
    with apart(model):
        assert "q_proj" in model.model.layers[0].self_attn
    assert split_projections(model) == joined
