"""Recipes: which rule counts, what a file of one's own may hold, and the bytes that a configuration alone tells."""

import json
from dataclasses import replace

import pytest

from qwen4b_asr.config import ModelConfig
from qwen4b_asr.errors import ConfigError
from qwen4b_asr.fastconformer import FastConformerConfig
from qwen4b_asr.lora import LoraConfig
from qwen4b_asr.mel import MelConfig
from qwen4b_asr.projection import ProjectionConfig
from qwen4b_asr.quantization import Quantization, Scheme
from qwen4b_asr.weights.recipes import (
    RECIPES,
    Recipe,
    Rule,
    adaptor_rules,
    decoder_bytes,
    encoder_rules,
    quantized_config,
    read_recipe,
    stored_bytes,
)
from tests.helpers.tiny import CONFIG

FULL = ModelConfig()
# Matrices of Qwen3-4B's layers, counted by hand: four of attention, three of the feed-forward.
LAYER = 2560 * (4096 + 2 * 1024) + 4096 * 2560 + 3 * 2560 * 9728
TABLE = 151936 * 2560
NORMS = 36 * (2 * 2560 + 2 * 128) + 2560


def bits_of(recipe: str, path: str) -> int | None:
    form = quantized_config(FULL, read_recipe(recipe)).decoder.quantization
    scheme = form.scheme(path)
    return None if scheme is None else scheme.bits


@pytest.mark.parametrize(
    ("recipe", "layers", "table"),
    [("8", 8, 8), ("6", 6, 8), ("5", 5, 8), ("4", 4, 8), ("4-all", 4, 4), ("6-all", 6, 6)],
)
def test_bytes_of_the_full_model_as_counted_by_hand(recipe, layers, table):
    # A group of 64 has two numbers of two bytes: half a bit more for each element.
    wanted = (36 * LAYER * (layers + 0.5) + TABLE * (table + 0.5)) / 8 + 2 * NORMS
    assert decoder_bytes(FULL, recipe) == wanted
    four = (36 * LAYER * (layers + 1) + TABLE * (table + 1)) / 8 + 4 * NORMS
    assert decoder_bytes(FULL, recipe, "float32") == four
    whole = quantized_config(FULL, read_recipe(recipe))
    assert stored_bytes(whole, decoder_dtype="F32")["decoder"] == four


def test_bytes_without_a_recipe_and_of_other_parts():
    plain = stored_bytes(FULL)
    assert plain["decoder"] == decoder_bytes(FULL) == 2 * (36 * LAYER + TABLE + NORMS)
    assert list(plain) == ["frontend", "encoder", "adaptor", "decoder"]
    form = Quantization(Scheme(64, 8))
    assert stored_bytes(FULL, form) == {**plain, "decoder": decoder_bytes(FULL, "8")}
    small = stored_bytes(quantized_config(FULL, read_recipe(None, encoder=8, adaptor=8)))
    assert small["decoder"] == plain["decoder"]
    # 9 bits in place of 32, scales and biases being float32, of everything but what stays as it is, such as the head.
    head = 4 * FULL.encoder.vocab_size * FULL.encoder.output_size
    assert 0.28 < (small["encoder"] - head) / (plain["encoder"] - head) < 0.30
    assert 0.28 < small["adaptor"] / plain["adaptor"] < 0.50
    assert decoder_bytes(replace(CONFIG, adaptor=None, decoder=None, prompt=None)) == 0


def test_mixed_recipes_spare_what_weighs_most():
    middle = "model.layers.17"
    assert bits_of("mixed-4-6", f"{middle}.self_attn.q_proj") == 4
    assert bits_of("mixed-4-6", f"{middle}.self_attn.v_proj") == 6
    assert bits_of("mixed-4-6", f"{middle}.mlp.down_proj") == 6
    for layer in (0, 1, 34, 35):
        assert bits_of("mixed-4-6", f"model.layers.{layer}.self_attn.q_proj") == 6
    for layer in (2, 10, 33):
        assert bits_of("mixed-4-6", f"model.layers.{layer}.mlp.gate_proj") == 4
    for recipe in RECIPES:
        assert bits_of(recipe, "model.embed_tokens") == (int(recipe[0]) if recipe.endswith("-all") else 8)


def test_a_head_of_its_own_is_treated_as_the_embedding():
    config = replace(FULL, decoder=replace(FULL.decoder, tie_word_embeddings=False))
    form = quantized_config(config, read_recipe("4")).decoder.quantization
    assert (form.scheme("lm_head").bits, form.scheme("model.layers.0.mlp.up_proj").bits) == (8, 4)


def test_the_last_rule_that_names_a_module_counts():
    recipe = Recipe("own", (Rule("*", 8), Rule("*.mlp.*", 4), Rule("*.up_proj", None), Rule("*", 3, layers=(-1,))))
    form = quantized_config(FULL, recipe).decoder.quantization
    assert form.scheme("model.layers.4.self_attn.o_proj").bits == 8
    assert form.scheme("model.layers.4.mlp.gate_proj").bits == 4
    assert form.scheme("model.layers.4.mlp.up_proj") is None
    assert form.scheme("model.layers.35.mlp.up_proj").bits == 3
    assert form.scheme("model.embed_tokens").bits == 8


def test_groups_shrink_to_what_divides_a_row_or_the_matrix_stays():
    config = replace(
        CONFIG,
        adaptor=replace(CONFIG.adaptor, output_size=64),
        decoder=replace(CONFIG.decoder, hidden_size=64, intermediate_size=40),
    )
    form = quantized_config(config, read_recipe("4")).decoder.quantization
    assert form.scheme("model.layers.0.self_attn.q_proj") == Scheme(64, 4)
    assert form.scheme("model.layers.0.self_attn.o_proj") == Scheme(32, 4)  # 32 columns
    assert form.scheme("model.layers.0.mlp.down_proj") is None  # 40
    with pytest.raises(ConfigError, match=r"tiny: decoder: the recipe quantises none of its 15 matrices"):
        quantized_config(replace(CONFIG, decoder=replace(CONFIG.decoder, head_dim=4)), read_recipe("4"))
    shrunk = read_recipe("mxfp4", group_size=32).decoder
    assert [rule.group_size for rule in shrunk] == [None, 32, 32]


def test_encoder_and_adaptor_keep_their_ends():
    config = quantized_config(FULL, read_recipe("4", encoder=8, adaptor=6))
    encoder, adaptor = config.quantized_stages["encoder"], config.quantized_stages["adaptor"]
    assert encoder.scheme("embed") is None
    assert encoder.scheme("encoder.encoders0.0.self_attn.linear_q_k_v") is None  # 560 columns
    assert encoder.scheme("encoder.tp_encoders.3.feed_forward.w_2") == Scheme(64, 8)
    assert adaptor.scheme("output_proj") == Scheme(64, 6)
    with_head = replace(FULL, encoder=replace(FULL.encoder, vocab_size=100))
    form = quantized_config(with_head, Recipe("e", encoder=encoder_rules(8))).quantized_stages["encoder"]
    assert form.scheme("ctc.ctc_lo") is None
    canary = replace(
        FULL,
        frontend=MelConfig(),
        encoder=FastConformerConfig(),
        adaptor=ProjectionConfig(output_size=2560),
    )
    form = quantized_config(canary, Recipe("c", encoder=encoder_rules(8), adaptor=adaptor_rules(8)))
    assert form.quantized_stages["encoder"].scheme("pre_encode.out") is None
    assert form.quantized_stages["encoder"].scheme("layers.0.conv.pointwise_conv1") == Scheme(64, 8)


def test_layers_with_an_adapter_have_their_plain_paths():
    lora = LoraConfig(8, 16, ("q_proj",))
    config = replace(FULL, decoder=replace(FULL.decoder, lora=lora))
    form = quantized_config(config, read_recipe("4")).decoder.quantization
    assert form == quantized_config(FULL, read_recipe("4")).decoder.quantization
    extra = 36 * 8 * (2560 + 4096)
    assert decoder_bytes(config, "4") == decoder_bytes(FULL, "4") + 2 * extra


def test_what_is_quantised_already_is_not_quantised_again():
    once = quantized_config(FULL, read_recipe("8", encoder=8))
    for recipe in (read_recipe("4"), read_recipe(None, encoder=4)):
        with pytest.raises(ConfigError, match="is quantised already; quantise the original instead"):
            quantized_config(once, recipe)
    more = quantized_config(once, read_recipe(None, adaptor=8))
    assert sorted(more.quantized_stages) == ["adaptor", "encoder"]
    assert more.decoder == once.decoder


def test_a_part_that_is_not_there_is_named():
    recogniser = replace(FULL, adaptor=None, decoder=None, prompt=None, encoder=replace(FULL.encoder, vocab_size=9))
    with pytest.raises(ConfigError, match="has no decoder to quantise"):
        quantized_config(recogniser, read_recipe("4"))
    assert "encoder" in quantized_config(recogniser, read_recipe(None, encoder=8)).quantized_stages


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "careful.json"
    rules = [{"modules": "*", "bits": 4, "group_size": 32}, {"modules": "*.o_proj", "bits": 8, "layers": [0, -1]}]
    path.write_text(json.dumps({"decoder": rules, "encoder": [{"modules": "*.w_1", "bits": 8}]}))
    recipe = read_recipe(str(path))
    assert recipe.name == "careful"
    assert recipe.decoder[1] == Rule("*.o_proj", 8, layers=(0, -1))
    config = quantized_config(FULL, recipe)
    assert config.decoder.quantization.scheme("model.layers.35.self_attn.o_proj") == Scheme(64, 8)
    assert config.quantized_stages["encoder"].scheme("encoder.encoders.0.feed_forward.w_2") is None
    assert read_recipe(str(path), encoder=6).encoder == encoder_rules(6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as a recipe"),
        ("[]", "must be an object with some of adaptor, decoder, encoder, name"),
        ('{"ctc": []}', "must be an object with some of"),
        ('{"decoder": [{"bits": 4}]}', "missing 1 required positional argument: 'modules'"),
        ('{"decoder": [{"modules": "*", "bits": 7}]}', "bits of mode affine must be one of 1, 2, 3, 4, 5, 6, 8"),
        ('{"decoder": [{"modules": "*", "bits": 4, "size": 1}]}', "unexpected keyword argument 'size'"),
        ('{"decoder": [{"modules": "", "bits": 4}]}', "modules must be a pattern"),
        ('{"decoder": [{"modules": "*", "bits": 4, "layers": ["a"]}]}', "layers must be integers"),
        ('{"decoder": [{"modules": "*", "bits": 4, "layers": 3}]}', "'int' object is not iterable"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"own\.json: .*{message}"):
        read_recipe(str(tmp_path / "own.json"))


def test_unknown_names_and_sizes():
    with pytest.raises(
        ConfigError, match=r"quantisation '9': choose one of 8, 6, .*mixed-4-6.* or give a recipe's \.js"
    ):
        read_recipe("9")
    with pytest.raises(ConfigError, match="group_size of mode affine must be one of 32, 64, 128 but got 48"):
        read_recipe("4", group_size=48)
    with pytest.raises(ConfigError, match="bits of mode affine"):
        read_recipe("4", encoder=7)


def test_a_configuration_says_how_its_stages_are_quantised():
    config = quantized_config(FULL, read_recipe("mixed-4-6", encoder=8, adaptor=4))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert "quantized_stages" not in FULL.to_dict()
    values = {**FULL.to_dict(), "quantized_stages": {"frontend": {}}}
    with pytest.raises(ConfigError, match=r"quantized_stages must be among the model's but got \['frontend'\]"):
        ModelConfig.from_dict(values)
