"""Text: cleaned in pieces as in one go, joined with spaces only where a script has them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.text import CleanStream, clean_text, join_segments

FRAGMENTS = st.sampled_from(
    ["<think>", "</think>", "<thi", "nk>", "\n", " ", "a", "<", "你好", "<think>\n\n</think>\n\n"]
)
PIECES = st.lists(FRAGMENTS | st.text(max_size=5), max_size=10)


@given(PIECES)
def test_pieces_join_to_the_cleaned_whole(pieces):
    stream = CleanStream()
    given_out = [*(stream.push(piece) for piece in pieces), stream.flush()]
    assert "".join(given_out) == clean_text("".join(pieces))


@given(PIECES)
def test_cleaning_twice_changes_nothing(pieces):
    once = clean_text("".join(pieces))
    assert clean_text(once) == once


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (" hello \n", "hello"),
        ("<think>\n\n</think>\n\n你好", "你好"),
        ("<think>hm</think> yes", "<think>hm</think> yes"),
        ("<think>\n", "<think>"),
        ("a <think></think> b", "a <think></think> b"),
    ],
)
def test_only_empty_think_blocks_in_front_go(raw, clean):
    assert clean_text(raw) == clean


@pytest.mark.parametrize(
    ("texts", "joined"),
    [
        (["one two", "three"], "one two three"),
        (["你好", "世界"], "你好世界"),
        (["你好。", "OK", "fine"], "你好。OK fine"),
        (["", "a", "", "b"], "a b"),
        (["안녕", "세계"], "안녕 세계"),
        ([], ""),
    ],
)
def test_segments_join_as_their_script_wants(texts, joined):
    assert join_segments(texts) == joined
