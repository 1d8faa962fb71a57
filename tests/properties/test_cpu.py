"""What NumPy computes on a CPU is what MLX computes, up to rounding, for any shapes, masks and offsets."""

import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from qwen4b_asr import pass_costs, prepare
from qwen4b_asr.batch_cache import BatchCache
from qwen4b_asr.cache import KVCache, QuantizedKVCache
from qwen4b_asr.cpu import arithmetic, listening, products
from qwen4b_asr.cpu.choices import choose_run
from qwen4b_asr.cpu.decoder import NumpyDecoderLayer, use_numpy_layers
from qwen4b_asr.decoder import Qwen3
from qwen4b_asr.generate import Generation, GenerationOptions
from qwen4b_asr.kernels.attention import attention_reference
from qwen4b_asr.kernels.fsmn import fsmn_reference
from qwen4b_asr.lora import LoraConfig, LoraLinear, add_lora, build_lora, remove_lora
from qwen4b_asr.model import SpeechModel
from qwen4b_asr.pass_costs import PassCost, pass_cost
from qwen4b_asr.quantization import Quantization, Scheme, UnpackingLinear, quantize_modules
from qwen4b_asr.sampling import Sampler, SamplingOptions, best_two
from qwen4b_asr.speculate import DraftedGeneration
from tests.helpers.tiny import CONFIG, max_abs, ragged_lengths, randomise, rows, tiny_model

SIZES = CONFIG.decoder
GROUPS, WIDTH = SIZES.num_key_value_heads, SIZES.hidden_size


def on_numpy(seed: int = 0) -> SpeechModel:
    """Return a copy of `tiny_model` made ready for a CPU with NumPy's BLAS."""
    model = SpeechModel(CONFIG)
    randomise(model, seed)
    products.multiply_by_numpy(model)
    listening.listen_with_numpy(model)
    use_numpy_layers(model)
    return model


MODEL = on_numpy()


def close(x: object, wanted: mx.array, within: float = 2e-5) -> bool:
    return np.allclose(np.array(x), np.array(wanted), rtol=0, atol=within * max(1.0, max_abs(wanted)))


@given(
    st.lists(st.integers(1, 40), min_size=0, max_size=2),
    st.integers(1, 60),
    st.integers(1, 70),
    st.booleans(),
    st.integers(0, 99),
)
def test_products_of_any_number_of_rows(leading, inputs, outputs, bias, seed):
    layer = nn.Linear(inputs, outputs, bias=bias)
    randomise(layer, seed)
    x = mx.random.normal((*leading, inputs), key=mx.random.key(seed))
    wanted = layer(x)
    assert products.multiply_by_numpy(layer) == [""]
    found = layer(x)
    assert found.shape == wanted.shape == (*leading, outputs)
    assert close(found, wanted)
    assert close(layer(x[..., :0, :] if leading else x), wanted[..., :0, :] if leading else wanted)


@pytest.mark.parametrize("small", [0, 1 << 30])
def test_rows_of_zeros_that_fill_a_group_stay_inside(monkeypatch, small):
    monkeypatch.setattr(products, "_SMALL", small)
    weight = mx.random.normal((5, 3), key=mx.random.key(0))
    for count in range(1, 140):
        x = np.array(rows(count, 3, count))
        assert np.allclose(products.multiply(x, weight), x @ np.array(weight).T, atol=1e-5)


@given(
    st.integers(1, 3),
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.integers(1, 12),
    st.integers(0, 9),
    st.booleans(),
    st.integers(0, 99),
)
def test_attention(batch, heads, queries, held, causal, seed):
    keys = iter(mx.random.split(mx.random.key(seed), 4))
    own, groups = heads
    q = mx.random.normal((batch, own, queries, 8), key=next(keys))
    k, v = (mx.random.normal((batch, groups, held + queries, 8), key=next(keys)) for _ in range(2))
    mask = None if causal else mx.random.uniform(shape=(batch, held + queries), key=next(keys)) < 0.7
    wanted = attention_reference(q, k, v, scale=0.3, mask=mask, causal=causal, offset=held)
    seen = None if mask is None else np.array(mask)[:, None, None]
    found = arithmetic.attention(*map(np.array, (q, k, v)), 0.3, seen, causal)
    blind = np.zeros(batch, bool) if mask is None else ~np.array(mask).any(axis=1)
    wanted_rows = np.array(wanted).transpose(0, 2, 1, 3)
    assert np.allclose(found[~blind], wanted_rows[~blind], atol=1e-5)
    assert np.isfinite(found).all()


@given(ragged_lengths(), st.integers(1, 9), st.integers(1, 7), st.data())
def test_memory(lengths, width, taps, data):
    left = data.draw(st.integers(0, taps - 1))
    packed = mx.random.normal((len(lengths), max(lengths), 3 * width), key=mx.random.key(taps))
    weight = mx.random.normal((width, taps, 1), key=mx.random.key(width))
    mask = mx.arange(max(lengths))[None] < mx.array(lengths)[:, None]
    wanted = fsmn_reference(packed, weight, mask, left=left)
    values = np.array(packed)[..., 2 * width :]
    assert close(listening.memory(values, np.array(weight)[:, :, 0].T.copy(), np.array(mask), left), wanted)


@given(st.integers(1, 5), st.integers(1, 9), st.integers(-20, 3000), st.booleans(), st.integers(0, 99))
def test_rotation(batch, count, offset, apart, seed):
    x = mx.random.normal((batch, 3, count, 8), key=mx.random.key(seed))
    offsets = [offset + 7 * i for i in range(batch)] if apart else [offset]
    at = mx.array(offsets) if apart else offset
    wanted = mx.fast.rope(x, 8, traditional=False, base=1e4, scale=1.0, offset=at)
    assert close(arithmetic.rotate(np.array(x), offsets, 1e4), wanted, 5e-4)  # of angles up to 3000 in float32


@given(ragged_lengths(most=12), st.integers(0, 3), st.integers(0, 99))
def test_ragged_batches_with_a_cache(lengths, steps, seed):
    padding = [max(lengths) - n for n in lengths]
    x = mx.random.normal((len(lengths), max(lengths), WIDTH), key=mx.random.key(seed))
    found = []
    for model in (tiny_model().decoder, MODEL.decoder):
        cache = BatchCache(SIZES.num_hidden_layers, padding)
        hidden = [model.hidden(x, cache.layers, cache.mask(x.shape[1]))[:, -1]]
        cache.advance(x.shape[1])
        for step in range(steps):
            one = mx.random.normal((len(lengths), 1, WIDTH), key=mx.random.key(seed + step + 1))
            hidden.append(model.hidden(one, cache.layers, cache.mask(1))[:, -1])
            cache.advance(1)
        found.append(mx.concatenate(hidden))
    assert close(found[1], found[0], 1e-4)


@pytest.mark.parametrize("make", [KVCache, lambda: QuantizedKVCache(8)])
def test_steps_through_each_cache(make):
    sizes = replace(SIZES, head_dim=32)  # codes come in groups
    x = rows(9, WIDTH)[None]
    found = []
    for numpys in (False, True):
        model = randomise(Qwen3(sizes), 4)
        if numpys:
            products.multiply_by_numpy(model)
            use_numpy_layers(model)
        cache = [make() for _ in range(sizes.num_hidden_layers)]
        found.append(mx.concatenate([model.hidden(x[:, i : i + 3], cache) for i in range(0, 9, 3)], axis=1))
    assert close(found[1], found[0], 1e-4 if make is KVCache else 2e-2)  # where rounding turns a code into the next


@given(ragged_lengths())
def test_listening(lengths):
    features = mx.random.normal((len(lengths), max(lengths), 56), key=mx.random.key(len(lengths)))
    mask = mx.arange(max(lengths))[None] < mx.array(lengths)[:, None]
    wanted, seen = tiny_model().audio_encoder(features, mask)
    found, _ = MODEL.audio_encoder(features, mask)
    assert close(found, wanted, 1e-4)
    assert close(MODEL.ctc_logits(found), tiny_model().ctc_logits(wanted), 1e-4)
    real = np.array(seen)
    heard, expected = np.array(MODEL.adaptor(wanted, seen)), np.array(tiny_model().adaptor(wanted, seen))
    assert np.allclose(heard[real], expected[real], atol=1e-4 * max(1.0, float(np.abs(expected[real]).max())))


def test_adapters_keep_working():
    config = LoraConfig(rank=2, alpha=1.0, target_modules=("layers.0.self_attn.q_proj",))
    decoders = []
    for numpys in (False, True):
        decoder = randomise(Qwen3(SIZES), 4)
        build_lora(decoder, config)
        randomise(decoder, 5)
        if numpys:
            products.multiply_by_numpy(decoder)
            assert len(use_numpy_layers(decoder)) == SIZES.num_hidden_layers
        assert type(decoder.model.layers[0].self_attn.q_proj) is LoraLinear
        decoders.append(decoder)
    x = rows(6, WIDTH)[None]
    assert close(decoders[1](x), decoders[0](x), 1e-4)


def test_codes_are_unpacked_for_many_rows_and_other_layers_left_alone():
    layer = nn.Sequential(nn.Linear(64, 32))
    randomise(layer, 1)
    quantize_modules(layer, Quantization(Scheme(32, 4)))
    few, many = rows(2, 64), rows(40, 64)
    layer.layers[0].__class__ = UnpackingLinear
    wanted = layer(few), layer(many)
    assert products.multiply_by_numpy(layer) == ["layers.0"]
    assert np.array_equal(np.array(layer(few)), np.array(wanted[0]))
    assert close(layer(many), wanted[1])
    half = nn.Linear(4, 4)
    half.set_dtype(mx.bfloat16)
    assert products.multiply_by_numpy(half) == []


@given(
    st.lists(st.integers(0, 19), max_size=9),
    st.lists(st.integers(0, 19), max_size=6),
    st.sampled_from([0.7, 1.0, 1.3]),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.5, np.inf]),
    st.integers(0, 99),
)
def test_runs_are_judged_as_by_mlx(generated, run, penalty, ngram, spread, seed):
    sampler = Sampler(SamplingOptions(repetition_penalty=penalty, no_repeat_ngram=ngram))
    logits = mx.random.normal((len(run) + 1, 20), key=mx.random.key(seed))
    if spread:  # ties, and what is no number to rely on
        logits = mx.where(logits > 1, spread, mx.round(logits * 2) / 2)
    before = np.array(logits)
    ids, leads, size = choose_run(sampler, logits, generated, run)
    wanted_ids, wanted_leads = best_two(sampler.process_run(logits, generated, run))
    assert ids == wanted_ids.tolist()
    assert np.array_equal(leads, np.array(wanted_leads), equal_nan=True)
    assert np.array_equal(size, np.abs(before).max(axis=-1))
    assert np.array_equal(np.array(logits), before)


def test_a_draft_changes_nothing(monkeypatch):
    prompt, options = rows(5, WIDTH), GenerationOptions(24, (), SamplingOptions(repetition_penalty=1.2))
    wanted = list(Generation(MODEL.decoder, prompt, options))
    judged = []
    monkeypatch.setattr("qwen4b_asr.speculate.choose_run", lambda *rest: judged.append(1) or choose_run(*rest))
    for changed in ((), (7,), (3, 4, 15)):
        draft = [299 if i in changed else token for i, token in enumerate(wanted)]
        drafted = DraftedGeneration(MODEL.decoder, prompt, options, draft)
        assert list(drafted) == wanted
        assert drafted.decoder_passes < 24
    assert judged


def test_a_token_is_given_before_the_next_step_is_computed(monkeypatch):
    passes = []
    original = NumpyDecoderLayer.__call__

    def counted(self, x, *rest):
        passes.append(x.shape[1])
        return original(self, x, *rest)

    monkeypatch.setattr(NumpyDecoderLayer, "__call__", counted)
    generation = Generation(MODEL.decoder, rows(5, WIDTH), GenerationOptions(6, ()))
    for number, _ in enumerate(generation):
        assert len(passes) == SIZES.num_hidden_layers * (1 + number)
    plain = Generation(tiny_model().decoder, rows(5, WIDTH), GenerationOptions(6, ()))
    assert generation.tokens == list(plain)
    assert generation.decoder_passes == plain.decoder_passes


def test_passes_over_several_rows_cost_more_than_where_mlx_multiplies(monkeypatch):
    mlxs, cached = pass_cost(tiny_model().decoder), pass_cost(MODEL.decoder)
    monkeypatch.setattr(pass_costs, "_IN_CACHE", 0)
    ours = pass_cost(MODEL.decoder)
    assert isinstance(ours, PassCost)
    assert ours.of(3) == ours.of(8) > 1.5 > cached.of(8) > mlxs.of(8)
    assert ours.of(9) == ours.of(16) > ours.of(8) > ours.of(2) > 1.5
    assert ours.of(1) == cached.of(1) == 1


@pytest.mark.parametrize("numpys", [True, False])
def test_prepare_leaves_products_to_numpy_where_it_can(monkeypatch, numpys):
    limited = []
    monkeypatch.setattr(prepare, "numpy_multiplies", lambda: numpys)
    monkeypatch.setattr(prepare, "leave_cores_to_numpy", lambda: limited.append(True))
    model = SpeechModel(CONFIG)
    randomise(model, 0)
    prepare.prepare(model)
    assert bool(limited) == numpys
    assert model.decoder.computes_at_once == numpys
    assert type(model.audio_encoder.ctc.ctc_lo) is (products.NumpyLinear if numpys else nn.Linear)
    assert any(type(m) is NumpyDecoderLayer for _, m in model.named_modules()) == numpys
    x = rows(4, WIDTH)[None]
    assert close(model.decoder(x), tiny_model().decoder(x), 1e-4)


@given(st.lists(st.integers(0, SIZES.vocab_size - 1), max_size=5), st.sampled_from([(-1,), (1, -1)]))
def test_embeddings_are_looked_up_as_by_mlx(ids, shape):
    ids = mx.array(ids, dtype=mx.int32).reshape(shape if ids else (*shape[:-1], 0))
    found, wanted = MODEL.decoder.embed(ids), tiny_model().decoder.embed(ids)
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert mx.array_equal(found, wanted)


def test_a_layer_follows_weights_that_change_between_calls():
    ours, plain = on_numpy(1), SpeechModel(CONFIG)
    features = mx.random.normal((1, 6, 56), key=mx.random.key(2))
    names = ("w_1.bias", "w_2.weight", "w_2.bias")
    for seed, name in enumerate([None, *names]):
        if name is None:
            randomise(plain, 1)
        else:
            path = f"audio_encoder.encoder.encoders.0.feed_forward.{name}"
            old = dict(tree_flatten(plain.parameters()))[path]
            for one in (ours, plain):
                one.load_weights([(path, old + mx.random.normal(old.shape, key=mx.random.key(seed)))], strict=False)
        assert close(ours.audio_encoder(features)[0], plain.audio_encoder(features)[0], 1e-4)


def test_a_decoder_follows_weights_and_adapters_that_change_between_utterances():
    ours, plain = (randomise(Qwen3(SIZES), 4) for _ in range(2))
    prepare.lay_out_for_numpy(ours)
    products.multiply_by_numpy(ours)
    use_numpy_layers(ours)

    def logits(model, prompt):
        cache = [KVCache() for _ in range(SIZES.num_hidden_layers)]
        slots = BatchCache(SIZES.num_hidden_layers, [0])
        alone = model(prompt[:, :1], slots.layers)
        return mx.concatenate([alone, model(prompt[:, :-1], cache), model(prompt[:, -1:], cache)], axis=1)

    parts = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.k_norm", "mlp.up_proj",
             "mlp.down_proj", "input_layernorm", "post_attention_layernorm")  # fmt: skip
    paths = [f"model.layers.1.{part}.weight" for part in parts]
    for seed, path in enumerate(["", *paths]):
        if path:
            old = dict(tree_flatten(plain.parameters()))[path]
            for one in (ours, plain):
                one.load_weights([(path, old + mx.random.normal(old.shape, key=mx.random.key(seed)))], strict=False)
        for count in (1, 2, 5):  # a prompt of one row, of a pair, of many
            prompt = rows(count + 1, WIDTH, seed)[None]
            assert close(logits(ours, prompt), logits(plain, prompt), 1e-4)
    shape = (2, WIDTH), (SIZES.num_attention_heads * SIZES.head_dim, 2)
    factors = {"model.layers.0.self_attn.q_proj": tuple(rows(*size, 7) for size in shape)}
    config = LoraConfig(rank=2, alpha=4, target_modules=("q_proj",))
    for change in (lambda model: add_lora(model, factors, config), remove_lora):
        for model in (ours, plain):
            change(model)
        assert close(logits(ours, prompt), logits(plain, prompt), 1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux with glibc")
def test_memory_that_was_given_back_is_used_again():
    """In a process of its own, as what other tests have freed counts as well."""
    program = """
import resource
import numpy as np
from qwen4b_asr.cpu.heap import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        [np.ones(1 << 18, np.float32) for _ in range(40)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
keep_freed_memory()
faults()
print(faults())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10_000  # of 200 000 pages that are touched


def test_in_training_mode_there_are_gradients():
    model, plain = on_numpy(), SpeechModel(CONFIG)
    randomise(plain, 0)
    x, features = rows(3, WIDTH)[None], mx.random.normal((1, 6, 56), key=mx.random.key(2))

    def losses(one):
        heard = one.adaptor(one.audio_encoder(features)[0])
        return one.decoder(x).sum() + one.decoder.embed(mx.array([1, 3])).sum() + heard.sum()

    found = []
    for one in (model, plain):
        one.train()
        found.append(dict(tree_flatten(nn.value_and_grad(one, losses)(one)[1])))
    assert found[0].keys() == found[1].keys()
    assert all(close(found[0][name], wanted, 1e-4) for name, wanted in found[1].items())
    assert max_abs(found[0]["decoder.model.layers.0.mlp.up_proj.weight"]) > 0
