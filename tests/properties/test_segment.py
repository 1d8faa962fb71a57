"""Long recordings: windows cover them without gaps, are never too long, and are cut in silence where there is any."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.segment import split_at_pauses

RATE = 100  # the rule knows seconds only; a low rate keeps the examples small


@given(st.integers(0, 60 * RATE), st.floats(3, 20), st.integers(0, 99))
def test_windows_cover_the_recording(samples, max_seconds, seed):
    x = np.random.default_rng(seed).normal(size=samples).astype(np.float32)
    windows = split_at_pauses(x, RATE, max_seconds)
    assert windows[0][0] == 0
    assert windows[-1][1] == samples
    assert all(a[1] == b[0] for a, b in itertools.pairwise(windows))
    assert all(end - start <= max_seconds * RATE for start, end in windows)
    if len(windows) > 1:
        assert all(end - start >= RATE for start, end in windows)


@given(st.integers(210, 290))
def test_the_cut_falls_into_the_pause(pause):
    x = np.ones(5 * RATE, dtype=np.float32)
    x[pause - 15 : pause + 15] = 0
    ((_, cut), _) = split_at_pauses(x, RATE, 3.2)
    assert pause - 15 <= cut <= pause + 15


def test_what_fits_is_left_whole():
    assert split_at_pauses(np.zeros(30 * RATE, np.float32), RATE) == [(0, 30 * RATE)]
    assert len(split_at_pauses(np.zeros(30 * RATE + 1, np.float32), RATE)) == 2


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="max_seconds must be at least 3"):
        split_at_pauses(np.zeros(10, np.float32), RATE, 2.9)
    with pytest.raises(ValueError, match=r"samples must have shape \(N,\)"):
        split_at_pauses(np.zeros((10, 2), np.float32), RATE)
