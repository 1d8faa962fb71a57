"""Clean-up takes off what it says and nothing else; JSON lines can be read back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.text import FORMATS, JSON_KEYS, clean_text, format_transcript, one_line

TRANSCRIPT = {
    "model": "demo",
    "text": '你好, "world"',
    "tokens": [1, 2, 3],
    "language": None,
    "duration_seconds": 1.25,
    "segments": [{"start": 0.0, "end": 1.25, "text": "你好"}],
    "timings": {"encoder": 0.01},
    "finish_reason": "stop",
}


@pytest.mark.parametrize(
    ("raw", "want"),
    [
        ("", ""),
        ("  one two\n", "one two"),
        ("\u3000你好\u3000", "你好"),
        ("<think>\n\n</think>\n\none", "one"),
        (" <think></think>one", "one"),
        ("<think></think>", ""),
        ("<think>hm</think>one", "<think>hm</think>one"),
        ("one <think></think> two", "one <think></think> two"),
        ("<think></think> <think>\n</think>one", "one"),
        ("</think>one", "</think>one"),
        ("one  two\n\nthree", "one  two\n\nthree"),
        ("<|im_end|>", "<|im_end|>"),
    ],
)
def test_clean(raw, want):
    assert clean_text(raw) == want


@given(st.text())
def test_clean_of_ordinary_text_is_strip(text):
    if "<think>" not in text:
        assert clean_text(text) == text.strip()


@given(st.text())
def test_one_line_is_one_line_of_the_same_words(text):
    line = one_line(text)
    assert len(line.splitlines()) <= 1
    assert line.split() == text.split()


def test_txt_is_the_text_and_a_line_break():
    assert format_transcript(TRANSCRIPT, "txt") == '你好, "world"\n'


def test_json_is_one_readable_line_in_the_given_order():
    line = format_transcript({"file": "a.wav", **TRANSCRIPT}, "json")
    assert line.endswith("}\n")
    assert line.count("\n") == 1
    assert "你好" in line
    parsed = json.loads(line)
    assert parsed == {"file": "a.wav", **TRANSCRIPT}
    assert tuple(parsed) == ("file", *TRANSCRIPT)


@given(st.text())
def test_json_holds_any_text_on_one_line(text):
    line = format_transcript({**TRANSCRIPT, "text": text}, "json")
    assert len(line.splitlines()) == 1
    assert json.loads(line)["text"] == text


@pytest.mark.parametrize("key", JSON_KEYS)
def test_json_wants_every_key(key):
    with pytest.raises(ValueError, match=f"no {key}$"):
        format_transcript({k: v for k, v in TRANSCRIPT.items() if k != key}, "json")


def test_json_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="not JSON compliant"):
        format_transcript({**TRANSCRIPT, "duration_seconds": float("nan")}, "json")


def test_unknown_formats_are_refused():
    with pytest.raises(ValueError, match="txt, json but got 'srt'"):
        format_transcript(TRANSCRIPT, "srt")
    for name in FORMATS:
        assert format_transcript(TRANSCRIPT, name)
