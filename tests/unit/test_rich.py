"""Tags of rich transcriptions: fields, words, and signs."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.rich import TAG, RichText, emoji_text, parse_rich


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("", RichText("")),
        ("no tags", RichText("no tags")),
        ("<|zh|><|SAD|><|Speech|><|withitn|>今天。", RichText("今天。", "zh", "sad", ("speech",), True)),
        ("<|yue|><|EMO_UNKNOWN|><|BGM|><|woitn|>", RichText("", "yue", None, ("bgm",), False)),
        ("<|nospeech|><|EMO_UNKNOWN|><|Event_UNK|><|woitn|>", RichText("", "nospeech", None, (), False)),
        ("<|nospeech|><|Event_UNK|>", RichText("", "nospeech")),
        ("<|de|><|SURPRISED|><|Cough|>ja", RichText("ja", "de", "surprised", ("cough",))),
        ("<|SPECIAL_TOKEN_7|>a<|Speech_Noise|>b", RichText("ab", None, None, ("speech_noise",))),
        ("<|en|><|Speech|> one <|en|><|BGM|> two", RichText("one two", "en", None, ("speech", "bgm"))),
        ("<|zh|>一<|zh|>二<|en|>ok", RichText("一二ok", "zh")),
        ("<|Cry|><|BGM|><|Cry|>", RichText("", events=("cry", "bgm"))),
        ("<|en|>The.", RichText("", "en")),
        ("a < b <| c |> <|d", RichText("a < b  <|d")),
    ],
)
def test_fields(raw, wanted):
    assert parse_rich(raw) == wanted


@pytest.mark.parametrize(
    ("tags", "emotion"),
    [
        ("", None),
        ("<|EMO_UNKNOWN|>", None),
        ("<|HAPPY|><|NEUTRAL|>", "neutral"),
        ("<|HAPPY|><|NEUTRAL|><|HAPPY|>", "happy"),
        ("<|ANGRY|><|SAD|>", "sad"),
        ("<|DISGUSTED|><|DISGUSTED|><|FEARFUL|>", "disgusted"),
    ],
)
def test_the_most_frequent_emotion_counts(tags, emotion):
    assert parse_rich(tags).emotion == emotion


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("<|zh|><|HAPPY|><|Speech|><|woitn|>好", "好😊"),
        ("<|en|><|ANGRY|><|BGM|><|Laughter|> go ", "😀🎼go😡"),
        ("<|nospeech|><|Event_UNK|>", "❓"),
        ("<|zh|><|HAPPY|><|BGM|>一<|zh|><|HAPPY|><|BGM|>二", "🎼一二😊"),
        ("<|BGM|>零<|zh|><|BGM|>一<|zh|><|BGM|>二<|zh|><|SAD|>三<|zh|><|SAD|>四", "🎼零🎼一二三四😔"),
    ],
)
def test_signs(raw, wanted):
    assert emoji_text(raw) == wanted


@given(st.lists(st.sampled_from(["<|zh|>", "<|en|>", "<|HAPPY|>", "<|BGM|>", "<|x|>", "<|", "|>", "a", " ", "好"])))
def test_no_tag_is_left_and_no_word_is_lost(parts):
    raw = "".join(parts)
    text = parse_rich(raw).text
    assert text == text.strip()
    assert text.replace(" ", "") == re.sub(TAG, "", raw).replace(" ", "")
