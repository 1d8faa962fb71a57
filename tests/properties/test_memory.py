"""The plan of a model's memory: what it must count exactly, bound, and never get the wrong way round."""

from dataclasses import replace
from functools import lru_cache
from math import prod

import mlx.core as mx
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from qwen4b_asr.adaptor import AdaptorConfig
from qwen4b_asr.config import GenerationConfig, ModelConfig
from qwen4b_asr.ctc import ctc_log_probs
from qwen4b_asr.decoder import DecoderConfig
from qwen4b_asr.encoder import EncoderConfig
from qwen4b_asr.errors import ConfigError
from qwen4b_asr.fastconformer import FastConformerConfig
from qwen4b_asr.features import FrontendConfig
from qwen4b_asr.generate import Generation, GenerationOptions
from qwen4b_asr.machine import KEPT_ON_GPU, Machine, apple_working_set
from qwen4b_asr.mel import MelConfig
from qwen4b_asr.memory import (
    Work,
    advise,
    cache_bytes,
    dense,
    plan_memory,
    require_room,
    smaller_forms,
)
from qwen4b_asr.model import SpeechModel
from qwen4b_asr.nano_adaptor import NanoAdaptorConfig, NanoCtcConfig
from qwen4b_asr.nano_prompt import NanoPromptConfig
from qwen4b_asr.projection import ProjectionConfig
from qwen4b_asr.quantization import UNPACKED, UnpackingLinear, unpack_for_many_rows
from qwen4b_asr.sampling import Sampler, SamplingOptions
from qwen4b_asr.weights.catalog import load_catalog
from qwen4b_asr.weights.convert import convert_checkpoint
from qwen4b_asr.weights.expected import expected_config
from qwen4b_asr.weights.load import load_model, parameter_shapes
from qwen4b_asr.weights.manifest import load_manifest
from qwen4b_asr.weights.paths import weights_data
from qwen4b_asr.weights.recipes import RECIPES, quantized_config, read_recipe
from qwen4b_asr.weights.safetensors_file import read_safetensors_directory
from tests.helpers.tiny import save_tiny, tiny_model

GIB = 1 << 30
PLAIN = ("8", "6", "5", "4")


@lru_cache(maxsize=8)
def known(name: str) -> ModelConfig:
    return expected_config(load_catalog()[name])


# Widths near the true ones, few layers: their number changes weights and cache, not the workspace.
DECODER = DecoderConfig(
    vocab_size=20_000,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
)
SHAPES = {
    "4b": ModelConfig(
        encoder=EncoderConfig(num_blocks=2, tp_blocks=1),
        adaptor=AdaptorConfig(hidden_size=512, output_size=256, num_layers=2, ffn_size=2048),
        decoder=DECODER,
        generation=GenerationConfig(stop_token_ids=(1,)),
    ),
    "nano": ModelConfig(
        frontend=FrontendConfig(cmvn=False),
        encoder=EncoderConfig(num_blocks=2, tp_blocks=1, num_queries=0, vocab_size=0),
        adaptor=NanoAdaptorConfig(output_size=256),
        decoder=DECODER,
        ctc=NanoCtcConfig(vocab_size=20_000),
        generation=GenerationConfig(stop_token_ids=(1,)),
        prompt=NanoPromptConfig(),
    ),
    "canary": ModelConfig(
        frontend=MelConfig(),
        encoder=FastConformerConfig(num_blocks=2, output_size=512, linear_units=2048),
        adaptor=ProjectionConfig(input_size=512, output_size=256),
        decoder=DECODER,
        generation=GenerationConfig(stop_token_ids=(1,)),
    ),
}

works = st.builds(Work, st.floats(0.1, 120), st.integers(1, 16), st.none() | st.integers(1, 2000))


# --- Weights ------------------------------------------------------------------------------------------------------


def test_weights_are_the_bytes_of_the_file():
    demo = weights_data() / "demo"
    refs = read_safetensors_directory(demo).values()
    plan = plan_memory(ModelConfig.load(demo), "float32")
    assert plan.weight_bytes == sum(ref.nbytes for ref in refs)


@pytest.mark.parametrize("recipe", [None, "8", "4", "mixed-4-6"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_the_bytes_of_what_is_loaded(tmp_path, recipe, dtype):
    folder = save_tiny(tmp_path / "tiny")
    if recipe is not None:
        convert_checkpoint(folder, tmp_path / "small", recipe=read_recipe(recipe, group_size=32, adaptor=8, encoder=8))
        folder = tmp_path / "small"
    model, config = load_model(folder, dtype=dtype)
    plan = plan_memory(config, dtype)
    held = {part: sum(a.nbytes for _, a in tree_flatten(model[part].parameters())) for part in ("adaptor", "decoder")}
    assert {part: plan.weights[part] for part in held} == held
    assert plan.weight_bytes == sum(array.nbytes for _, array in tree_flatten(model.parameters()))


@pytest.mark.parametrize(
    ("name", "manifests"),
    [
        ("funasr-qwen4b", ["sensevoice-small", "adaptor-4b", "qwen3-4b"]),
        ("sensevoice-small", ["sensevoice-small"]),
        ("fun-asr-nano", ["fun-asr-nano-ctc"]),
        ("fun-asr-mlt-nano", ["fun-asr-nano-ctc"]),
        ("canary-qwen-2.5b", ["canary-qwen-2.5b"]),
    ],
)
def test_a_model_that_is_not_here_has_the_sizes_of_its_manifests(name, manifests):
    shapes = parameter_shapes(SpeechModel(known(name)))
    own = sum(prod(shape) for key, shape in shapes.items() if not key.startswith("frontend.cmvn"))
    assert own == sum(load_manifest(manifest).parameters for manifest in manifests)


def test_a_language_model_alone_has_no_plan():
    with pytest.raises(ConfigError, match="qwen3-4b: a language model, no recogniser"):
        known("qwen3-4b")


# --- Order --------------------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(SHAPES)), works, st.sampled_from(["seconds", "batch", "max_tokens"]), st.floats(1.01, 4))
def test_more_work_never_takes_less(name, work, what, factor):
    config = SHAPES[name]
    value = getattr(work, what)
    assume(value is not None)
    more = replace(work, **{what: value * factor if what == "seconds" else int(value * factor) + 1})
    one, two = (plan_memory(config, "bfloat16", w) for w in (work, more))
    assert one.weights == two.weights
    assert one.cache <= two.cache
    assert all(size <= two.workspace[stage] for stage, size in one.workspace.items())
    assert one.peak <= two.peak
    if what == "batch":
        assert one.peak < two.peak
        shares = {stage: size * work.batch for stage, size in two.workspace.items() if stage != "features"}
        assert shares == {stage: one.workspace[stage] * more.batch for stage in shares}


@lru_cache(maxsize=4)
def forms(name: str) -> list[ModelConfig]:
    return [SHAPES[name], *(quantized_config(SHAPES[name], RECIPES[bits]) for bits in PLAIN)]


@given(st.sampled_from(sorted(SHAPES)), works)
def test_fewer_bits_take_less_and_work_the_same(name, work):
    plans = [plan_memory(form, "bfloat16", work) for form in forms(name)]
    assert [p.weight_bytes for p in plans] == sorted({p.weight_bytes for p in plans}, reverse=True)
    assert len({(p.cache, tuple(p.workspace.items())) for p in plans}) == 1


@given(st.sampled_from(sorted(SHAPES)), works)
def test_a_total_is_the_sum_of_its_parts(name, work):
    plan = plan_memory(SHAPES[name], "float32", work, reserve=KEPT_ON_GPU)
    assert plan.total > plan.peak > plan.weight_bytes == sum(plan.weights.values())
    assert plan.peak - plan.weight_bytes >= max(plan.workspace.values())
    assert plan.peak - plan.weight_bytes <= max(plan.workspace.values()) + plan.cache
    assert plan.total - plan.peak >= KEPT_ON_GPU


@pytest.mark.parametrize(
    ("values", "message"), [({"seconds": 0.0}, "seconds"), ({"batch": 0}, "batch"), ({"max_tokens": 0}, "max_tokens")]
)
def test_no_work_is_refused(values, message):
    with pytest.raises(ValueError, match=rf"\[Work\] {message} must"):
        Work(**values)


# --- Against what is measured -------------------------------------------------------------------------------------


def peak_of(run):
    """What `run` returns, evaluated, and the most bytes that arrays take meanwhile, beyond what was there."""
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    result = run()
    mx.eval(result)
    mx.synchronize()
    return result, mx.get_peak_memory() - before


def wide_head() -> ModelConfig:
    """A quantised model with a head that is larger than what is unpacked at once."""
    decoder = replace(DECODER, vocab_size=40_000, tie_word_embeddings=False)
    return quantized_config(replace(SHAPES["4b"], decoder=decoder), read_recipe("4", encoder=8, adaptor=8))


@pytest.mark.parametrize(("seconds", "batch"), [(2, 1), (30, 1), (12, 3)])
@pytest.mark.parametrize("shape", [*SHAPES, "quantised"])
def test_no_stage_takes_more_than_planned_nor_a_fifth_of_it(shape, seconds, batch):
    config = wide_head() if shape == "quantised" else SHAPES[shape]
    model = SpeechModel(config)
    unpack_for_many_rows(model)
    model.eval()
    mx.eval(model.parameters())
    plan = plan_memory(config, "float32", Work(seconds, batch))
    found = {}
    samples = mx.random.uniform(-0.1, 0.1, (seconds * 16_000,), key=mx.random.key(0))
    mx.eval(samples)
    features, found["features"] = peak_of(lambda: model.frontend(samples))
    together = mx.contiguous(mx.broadcast_to(features[None], (batch, *features.shape)))
    mx.eval(together)
    states, found["encoder"] = peak_of(lambda: model.audio_encoder(together)[0])
    audio, found["adaptor"] = peak_of(lambda: model.adaptor(states))
    if config.ctc_size:
        _, found["ctc"] = peak_of(lambda: ctc_log_probs(model.ctc_logits(states), [0]))
    rows = mx.concatenate([mx.zeros((40, audio.shape[2])), audio[0]])
    budget = config.generation.token_budget(seconds)
    generation = Generation(model.decoder, rows, GenerationOptions(budget, (1,)))
    cache = generation._empty_cache()
    logits, prefill = peak_of(lambda: generation._prefill(cache))
    held = sum(array.nbytes for layer in cache for array in layer.state)
    found["prefill"] = (prefill - held) * batch
    found["decode"] = batch * peak_of(lambda: Sampler(SamplingOptions()).process(logits, [1, 2, 3]))[1]
    if shape == "quantised":  # eight rows of a draft
        assert isinstance(model.decoder.lm_head, UnpackingLinear)
        assert config.decoder.vocab_size * config.decoder.hidden_size > UNPACKED
        found["decode"] = max(found["decode"], peak_of(lambda: model.decoder.logits(mx.zeros((8, 256))))[1])
    assert found.keys() == plan.workspace.keys()
    measured = {stage: (size, plan.workspace[stage]) for stage, size in found.items()}
    assert all(size <= told for size, told in measured.values()), measured
    wide = {stage: (size, told) for stage, (size, told) in measured.items() if stage not in ("adaptor", "decode")}
    assert all(5 * size >= told for size, told in wide.values()), measured
    text = cache_bytes(config.decoder, 64, 4)
    assert held * batch <= plan.cache - text <= 2 * held * batch


@given(st.integers(1, 700), st.integers(1, 300))
def test_the_cache_is_what_decoding_holds(rows, budget):
    decoder = tiny_model().decoder
    generation = Generation(decoder, mx.zeros((rows, decoder.config.hidden_size)), GenerationOptions(budget, (299,)))
    cache = generation._empty_cache()
    generation._prefill(cache)
    for _ in range(budget - 1):
        if cache[0].offset == rows + 2:
            break
        mx.eval(generation._step(mx.array([1]), cache))
    held = sum(array.nbytes for layer in cache for array in layer.state)
    whole_steps = -(-(rows + budget) // 256) * 256
    assert held == cache_bytes(decoder.config, whole_steps, 4)


# --- Room ---------------------------------------------------------------------------------------------------------


def on_a_mac(config: ModelConfig, gib: int) -> bool:
    return plan_memory(config, "bfloat16", reserve=KEPT_ON_GPU).total <= apple_working_set(gib * GIB)


def test_the_4b_system_runs_in_16_gb_at_8_bits_and_in_8_gb_at_4():
    config = known("funasr-qwen4b")
    eight, four = (quantized_config(config, RECIPES[bits]) for bits in ("8", "4"))
    assert on_a_mac(eight, 16)
    assert on_a_mac(four, 8)
    assert not on_a_mac(eight, 8)
    assert not on_a_mac(config, 8)


@pytest.mark.parametrize("name", ["funasr-qwen4b", "sensevoice-small"])
def test_the_advised_quantisation_is_the_first_that_fits(name):
    config = known(name)
    plan = plan_memory(config, "bfloat16")
    totals = {options: plan_memory(form, "bfloat16").total for options, form in smaller_forms(config)}
    assert list(totals.values()) == sorted(totals.values(), reverse=True)
    for limit in (*totals.values(), min(totals.values()) - 1, plan.total - 1):
        with pytest.raises(ConfigError) as caught:
            require_room(config, plan, Machine(None, None), limit, model="here")
        fitting = [options for options, total in totals.items() if total <= limit]
        wanted = f"convert --checkpoint here {fitting[0]} --output" if fitting else "no quantisation fits"
        assert wanted in str(caught.value)
        assert "--memory-limit" not in str(caught.value)
    assert require_room(config, plan, Machine(10**9, 10**9), plan.total) is None


def test_the_machine_counts_where_there_is_no_limit():
    config = known("funasr-qwen4b")
    plan = plan_memory(config, "bfloat16")
    assert require_room(config, plan, Machine(None, None)) is None
    assert require_room(config, plan, Machine(plan.total, plan.total)) is None
    warning = require_room(config, plan, Machine(plan.total, plan.total - 1))
    assert warning is not None
    assert "may slow down" in warning
    assert "--quantize 8" in warning
    with pytest.raises(ConfigError, match=r"this machine has .* --memory-limit tries all the same"):
        require_room(config, plan, Machine(plan.total - 1, plan.total - 1))
    # A limit of one's own takes the machine's place.
    assert require_room(config, plan, Machine(1, 1), plan.total) is None


def test_what_is_quantised_already_is_made_anew_from_its_source():
    config = quantized_config(known("funasr-qwen4b"), RECIPES["8"])
    plan = plan_memory(config, "bfloat16")
    assert "convert --checkpoint WHAT_IT_WAS_MADE_FROM --quantize 6 --output" in advise(config, plan, plan.total - 1)
    four = quantized_config(dense(config), read_recipe("4", encoder=4, adaptor=4))
    smallest = plan_memory(four, "bfloat16")
    assert advise(four, smallest, smallest.total - 1) == "no quantisation makes it smaller"


def test_forms_are_named_once_and_only_where_they_can_be():
    assert [options for options, _ in smaller_forms(known("sensevoice-small"))] == [
        "--quantize-encoder 8",
        "--quantize-encoder 4",
    ]
