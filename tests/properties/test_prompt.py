"""Prompts: every row kept, in order; profiles by name; nothing lost in spelling."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.errors import PromptError
from qwen4b_asr.prompt import PROFILES, PromptConfig, chat_prompt, prompt_pieces, spell, splice

TOKENS = st.lists(st.integers(0, 19), max_size=6)


@given(TOKENS, st.integers(0, 9), TOKENS)
def test_every_row_is_kept_in_order(before, audio_rows, after):
    table = mx.arange(20 * 3, dtype=mx.float32).reshape(20, 3)
    audio = -1.0 - mx.arange(audio_rows * 3, dtype=mx.float32).reshape(audio_rows, 3)
    rows = splice(before, audio, after, lambda ids: table[ids])
    wanted = [*np.array(table)[before], *np.array(audio), *np.array(table)[after]]
    assert rows.shape == (len(wanted), 3)
    assert np.array_equal(np.array(rows), np.array(wanted).reshape(-1, 3))


def test_audio_rows_take_the_dtype_of_the_text():
    table = mx.zeros((4, 3), dtype=mx.bfloat16)
    assert splice([1], mx.zeros((2, 3)), [], lambda ids: table[ids]).dtype == mx.bfloat16
    assert splice([], mx.zeros((2, 3)), [], lambda ids: table[ids]).dtype == mx.float32


def test_misshapen_audio_is_refused():
    with pytest.raises(ValueError, match=r"audio_embeddings must have shape \(A, H\)"):
        splice([], mx.zeros((1, 2, 3)), [], lambda ids: ids)


def test_the_four_profiles():
    config = PromptConfig()
    assert prompt_pieces(config) == ("这是一段中文语音，请转录：", "")
    assert prompt_pieces(config, "raw") == ("", "")
    assert prompt_pieces(config, "instruct") == ("语音转写成中文：", "只输出转写文字，不要分析或解释：")
    assert prompt_pieces(config, "instruct", "translate") == (
        "Translate the speech to English:",
        "<think>\n\n</think>\n\n",
    )
    before, after = prompt_pieces(config, "chatml")
    assert before == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n语音转写成中文：")
    assert after == "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_the_chat_template():
    assert chat_prompt("Hi") == ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("profile", "task", "message"),
    [
        ("poem", "transcribe", "unknown prompt profile 'poem'; choose one of plain, raw, instruct, chatml"),
        ("chatml", "transcribe", "this model has no prompt profile 'chatml'; choose one of plain, raw, instruct"),
        ("plain", "translate", "prompt profile 'plain' cannot translate; use instruct"),
        ("plain", "sing", "unknown task 'sing'"),
    ],
)
def test_what_does_not_fit_is_refused(profile, task, message):
    with pytest.raises(PromptError, match=message):
        prompt_pieces(PromptConfig(profiles=("plain", "raw", "instruct")), profile, task)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profile": "poem"}, "profile must be one of"),
        ({"profile": "raw", "profiles": ("plain",)}, "profile must be among"),
        ({"query_frames": "some"}, "query_frames must be keep or drop"),
    ],
)
def test_bad_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PromptConfig(**change)


def test_every_profile_can_transcribe():
    assert all("transcribe" in profile.forms for profile in PROFILES.values())


def test_spelling_must_be_exact():
    assert spell(lambda text: [ord(c) for c in text], lambda ids: "".join(map(chr, ids)), "abc") == [97, 98, 99]
    with pytest.raises(PromptError, match="vocabulary cannot spell 'abc'"):
        spell(lambda text: [1], lambda ids: "ab", "abc")
