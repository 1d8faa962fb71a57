"""Losses and fast gradients of training against slow definitions and against the ordinary operations."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx import nn
from mlx.utils import tree_flatten

from qwen4b_asr import encoder
from qwen4b_asr.features import low_frame_rate
from qwen4b_asr.kernels.fsmn import fsmn
from qwen4b_asr.model import SpeechModel
from qwen4b_asr.training import fast
from qwen4b_asr.training.batches import Batch, stack_rows
from qwen4b_asr.training.losses import alignment_loss, ctc_loss, encode, info_nce, inputs_of, text_loss
from qwen4b_asr.training.recipe import demo_config

seeds = st.integers(0, 2**31 - 1)


def slow_info_nce(audio, text, labels, temperature):
    audio = audio / np.linalg.norm(audio, axis=1, keepdims=True)
    text = text / np.linalg.norm(text, axis=1, keepdims=True)
    losses = []
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if labels[j] != labels[i]]
        own = np.exp(audio[i] @ text[i] / temperature)
        losses.append(-np.log(own / (own + sum(np.exp(audio[i] @ text[j] / temperature) for j in others))))
        losses.append(-np.log(own / (own + sum(np.exp(audio[j] @ text[i] / temperature) for j in others))))
    return np.mean(losses)


@given(seeds, st.integers(1, 9), st.floats(0.05, 2.0))
def test_info_nce_equals_its_definition(seed, count, temperature):
    rng = np.random.default_rng(seed)
    audio, text = rng.normal(size=(2, count, 6))
    labels = rng.integers(0, 4, count)
    result = info_nce(mx.array(audio, mx.float32), mx.array(text, mx.float32), mx.array(labels), temperature)
    assert result.item() == pytest.approx(slow_info_nce(audio, text, labels, temperature), rel=1e-3, abs=1e-4)


def random_batch(seed, rows=(9, 14, 6), lengths=(2, 3, 1)):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(len(rows), max(rows), 280)).astype(np.float32)
    words = np.full((len(rows), max(lengths)), -1)
    for i, n in enumerate(lengths):
        words[i, :n] = rng.integers(0, 24, n)
    return Batch(features, np.array(rows), words, np.array(lengths), ("auto", "en", "zh")[: len(rows)])


NORMALISATION = (np.zeros(280, np.float32), np.ones(280, np.float32))


def one_of(batch, i):
    rows, words = batch.rows[i], batch.lengths[i]
    return Batch(
        batch.features[i : i + 1, :rows],
        batch.rows[i : i + 1],
        batch.words[i : i + 1, :words],
        batch.lengths[i : i + 1],
        batch.languages[i : i + 1],
    )


@pytest.fixture(scope="module")
def model():
    mx.random.seed(3)
    return SpeechModel(demo_config())


@pytest.mark.parametrize("loss", ["ctc", "text", "align"])
def test_losses_of_a_batch_are_those_of_its_items(model, loss):
    batch = random_batch(1)

    def value(part):
        inputs = inputs_of(part, *NORMALISATION)
        states, mask = encode(model, inputs)
        _, ctc_value, result = ctc_loss(model, states, inputs)
        if loss == "ctc":
            return ctc_value * int(part.lengths.sum())
        if loss == "align":  # one item alone has other negatives: compare the batch with a longer-padded copy
            return alignment_loss(model, states, mask, inputs, result.alignment, 0.1).item()
        return text_loss(model, states, mask, inputs).item() * int(part.lengths.sum() + len(part.lengths))

    if loss == "align":
        wide = np.concatenate([batch.features, np.full_like(batch.features, 7.0)], axis=1)
        padded = Batch(wide, batch.rows, batch.words, batch.lengths, batch.languages)
        assert value(padded) == pytest.approx(value(batch), rel=1e-4)
    else:
        assert value(batch) == pytest.approx(sum(value(one_of(batch, i)) for i in range(3)), rel=1e-4)


def test_text_starts_at_the_last_audio_row(model):
    """The loss of one item is what the decoder gives for [audio rows, words] read from the last audio row on."""
    batch = one_of(random_batch(5), 1)
    inputs = inputs_of(batch, *NORMALISATION)
    states, mask = encode(model, inputs)
    audio = model.adaptor(states)
    tokens = inputs.tokens[0].tolist()
    logits = model.decoder(mx.concatenate([audio, model.decoder.embed(mx.array([tokens]))], axis=1))[0]
    picked = nn.log_softmax(logits[audio.shape[1] - 1 :], axis=-1)
    expected = -np.mean([picked[i, token].item() for i, token in enumerate([*tokens, 0])])
    assert text_loss(model, states, mask, inputs).item() == pytest.approx(expected, rel=1e-4)


@given(seeds, st.integers(1, 40), st.sampled_from([(7, 6), (5, 3), (4, 2), (1, 1)]))
def test_stacking_equals_the_front_end(seed, total, shape):
    frames = np.random.default_rng(seed).normal(size=(total, 4)).astype(np.float32)
    np.testing.assert_array_equal(stack_rows(frames, *shape), np.array(low_frame_rate(mx.array(frames), *shape)))


def assert_same_values_and_gradients(ordinary, quick, arguments, seed):
    cotangent = mx.random.normal(ordinary(*arguments).shape, key=mx.random.key(seed))
    (value,), gradients = mx.vjp(ordinary, arguments, [cotangent])
    (quick_value,), quick_gradients = mx.vjp(quick, arguments, [cotangent])
    np.testing.assert_allclose(quick_value, value, atol=2e-5)
    for one, other in zip(quick_gradients, gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@given(seeds, st.integers(1, 12), st.sampled_from(["padding", "causal", "both", None]))
def test_fast_attention_equals_the_ordinary_one(seed, rows, kind):
    keys = mx.random.split(mx.random.key(seed), 4)
    q = mx.random.normal((2, 4, rows, 8), key=keys[0])
    k, v = (mx.random.normal((2, 2, rows, 8), key=key) for key in keys[1:3])
    padding = mx.arange(rows)[None, :] < mx.random.randint(1, rows + 1, (2, 1), key=keys[3])
    causal = mx.arange(rows)[:, None] >= mx.arange(rows)[None, :]
    mask = {
        "padding": padding[:, None, None, :],
        "causal": "causal",
        "both": ((causal[None] & padding[:, None, :]) | mx.eye(rows).astype(mx.bool_))[:, None],
        None: None,
    }[kind]
    assert_same_values_and_gradients(
        lambda *a: mx.fast.scaled_dot_product_attention(*a, scale=0.3, mask=mask),
        lambda *a: fast.attention(*a, scale=0.3, mask=mask),
        [q, k, v],
        seed,
    )


@given(seeds, st.integers(1, 15), st.integers(0, 4))
def test_fast_memory_equals_the_ordinary_one(seed, rows, left):
    keys = mx.random.split(mx.random.key(seed), 3)
    qkv = mx.random.normal((2, rows, 18), key=keys[0])
    weight = mx.random.normal((6, 5, 1), key=keys[1])
    mask = mx.arange(rows)[None, :] < mx.random.randint(1, rows + 1, (2, 1), key=keys[2])
    assert_same_values_and_gradients(
        lambda *a: fsmn(*a, mask, left=left),
        lambda *a: fast.memory(*a, mask, left=left),
        [qkv, weight],
        seed,
    )


@given(seeds)
def test_fast_activations_equal_the_ordinary_ones(seed):
    x = mx.random.normal((5, 7), key=mx.random.key(seed)) * 6
    assert_same_values_and_gradients(nn.silu, fast.silu, [x], seed)
    assert_same_values_and_gradients(nn.gelu, fast.gelu, [x], seed)


def test_fast_gradients_give_way_afterwards(model):
    kept = (mx.fast.scaled_dot_product_attention, encoder.fsmn, nn.gelu, nn.silu)
    inputs = inputs_of(random_batch(2), *NORMALISATION)

    def loss():
        states, mask = encode(model, inputs)
        surrogate, _, _ = ctc_loss(model, states, inputs)
        return text_loss(model, states, mask, inputs) + surrogate

    ordinary = dict(tree_flatten(nn.value_and_grad(model, loss)()[1]))
    with fast.cpu_gradients():
        assert mx.fast.scaled_dot_product_attention is fast.attention
        quick = dict(tree_flatten(nn.value_and_grad(model, loss)()[1]))
    assert (mx.fast.scaled_dot_product_attention, encoder.fsmn, nn.gelu, nn.silu) == kept
    for name, gradient in ordinary.items():
        np.testing.assert_allclose(quick[name], gradient, atol=2e-4, err_msg=name)
