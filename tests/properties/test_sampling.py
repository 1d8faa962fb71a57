"""Sampling: processors against their definitions, support of top-k and top-p, temperature towards zero."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qwen4b_asr.sampling import (
    Sampler,
    SamplingOptions,
    ban_repeated_ngrams,
    banned_by_ngram,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
)

V = 12
LOGITS = hnp.arrays(np.float32, V, elements=st.floats(-8, 8, width=32))
GENERATED = st.lists(st.integers(0, V - 1), max_size=20)


@given(LOGITS, GENERATED, st.floats(1.01, 3.0))
def test_penalty_equals_its_definition(logits, generated, penalty):
    wanted = logits.copy()
    for token in set(generated):
        wanted[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
    assert np.allclose(np.array(penalise_repetition(mx.array(logits), generated, penalty)), wanted, rtol=1e-6)


@given(GENERATED, st.integers(0, 5))
def test_ban_equals_its_definition(generated, size):
    def repeats(token: int) -> bool:
        grams = [tuple([*generated, token][i : i + size]) for i in range(len(generated) + 2 - size)]
        return grams[-1] in grams[:-1]

    wanted = [t for t in range(V) if size and len(generated) >= size and repeats(t)]
    assert banned_by_ngram(generated, size) == wanted
    scores = np.array(ban_repeated_ngrams(mx.zeros(V), generated, size))
    assert np.flatnonzero(np.isinf(scores)).tolist() == wanted


@given(LOGITS, GENERATED)
def test_processors_leave_their_input_alone(logits, generated):
    given_logits = mx.array(logits)
    Sampler(SamplingOptions(repetition_penalty=1.5, no_repeat_ngram=1)).choose(given_logits, generated[: V - 1])
    assert np.array_equal(np.array(given_logits), logits)


@given(LOGITS, st.integers(1, V))
def test_top_k_keeps_the_k_largest(logits, k):
    kept = np.isfinite(np.array(keep_top_k(mx.array(logits), k)))
    threshold = np.sort(logits)[-k]
    assert np.array_equal(kept, logits >= threshold)


@given(LOGITS, st.floats(0.05, 0.99))
def test_top_p_keeps_the_smallest_sufficient_set(logits, p):
    kept = np.isfinite(np.array(keep_top_p(mx.array(logits), p)))
    probabilities = np.exp(logits.astype(np.float64) - logits.max())
    probabilities /= probabilities.sum()
    assert kept.any()
    assert probabilities[kept].sum() >= p - 1e-5
    # Without its least likely member the set would fall short.
    assert probabilities[kept].sum() - probabilities[kept].min() < p + 1e-5
    # No token left out is more likely than one that was kept.
    if not kept.all():
        assert logits[~kept].max() <= logits[kept].min()


@given(LOGITS, GENERATED, st.integers(0, 99))
def test_temperature_towards_zero_is_argmax(logits, generated, seed):
    ordered = np.sort(logits)
    if ordered[-1] - ordered[-2] < 0.05:
        logits[int(logits.argmax())] += 0.5
    cold = Sampler(SamplingOptions(temperature=1e-4, seed=seed))
    assert cold.choose(mx.array(logits), generated) == Sampler(SamplingOptions()).choose(mx.array(logits), generated)


@given(LOGITS, st.integers(1, 4), st.integers(0, 99))
def test_draws_stay_in_the_support(logits, k, seed):
    sampler = Sampler(SamplingOptions(temperature=1.3, top_k=k, top_p=0.9, seed=seed))
    allowed = set(np.flatnonzero(logits >= np.sort(logits)[-k]).tolist())
    assert {sampler.choose(mx.array(logits), []) for _ in range(5)} <= allowed


def test_a_seed_repeats_its_draws_and_they_vary():
    def draws(seed: int) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=seed))
        return [sampler.choose(mx.zeros(V), []) for _ in range(40)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert len(set(draws(3))) > 5


def test_draws_follow_the_distribution():
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=1))
    drawn = [sampler.choose(mx.log(mx.array([0.7, 0.3])), []) for _ in range(600)]
    assert 0.62 < drawn.count(0) / 600 < 0.78


def test_low_precision_logits_are_scored_in_float32():
    logits = mx.array([1.0, 2.0], dtype=mx.bfloat16)
    assert Sampler(SamplingOptions(repetition_penalty=1.1)).process(logits, [1]).dtype == mx.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
    ],
)
def test_bad_options_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**change)
