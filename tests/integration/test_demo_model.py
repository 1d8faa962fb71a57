"""The checkpoint in the box: it is small, whole, and hears its own sample."""

import numpy as np
import pytest
import soundfile

import qwen4b_asr
from qwen4b_asr.errors import PromptError
from qwen4b_asr.training.evaluate import ctc_words, words_of
from qwen4b_asr.training.vocabulary import ctc_symbols, tokenizer_json
from qwen4b_asr.weights.paths import weights_data
from qwen4b_asr.weights.verify import verify

DEMO = weights_data() / "demo"
TEXT = "three one four one five"


@pytest.fixture(scope="module")
def demo():
    return qwen4b_asr.load("demo")


def test_it_fits_into_eight_megabytes():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= 8_000_000


def test_every_file_is_as_it_was_written():
    report = verify(DEMO)
    assert report.problems == ()
    assert {p.name for p in DEMO.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}


def test_it_hears_the_sample(demo):
    pieces = []
    transcript = demo.transcribe(DEMO / "sample.wav", on_token=pieces.append)
    assert transcript.text == TEXT
    assert "".join(pieces) == TEXT
    assert transcript.finish_reason == "stop"
    assert transcript.duration_seconds == pytest.approx(soundfile.info(DEMO / "sample.wav").duration, abs=0.01)


def test_its_ctc_head_hears_the_sample_too(demo):
    samples, rate = soundfile.read(DEMO / "sample.wav", dtype="float32")
    assert rate == 16000
    assert ctc_words(demo, samples) == words_of(TEXT)


@pytest.mark.parametrize("gain", [0.1, 0.5, 1.0])
def test_loudness_does_not_matter(demo, gain):
    samples, _ = soundfile.read(DEMO / "sample.wav", dtype="float32")
    assert demo.transcribe_samples(gain * samples).text == TEXT


def test_silence_around_it_does_not_matter(demo):
    samples, _ = soundfile.read(DEMO / "sample.wav", dtype="float32")
    padded = np.concatenate([np.zeros(5000, np.float32), samples, np.zeros(7000, np.float32)])
    assert demo.transcribe_samples(padded).text == TEXT


def test_the_language_may_be_named(demo):
    assert demo.transcribe(DEMO / "sample.wav", language="en").text == TEXT


@pytest.mark.parametrize("language", ["auto", "zh"])
def test_it_hears_the_mandarin_sample(demo, language):
    assert demo.transcribe(DEMO / "sample_zh.wav", language=language).text == "一一千万"


def test_files_are_those_that_training_writes(demo):
    assert (DEMO / "tokenizer.json").read_text(encoding="utf-8") == tokenizer_json()
    assert demo.config.ctc_symbols == tuple(ctc_symbols())
    assert demo.config.prompt.profile == "raw"
    assert demo.config.generation.repetition_penalty == 1.0
    assert demo.config.generation.no_repeat_ngram == 0


def test_it_says_that_it_cannot_translate_before_it_listens(demo):
    heard = []
    with pytest.raises(PromptError, match="this model cannot translate"):
        demo.transcribe(DEMO / "sample.wav", translate=True, on_token=heard.append)
    assert heard == []
    with pytest.raises(PromptError, match="this model cannot translate"):
        demo.translate_text("three")
