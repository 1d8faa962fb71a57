"""CTC against its definition: the sum over every path, differences of the loss, invisible padding."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.training.ctc import ctc


@st.composite
def problems(draw):
    """A batch that the definition can still enumerate: up to 5 rows, 4 symbols, texts of up to 3."""
    batch = draw(st.integers(1, 3))
    total = draw(st.integers(1, 5))
    rows = np.array([draw(st.integers(1, total)) for _ in range(batch)])
    texts = [draw(st.lists(st.integers(1, 3), max_size=3)) for _ in range(batch)]
    lengths = np.array([len(t) for t in texts])
    padded = np.array([t + [0] * (3 - len(t)) for t in texts]).reshape(batch, 3)
    logits = np.random.default_rng(draw(st.integers(0, 2**32))).normal(size=(batch, total, 4)) * 2
    return logits.astype(np.float32), rows, padded, lengths


def collapse(path):
    return [s for s, _ in itertools.groupby(path) if s != 0]


def by_definition(logits, text):
    """Sum the probabilities of all paths that spell the text; also of each row carrying each text position."""
    rows, symbols = logits.shape
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    total = 0.0
    carried = np.zeros((rows, len(text)))
    for path in itertools.product(range(symbols), repeat=rows):
        if collapse(path) != list(text):
            continue
        weight = np.prod([probabilities[r, s] for r, s in enumerate(path)])
        total += weight
        position = -1
        for r, s in enumerate(path):
            if s != 0:
                position += r == 0 or path[r - 1] != s
                carried[r, position] += weight
    return total, carried / max(total, 1e-300)


@given(problems())
def test_loss_and_alignment_are_the_sum_over_paths(problem):
    logits, rows, texts, lengths = problem
    result = ctc(logits, rows, texts, lengths)
    for i in range(len(rows)):
        total, carried = by_definition(logits[i, : rows[i]], texts[i, : lengths[i]])
        if total == 0:
            assert np.isinf(result.losses[i])
            assert not result.gradient[i].any()
            assert not result.alignment[i].any()
        else:
            assert result.losses[i] == pytest.approx(-np.log(total), abs=1e-4)
            np.testing.assert_allclose(result.alignment[i, : rows[i], : lengths[i]], carried, atol=1e-4)
            assert not result.alignment[i, rows[i] :].any()


@given(problems())
def test_gradient_is_that_of_the_loss(problem):
    logits, rows, texts, lengths = problem
    result = ctc(logits, rows, texts, lengths)

    def loss(at):
        return np.where(np.isfinite(result.losses), ctc(at, rows, texts, lengths).losses, 0).sum(dtype=np.float64)

    step = 1e-2
    for place in np.ndindex(logits.shape):
        up, down = logits.copy(), logits.copy()
        up[place] += step
        down[place] -= step
        slope = (loss(up) - loss(down)) / (2 * step)
        assert result.gradient[place] == pytest.approx(slope, abs=3e-3)


@given(problems(), st.floats(-50, 50))
def test_padding_and_its_contents_are_invisible(problem, filler):
    logits, rows, texts, lengths = problem
    expected = ctc(logits, rows, texts, lengths)
    longer = np.concatenate([logits, np.full_like(logits, filler)], axis=1)
    for i, count in enumerate(rows):
        longer[i, count:] = filler
    wider = np.concatenate([texts, np.full_like(texts, 2)], axis=1)
    result = ctc(longer, rows, wider, lengths)
    np.testing.assert_allclose(result.losses, expected.losses, rtol=1e-5)
    for i, count in enumerate(rows):
        np.testing.assert_allclose(result.gradient[i, :count], expected.gradient[i, :count], atol=1e-5)
        assert not result.gradient[i, count:].any()


def test_long_strings_stay_finite():
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(4, 400, 25)) * 20).astype(np.float32)
    texts = rng.integers(1, 25, (4, 60))
    result = ctc(logits, np.full(4, 400), texts, np.full(4, 60))
    assert np.isfinite(result.losses).all()
    np.testing.assert_allclose(result.gradient.sum(axis=2), 0, atol=2e-2)  # float32 sums in the thousands


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\[ctc\] rows, texts and lengths"):
        ctc(np.zeros((2, 3, 4), np.float32), np.array([3]), np.zeros((2, 1), int), np.array([1, 1]))
    with pytest.raises(ValueError, match="within the logits"):
        ctc(np.zeros((1, 3, 4), np.float32), np.array([4]), np.zeros((1, 1), int), np.array([1]))
