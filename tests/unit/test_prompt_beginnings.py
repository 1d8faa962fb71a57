"""The text that a prompt begins with: found for every prompt, computed once by the transcriber."""

import mlx.core as mx
import numpy as np
import pytest

from qwen4b_asr.decoder import Qwen3
from qwen4b_asr.nano_prompt import NanoPromptConfig
from qwen4b_asr.prompt import SPEECH_PROFILES, PromptConfig
from qwen4b_asr.prompt_rows import leading_ids, prompt_rows
from qwen4b_asr.tokenizer import Tokenizer
from qwen4b_asr.transcribe import Transcriber
from qwen4b_asr.transcript import TranscribeOptions, Turn
from tests.helpers.tiny import CONFIG, rows, save_tiny, tiny_model

CASES = [(PromptConfig(), TranscribeOptions(prompt_profile=name)) for name in SPEECH_PROFILES]
CASES += [
    (NanoPromptConfig(), TranscribeOptions()),
    (NanoPromptConfig(empty_think=True), TranscribeOptions(language="zh", use_itn=False)),
    (NanoPromptConfig(), TranscribeOptions(hotwords=("one", "two"))),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(save_tiny(tmp_path_factory.mktemp("tiny")) / "tokenizer.json")


@pytest.mark.parametrize(("config", "options"), CASES)
def test_prompts_begin_with_it_and_the_audio_follows(tokenizer, config, options):
    decoder, audio = tiny_model().decoder, rows(5, CONFIG.decoder.hidden_size)
    ids = leading_ids(config, options, spell=tokenizer.encode)
    whole = prompt_rows(config, options, audio, spell=tokenizer.encode, embed=decoder.embed)
    assert np.array_equal(np.array(whole[len(ids) : len(ids) + 5]), np.array(audio))
    if ids:
        assert np.array_equal(np.array(whole[: len(ids)]), np.array(decoder.embed(mx.array(ids))))
    assert bool(ids) == (options.prompt_profile != "raw")


def test_after_earlier_turns_there_is_none(tokenizer):
    options = TranscribeOptions(history=(Turn(np.zeros(1600, dtype=np.float32), "text"),))
    assert leading_ids(NanoPromptConfig(), options, spell=tokenizer.encode) == []


def test_the_transcriber_computes_it_once(tokenizer, monkeypatch):
    transcriber = Transcriber(tiny_model(), CONFIG, tokenizer)
    seen = []
    original = Qwen3.hidden
    monkeypatch.setattr(Qwen3, "hidden", lambda self, x, *rest: (seen.append(x.shape[1]), original(self, x, *rest))[1])
    length = len(leading_ids(CONFIG.prompt, TranscribeOptions(), spell=tokenizer.encode))
    samples = np.random.default_rng(0).normal(size=16000).astype(np.float32) * 0.1
    first = transcriber.transcribe(samples, max_tokens=5, draft=False)
    assert [count for count in seen if count > 1] == [length, seen[1]]
    seen.clear()
    assert transcriber.transcribe(samples, max_tokens=5, draft=False).tokens == first.tokens
    assert [count for count in seen if count > 1] == [seen[0]]
    seen.clear()
    transcriber.transcribe(samples, max_tokens=5, draft=False, prompt_profile="instruct")
    assert len([count for count in seen if count > 1]) == 2
