"""What the tensors of an MLX checkpoint say about each module, against what its config.json says."""

from dataclasses import asdict, replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from qwen4b_asr.decoder import DecoderConfig, Qwen3
from qwen4b_asr.errors import CheckpointError
from qwen4b_asr.lora import LoraConfig
from qwen4b_asr.quantization import Quantization, Scheme, quantizable, quantize_modules
from qwen4b_asr.weights.keymap import load_keymap
from qwen4b_asr.weights.manifest import load_manifest
from qwen4b_asr.weights.quantized import decoder_quantization, packed_types, type_problem
from tests.helpers.tiny import CONFIG

SIZES = replace(CONFIG.decoder, vocab_size=40, hidden_size=64, intermediate_size=96)
KEYMAP = load_keymap("qwen3")
BASE = {"group_size": 32, "bits": 4}
DOWN, HEAD = "model.layers.1.mlp.down_proj", "lm_head"


def shapes(quantization: Quantization | None, **changes) -> dict[str, tuple[int, ...]]:
    model = Qwen3(replace(SIZES, quantization=quantization, **changes))
    return {name: tuple(array.shape) for name, array in tree_flatten(model.parameters())}


def settle(entry: dict | None, tensors: dict[str, tuple[int, ...]], **changes) -> DecoderConfig:
    quantization = None if entry is None else Quantization.from_mlx(entry)
    return decoder_quantization(
        replace(SIZES, quantization=quantization, **changes), tensors, keymap=KEYMAP, file="the/file"
    )


MIXED = Quantization(
    Scheme(32, 4),
    {DOWN: Scheme(32, 6), "model.layers.0.self_attn.q_proj": None, "model.embed_tokens": Scheme(64, 8)},
)


@pytest.mark.parametrize(
    "entry",
    [
        # Everything spelled out, as mixed recipes are written.
        {
            **BASE,
            DOWN: {"group_size": 32, "bits": 6},
            "model.layers.0.self_attn.q_proj": False,
            "model.embed_tokens": {"group_size": 64, "bits": 8, "mode": "affine"},
            "model.layers.0.mlp.up_proj": True,
        },
        BASE,  # or nothing but the default: the tensors tell
        {**BASE, "mode": "affine", DOWN: {"group_size": 32, "bits": 6}},
    ],
)
def test_the_tensors_settle_what_config_json_leaves_open(entry):
    config = settle(entry, shapes(MIXED))
    assert config.quantization == MIXED
    assert shapes(config.quantization) == shapes(MIXED)


def test_an_override_without_a_group_size_has_the_modes_default():
    # As MLX reads it: not the size that the other modules have.
    quantization = Quantization.from_mlx({**BASE, DOWN: {"bits": 6}})
    assert quantization.scheme(DOWN) == Scheme(64, 6)
    assert quantization.scheme("model.norm") == Scheme(32, 4)


@pytest.mark.parametrize("mode", [("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)])
def test_floating_point_modes_are_told_by_the_lack_of_biases(mode):
    scheme = Scheme(mode[1], mode[2], mode[0])
    quantization = Quantization(Scheme(32, 4), {DOWN: scheme})
    assert settle(BASE, shapes(quantization)).quantization == quantization


def test_a_head_of_its_own_and_a_tied_one():
    untied = Quantization(Scheme(32, 4), {HEAD: None})
    assert settle(BASE, shapes(untied, tie_word_embeddings=False), tie_word_embeddings=False).quantization == untied
    both = Quantization(Scheme(32, 4), {HEAD: Scheme(64, 8)})
    tensors = shapes(both, tie_word_embeddings=False)
    assert settle(BASE, tensors, tie_word_embeddings=False).quantization == both
    # Some files keep a form for the head that they have not got.
    tied = settle({**BASE, HEAD: {"group_size": 32, "bits": 6}}, shapes(Quantization(Scheme(32, 4))))
    assert tied.quantization == Quantization(Scheme(32, 4))


def test_adapters_beside_quantised_layers_do_not_hide_them():
    lora = LoraConfig(2, 4.0, ("q_proj",))
    config = settle(BASE, shapes(MIXED, lora=lora), lora=lora)
    assert (config.quantization, config.lora) == (MIXED, lora)


@pytest.mark.parametrize("root", ["llm.", "llm.base_model.model."])
def test_the_names_may_be_another_checkpoints(root):
    # Embedding and head lie outside the layers and are not quantised.
    quantization = Quantization(MIXED.default, {**MIXED.overrides, "model.embed_tokens": None, HEAD: None})
    tensors = {f"{root}{n}": s for n, s in shapes(quantization, tie_word_embeddings=False).items()}
    tensors["embed_tokens.weight"] = tensors.pop(f"{root}model.embed_tokens.weight")
    sizes = replace(SIZES, tie_word_embeddings=False, quantization=Quantization(Scheme(32, 4)))
    config = decoder_quantization(sizes, tensors, keymap=load_keymap("canary"), file="f", prefix="decoder.")
    assert config.quantization == quantization
    plain = {**shapes(None), "perception.encoder.layers.0.scales": (4,)}  # of another part
    assert decoder_quantization(SIZES, plain, keymap=load_keymap("canary"), file="f", prefix="decoder.") == SIZES


def test_what_is_not_quantised_stays_so():
    assert settle(None, shapes(None)).quantization is None
    with pytest.raises(CheckpointError, match=r"the weights are quantised, but no tensor is named '\*\.scales'"):
        settle(BASE, shapes(None))


@pytest.mark.parametrize(
    ("entry", "change", "message"),
    [
        (None, {}, r"'model\.embed_tokens\.scales' is there, but config\.json has no 'quantization'"),
        ({**BASE, DOWN: False}, {}, rf"{DOWN}' is not quantised, but there is"),
        ({**BASE, "model.layers.0.self_attn.q_proj": {"bits": 4}}, {}, "is quantised, but there is no"),
        ({**BASE, DOWN: {"bits": 4, "group_size": 32}}, {}, rf"{DOWN}', a matrix \[64, 96\], do not fit.*bits=4.*18\]"),
        ({**BASE, "model.layers.7.mlp.up_proj": False}, {}, r"names 'model\.layers\.7\.mlp\.up_proj', which"),
        (BASE, {f"{DOWN}.scales": (64, 5)}, "do not fit"),
        (BASE, {f"{DOWN}.scales": (3,)}, "do not fit"),
        (BASE, {f"{DOWN}.biases": (64, 4)}, "do not fit"),
        (BASE, {f"{DOWN}.weight": None}, "do not fit"),
        (BASE, {f"{DOWN}.biases": None}, "do not fit"),
    ],
)
def test_a_contradiction_is_named(entry, change, message):
    tensors = {n: s for n, s in {**shapes(MIXED), **change}.items() if s is not None}
    with pytest.raises(CheckpointError, match=message) as caught:
        settle(entry, tensors)
    assert str(caught.value).startswith("the/file: ")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised by MLX but got quant_method 'gptq'"),
        ({"quant_method": "fp8"}, "quant_method 'fp8'"),
        ({"group_size": 48, "bits": 4}, "group_size of mode affine must be one of 32, 64, 128 but got 48"),
        ({"group_size": 64, "bits": 7}, "bits of mode affine must be one of 1, 2, 3, 4, 5, 6, 8 but got 7"),
        ({"group_size": 64, "bits": 4, "mode": "mxfp4"}, "group_size of mode mxfp4 must be one of 32 but got 64"),
        ({"mode": "int8"}, "mode must be one of affine"),
        ({"mode": ["affine"]}, "mode must be one of affine"),
        ({"bits": "4"}, "bits of mode affine"),
        ({**BASE, "model.embed_tokens": 8}, "entry of 'model.embed_tokens' must be an object or a bool but got 8"),
        ({**BASE, "model.embed_tokens": {"bits": 9}}, "entry of 'model.embed_tokens' is wrong: .*bits"),
        ({**BASE, "model.embed_tokens": {"bit": 4}}, r"keys must be among group_size, bits, mode but got \['bit'\]"),
    ],
)
def test_a_malformed_entry_is_refused(entry, message):
    config = {**load_manifest("qwen3-4b").config, "quantization_config": entry}
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_huggingface(config)


def test_instruct_2507_differs_in_theta_and_context_alone():
    old, new = (DecoderConfig.from_huggingface(load_manifest(n).config) for n in ("qwen3-4b", "qwen3-4b-instruct-2507"))
    assert (new.rope_theta, new.max_position_embeddings) == (5e6, 262144)
    assert replace(new, rope_theta=1e6, max_position_embeddings=40960) == old


def test_the_published_8_bit_checkpoint():
    manifest = load_manifest("qwen3-4b-8bit")
    config = decoder_quantization(
        DecoderConfig.from_huggingface(manifest.config), manifest.tensors, keymap=KEYMAP, file="f"
    )
    assert config.quantization == Quantization(Scheme(64, 8))
    assert dict(manifest.tensors) == {n: tuple(a.shape) for n, a in tree_flatten(Qwen3(config).parameters())}


def as_mlx_lm_writes(quantization: Quantization, every: bool) -> dict:
    """config.json of Qwen3-4B: under both keys, and in a mixed recipe with a form for every module."""
    entry: dict = {**asdict(quantization.default)}
    if every:
        entry |= {path: asdict(quantization.scheme(path)) for path in quantizable(Qwen3(DecoderConfig()))}
    return {**load_manifest("qwen3-4b").config, "quantization": entry, "quantization_config": entry}


@pytest.mark.parametrize("bits", [4, 8])
def test_the_plain_checkpoints_of_the_4b_model(bits):
    plain = Quantization(Scheme(64, bits))
    config = DecoderConfig.from_huggingface(as_mlx_lm_writes(plain, every=False))
    tensors = {n: tuple(a.shape) for n, a in tree_flatten(Qwen3(config).parameters())}
    assert tensors["model.layers.35.mlp.down_proj.weight"] == (2560, 9728 * bits // 32)
    assert tensors["model.embed_tokens.scales"] == (151936, 40)
    assert decoder_quantization(config, tensors, keymap=KEYMAP, file="f").quantization == plain


@pytest.mark.parametrize("key", ["quantization", "quantization_config", None])
def test_a_mixed_checkpoint_of_the_4b_model(key):
    # More bits for values and down projections of the first and last eighth and of every third layer between.
    layers = [i for i in range(36) if i < 4 or i >= 31 or (i - 4) % 3 == 2]
    more = [f"model.layers.{i}.{name}" for i in layers for name in ("self_attn.v_proj", "mlp.down_proj")]
    mixed = Quantization(Scheme(64, 4), dict.fromkeys([*more, "model.embed_tokens"], Scheme(64, 6)))
    values = as_mlx_lm_writes(mixed, every=True)
    if key is not None:
        del values[key]  # one of the two is enough
    config = DecoderConfig.from_huggingface(values)
    tensors = {n: tuple(a.shape) for n, a in tree_flatten(Qwen3(config).parameters())}
    assert tensors[f"{more[0]}.weight"] == (1024, 2560 * 6 // 32)
    assert decoder_quantization(config, tensors, keymap=KEYMAP, file="f").quantization == mixed


def test_codes_have_their_types_and_numbers_theirs():
    model = Qwen3(replace(SIZES, quantization=Quantization(Scheme(32, 4), {DOWN: Scheme(32, 8, "mxfp8")})))
    packed = packed_types(model)
    assert packed[f"{DOWN}.weight"] == packed["model.embed_tokens.weight"] == "U32"
    assert packed[f"{DOWN}.scales"] == "U8"
    assert "model.embed_tokens.scales" not in packed
    assert len(packed) == 1 + 14 + 1
    assert type_problem(f"{DOWN}.weight", "U32", packed) is None
    assert type_problem("model.norm.weight", "BF16", packed) is None
    assert "stored as BF16, but its codes are U32" in str(type_problem(f"{DOWN}.weight", "BF16", packed))
    assert "stored as U32, but weights are floating" in str(type_problem("model.norm.weight", "U32", packed))


def test_overrides_must_name_modules_and_fit_them():
    with pytest.raises(ValueError, match=r"overrides must name linear layers or embeddings but got \['model\.norm'\]"):
        quantize_modules(Qwen3(SIZES), Quantization(Scheme(32, 4), {"model.norm": None}))
    model = Qwen3(SIZES)
    with pytest.raises(ValueError, match=r"mlp\.down_proj: .*group_size 64 must divide the row but got 96"):
        quantize_modules(model, Quantization(Scheme(64, 4)))
    assert all(array.dtype == mx.float32 for _, array in tree_flatten(model.parameters()))
