"""Fun-ASR-Nano's prompt: its texts to the letter, what is refused, and every audio row in its place."""

import re

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.errors import PromptError
from qwen4b_asr.nano_prompt import (
    LANGUAGES,
    MLT_NANO_LANGUAGES,
    NANO_LANGUAGES,
    NanoPromptConfig,
    NanoTextStream,
    NanoTurn,
    instruction,
    nano_prompt,
    nano_rows,
    nano_text,
)

NANO = NanoPromptConfig()
MLT = NanoPromptConfig(languages=MLT_NANO_LANGUAGES)
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
END = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "语音转写："),
        ({"language": "zh"}, "语音转写成中文："),
        ({"language": "英文"}, "语音转写成英文："),
        ({"use_itn": False}, "语音转写，不进行文本规整："),
        ({"language": "ja", "use_itn": False}, "语音转写成日文，不进行文本规整："),
        (
            {"hotwords": ["开放时间", " Qwen 3 "]},
            "请结合上下文信息，更加准确地完成语音转写任务。如果没有相关信息，我们会留空。\n\n\n**上下文信息：**\n\n\n"
            "热词列表：[开放时间, Qwen 3]\n语音转写：",
        ),
    ],
)
def test_instructions(options, text):
    assert instruction(NANO, **options) == text


def test_mlt_nano_knows_31_languages_and_nano_three():
    assert len(MLT_NANO_LANGUAGES) == len(set(LANGUAGES.values())) == 31
    assert set(NANO_LANGUAGES) < set(MLT_NANO_LANGUAGES)
    for code, name in LANGUAGES.items():
        assert instruction(MLT, language=code) == instruction(MLT, language=name) == f"语音转写成{name}："


def test_an_unknown_language_is_refused_and_the_model_that_knows_it_named():
    with pytest.raises(PromptError, match=r"'ko'; Fun-ASR-MLT-Nano does; choose one of auto, zh, en, ja"):
        instruction(NANO, language="ko")
    with pytest.raises(PromptError, match=r"'klingon'; choose one of auto, zh") as caught:
        instruction(MLT, language="klingon")
    assert "MLT-Nano does" not in str(caught.value)


@pytest.mark.parametrize("word", ["", " ", "a\nb", "x<|im_end|>"])
def test_a_hot_word_that_would_break_the_prompt_is_refused(word):
    with pytest.raises(PromptError, match="hot word"):
        instruction(NANO, hotwords=["good", word])


def test_pieces_of_one_turn():
    assert nano_prompt(NANO, "语音转写：") == [f"{SYSTEM}语音转写：", None, END]


def test_pieces_with_history_stay_apart():
    history = [NanoTurn("一", mx.zeros((2, 3)), "A："), NanoTurn("二", None, "B")]
    assert nano_prompt(NANO, "C：", history=history, prefix="三") == [
        f"{SYSTEM}A：",
        None,
        END,
        "一<|im_end|>",
        f"<|im_start|>user\nB{END}",
        "二<|im_end|>",
        "<|im_start|>user\nC：",
        None,
        f"{END}三",
    ]


def test_an_empty_thought_goes_before_every_answer():
    config = NanoPromptConfig(empty_think=True)
    pieces = nano_prompt(config, "C：", history=[NanoTurn("一", mx.zeros((2, 3)))], prefix="x")
    thought = "<think>\n\n</think>\n\n"
    assert [piece for piece in pieces if piece and thought in piece] == [END + thought, END + thought + "x"]


@pytest.mark.parametrize("where", ["request", "prefix", "answer", "instruction"])
def test_chat_tokens_in_a_text_are_refused(where):
    texts = dict.fromkeys(("request", "prefix", "answer", "instruction"), "a") | {where: "a<|im_end|>"}
    with pytest.raises(PromptError, match="chat tokens"):
        nano_prompt(
            NANO,
            texts["request"],
            history=[NanoTurn(texts["answer"], None, texts["instruction"])],
            prefix=texts["prefix"],
        )


@given(st.lists(st.integers(0, 4), max_size=7), st.integers(1, 4), st.integers(1, 6))
def test_every_row_is_kept_in_order_and_the_oldest_turns_fall_out(counts, asked, most):
    config = NanoPromptConfig(max_turns=most)
    numbered = [mx.full((n, 1), 1000.0 + i) for i, n in enumerate(counts)]
    history = [NanoTurn(str(i), rows if rows.size else None) for i, rows in enumerate(numbered)]
    rows = nano_rows(
        config,
        "?",
        mx.full((asked, 1), 2000.0),
        spell=lambda text: [ord(c) % 256 for c in text],
        embed=lambda ids: ids[:, None].astype(mx.float32),
        history=history,
    )
    kept = list(range(len(counts)))[max(0, len(counts) - most + 1) :]
    heard = [value for value in np.array(rows[:, 0]).tolist() if value >= 1000]
    assert heard == [1000.0 + i for i in kept for _ in range(counts[i])] + [2000.0] * asked
    texts = [piece for piece in nano_prompt(config, "?", history=history) if piece is not None]
    assert rows.shape[0] == sum(map(len, texts)) + sum(counts[i] for i in kept) + asked
    assert sum("<|im_start|>system" in text for text in texts) == 1
    assert texts[0].startswith("<|im_start|>system")


def test_rows_take_the_texts_type():
    rows = nano_rows(
        NANO,
        "?",
        mx.ones((2, 3), mx.float32),
        spell=lambda text: [1, 2],
        embed=lambda ids: mx.zeros((ids.size, 3), mx.bfloat16),
    )
    assert rows.dtype == mx.bfloat16
    assert rows.shape == (6, 3)


def test_audio_rows_of_another_shape_are_refused():
    for bad in (mx.zeros((1, 2, 3)), mx.zeros(3)):
        with pytest.raises(ValueError, match=r"\[nano_rows\] audio embeddings must have shape \(A, H\)"):
            nano_rows(NANO, "?", bad, spell=lambda t: [1], embed=lambda ids: mx.zeros((1, 3)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "plain"}, "kind must be 'nano'"),
        ({"languages": ("xx",)}, "languages must be among .* but got 'xx'"),
        ({"max_turns": 0}, "max_turns must be at least 1"),
    ],
)
def test_bad_configurations_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        NanoPromptConfig(**values)


def test_lists_of_a_configuration_file_become_tuples():
    assert NanoPromptConfig(languages=["zh"]).languages == ("zh",)


@pytest.mark.parametrize(
    ("written", "text"), [("你好/sil吗", "你好 吗"), ("  a \n\n b ", "a b"), ("/sil", ""), ("", ""), ("完。", "完。")]
)
def test_the_mark_for_silence_goes(written, text):
    assert nano_text(written) == text


@given(st.lists(st.text(alphabet="/sil a\n\u3000吗", max_size=6), max_size=8))
def test_the_mark_for_silence_goes_from_pieces_too(pieces):
    stream = NanoTextStream()
    shown = [stream.push(piece) for piece in pieces]
    whole = re.sub(r"\s+", " ", "".join(pieces).replace("/sil", " ")).strip()
    assert "".join(shown) + stream.flush() == whole == nano_text("".join(pieces))


def test_what_is_certain_is_shown_at_once():
    stream = NanoTextStream()
    assert [stream.push(piece) for piece in (" 你", "好 ", "/s", "il", "吗/", "s。")] == [
        "你",
        "好",
        "",
        "",
        " 吗",
        "/s。",
    ]
