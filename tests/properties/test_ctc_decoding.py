"""CTC decoding against its definition: every path of tiny problems, enumerated."""

import itertools
import math
from collections import defaultdict

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.ctc import (
    CtcToken,
    align,
    collapse,
    ctc_log_probs,
    greedy,
    log_add,
    prefix_beam_search,
    row_times_ms,
)


@st.composite
def problems(draw, most_rows=5, most_symbols=4):
    """Log-probabilities that the definition can still enumerate, and a blank anywhere among the symbols."""
    shape = (draw(st.integers(1, most_rows)), draw(st.integers(2, most_symbols)))
    logits = np.random.default_rng(draw(st.integers(0, 2**32))).normal(size=shape) * draw(st.sampled_from([0.3, 2, 8]))
    return np.array(ctc_log_probs(mx.array(logits.astype(np.float32)))), draw(st.integers(0, shape[1] - 1))


def spelled(path, blank):
    return tuple(s for s, _ in itertools.groupby(path) if s != blank)


def by_definition(log_probs, blank):
    """Return the probability of every text, and the most probable path of each."""
    total, best = defaultdict(float), {}
    for path in itertools.product(range(log_probs.shape[1]), repeat=log_probs.shape[0]):
        score = float(sum(log_probs[r, s] for r, s in enumerate(path)))
        text = spelled(path, blank)
        total[text] += math.exp(score)
        best[text] = max(best.get(text, -math.inf), score)
    return total, best


def spans_score(tokens, log_probs, blank):
    """Log-probability of the path that carries exactly these symbols on exactly these rows."""
    path = [blank] * len(log_probs)
    for token in tokens:
        path[token.start : token.end] = [token.id] * (token.end - token.start)
    return float(sum(log_probs[r, s] for r, s in enumerate(path)))


@given(problems())
def test_a_wide_beam_is_the_sum_over_all_paths(problem):
    log_probs, blank = problem
    total, _ = by_definition(log_probs, blank)
    found = prefix_beam_search(log_probs, beam_size=10_000, symbols_per_row=None, blank=blank)
    assert {h.ids for h in found} == set(total)
    for hypothesis in found:
        assert hypothesis.log_prob == pytest.approx(math.log(total[hypothesis.ids]), abs=1e-4)
    assert [h.log_prob for h in found] == sorted((h.log_prob for h in found), reverse=True)


@given(problems(6, 6), st.integers(1, 4), st.integers(1, 4))
def test_a_narrow_beam_never_claims_more_than_there_is(problem, beam_size, symbols_per_row):
    log_probs, blank = problem
    total, _ = by_definition(log_probs, blank)
    found = prefix_beam_search(log_probs, beam_size=beam_size, symbols_per_row=symbols_per_row, blank=blank)
    assert 1 <= len(found) <= beam_size
    assert len({h.ids for h in found}) == len(found)
    for hypothesis in found:
        assert hypothesis.log_prob <= math.log(total[hypothesis.ids]) + 1e-4


@given(problems())
def test_the_alignment_is_the_best_path_that_spells_the_text(problem):
    log_probs, blank = problem
    _, best = by_definition(log_probs, blank)
    for text, score in best.items():
        for scores in (log_probs, mx.array(log_probs)):
            tokens = align(scores, text, blank=blank)
            assert tuple(t.id for t in tokens) == text
            assert all(t.start < t.end for t in tokens)
            assert all(a.end <= b.start - (a.id == b.id) for a, b in itertools.pairwise(tokens))
            assert spans_score(tokens, log_probs, blank) == pytest.approx(score, abs=1e-4)


@given(problems(40, 9))
def test_greedy_is_the_best_path_and_its_own_alignment(problem):
    log_probs, blank = problem
    tokens, log_prob = greedy(log_probs, blank=blank)
    path = log_probs.argmax(axis=1).tolist()
    assert tuple(t.id for t in tokens) == spelled(path, blank)
    assert log_prob == pytest.approx(log_probs.max(axis=1).sum(), rel=1e-5)
    assert spans_score(tokens, log_probs, blank) == pytest.approx(log_prob, rel=1e-5)
    assert align(log_probs, [t.id for t in tokens], blank=blank) == tokens
    assert greedy(mx.array(log_probs), blank=blank) == (tokens, pytest.approx(log_prob))


@given(problems(30, 9))
def test_every_searched_text_can_be_aligned(problem):
    log_probs, blank = problem
    for hypothesis in prefix_beam_search(log_probs, beam_size=4, blank=blank):
        assert tuple(t.id for t in align(log_probs, hypothesis.ids, blank=blank)) == hypothesis.ids


def test_the_beam_prefers_many_paths_to_the_best_one():
    # Blank leads on both rows, but "a" has three paths: 0.36 for nothing against 0.64.
    log_probs = np.log(np.array([[0.6, 0.4], [0.6, 0.4]], np.float32))
    assert greedy(log_probs)[0] == []
    best, other = prefix_beam_search(log_probs, beam_size=2)
    assert (best.ids, other.ids) == ((1,), ())
    assert math.exp(best.log_prob) == pytest.approx(0.64)


def test_a_doubled_symbol_needs_a_blank_between():
    sure = np.log(np.full((3, 3), 1e-4, np.float32))
    sure[np.arange(3), [1, 0, 1]] = 0.0
    assert greedy(sure)[0] == [CtcToken(1, 0, 1), CtcToken(1, 2, 3)]
    assert prefix_beam_search(sure)[0].ids == (1, 1)
    assert align(sure, [1, 1]) == [CtcToken(1, 0, 1), CtcToken(1, 2, 3)]
    with pytest.raises(ValueError, match="must fit in 2 rows but needs 3"):
        align(sure[:2], [1, 1])


def test_collapse_keeps_the_rows():
    path = [0, 3, 3, 0, 3, 1, 1, 2, 0, 2]
    spans = [(t.id, t.start, t.end) for t in collapse(path)]
    assert spans == [(3, 1, 3), (3, 4, 5), (1, 5, 7), (2, 7, 8), (2, 9, 10)]
    assert collapse([]) == [] == collapse([0, 0])
    assert collapse([0, 0, 2], blank=2) == [CtcToken(0, 0, 2)]


def test_banned_symbols_never_appear_and_leave_the_others_alone():
    logits = mx.random.normal((50, 5), key=mx.random.key(1))
    free, banned = np.array(ctc_log_probs(logits)), np.array(ctc_log_probs(logits, [1, 3]))
    assert np.isneginf(banned[:, [1, 3]]).all()
    np.testing.assert_array_equal(banned[:, [0, 2, 4]], free[:, [0, 2, 4]])
    np.testing.assert_allclose(np.exp(free).sum(axis=1), 1, rtol=1e-5)
    for ids in ([t.id for t in greedy(banned)[0]], prefix_beam_search(banned)[0].ids):
        assert not {1, 3} & set(ids)
    with pytest.raises(ValueError, match="probability 0"):
        align(banned, [1])


def test_nothing_is_decoded_from_no_rows():
    empty = np.zeros((0, 4), np.float32)
    assert greedy(empty) == ([], 0.0)
    assert [(h.ids, h.log_prob) for h in prefix_beam_search(empty)] == [((), 0.0)]
    assert align(empty, []) == []


@given(st.integers(1, 300), st.data())
def test_times_are_in_order_and_inside_the_recording(rows, data):
    borders = sorted(data.draw(st.sets(st.integers(0, rows), min_size=2, max_size=9)))
    times = [row_times_ms(CtcToken(1, a, b)) for a, b in itertools.pairwise(borders)]
    flat = [t for pair in times for t in pair]
    assert flat == sorted(flat)
    assert flat[0] >= 0
    assert flat[-1] <= rows * 60 - 30
    assert all(b > a for a, b in times)


def test_times_lead_their_rows_by_half():
    assert row_times_ms(CtcToken(1, 0, 2)) == (0, 90)
    assert row_times_ms(CtcToken(1, 4, 5)) == (210, 270)
    assert row_times_ms(CtcToken(1, 9, 10)) == (510, 570)


@given(st.floats(-800, 0), st.floats(-800, 0))
def test_log_add(a, b):
    assert log_add(a, b) == pytest.approx(float(np.logaddexp(a, b)), rel=1e-12)
    assert log_add(a, -math.inf) == a == log_add(-math.inf, a)


def test_log_add_of_nothing():
    assert log_add(-math.inf, -math.inf) == -math.inf


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda p: greedy(p[0]), r"\[greedy\] log_probs must have the shape"),
        (lambda p: greedy(p, blank=3), r"\[greedy\] blank must lie in 0\.\.2 but got 3"),
        (lambda p: prefix_beam_search(p, beam_size=0), "at least 1 but got 0 and 20"),
        (lambda p: prefix_beam_search(p, symbols_per_row=0), "at least 1 but got 10 and 0"),
        (lambda p: prefix_beam_search(p * np.nan), "must be numbers but got NaN"),
        (lambda p: align(p, [0]), "without the blank 0"),
        (lambda p: align(p, [3]), r"ids must lie in 0\.\.2"),
        (lambda p: align(p, [1, 2, 1]), "must fit in 2 rows but needs 3"),
    ],
)
def test_what_makes_no_sense_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call(np.zeros((2, 3), np.float32))
