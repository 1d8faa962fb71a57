"""The transcriber: every stage in order, options that are checked, results that say what happened."""

import io

import mlx.core as mx
import numpy as np
import pytest
import soundfile

import qwen4b_asr
from qwen4b_asr.errors import AudioError, ModelNotFoundError, PromptError
from qwen4b_asr.generate import Generation, GenerationOptions
from qwen4b_asr.prompt import splice
from qwen4b_asr.sampling import SamplingOptions
from qwen4b_asr.text import clean_text
from tests.helpers.tiny import CONFIG, save_tiny, tiny_model


@pytest.fixture(scope="module")
def transcriber(tmp_path_factory):
    return qwen4b_asr.load(save_tiny(tmp_path_factory.mktemp("tiny")))


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=int(seconds * 16000)) * 0.1).astype(np.float32)


def by_hand(samples: np.ndarray, profile_ids: tuple[list[int], list[int]], max_tokens: int, **query) -> list[int]:
    """Call the stages one by one, as the picture in the README has them."""
    model = tiny_model()
    states, mask = model.audio_encoder(model.frontend(mx.array(samples))[None], **query)
    rows = splice(profile_ids[0], model.adaptor(states, mask)[0], profile_ids[1], model.decoder.embed)
    sampling = SamplingOptions(repetition_penalty=1.2, no_repeat_ngram=4)
    return list(Generation(model.decoder, rows, GenerationOptions(max_tokens, (258, 256), sampling)))


@pytest.mark.parametrize(
    ("profile", "before", "after"),
    [
        ("plain", "这是一段中文语音，请转录：", ""),
        ("raw", "", ""),
        ("instruct", "语音转写成中文：", "只输出转写文字，不要分析或解释："),
    ],
)
def test_the_stages_run_in_order(transcriber, profile, before, after):
    samples = noise(1.3)
    ids = tuple(transcriber.tokenizer.encode(text) for text in (before, after))
    transcript = transcriber.transcribe(samples, prompt_profile=profile, max_tokens=9, language="zh", use_itn=True)
    assert list(transcript.tokens) == by_hand(samples, ids, 9, language="zh", use_itn=True)
    assert transcript.text == clean_text(transcriber.tokenizer.decode(transcript.tokens))
    assert transcript.language == "zh"


def test_the_transcript_says_what_happened(transcriber):
    transcript = transcriber.transcribe(noise(2.0), max_tokens=3)
    assert transcript.duration_seconds == 2.0
    assert transcript.finish_reason == "length"
    assert transcript.model == "tiny"
    assert transcript.language is None
    assert [(s.start, s.end, s.text) for s in transcript.segments] == [(0.0, 2.0, transcript.text)]
    stages = {"audio", "features", "encoder", "adaptor", "prefill", "decode", "total"}
    assert set(transcript.timings) == stages
    assert transcript.timings["total"] >= sum(transcript.timings[s] for s in stages - {"total"}) * 0.5
    assert transcript.to_dict()["tokens"] == list(transcript.tokens)


def test_the_budget_grows_with_the_recording(transcriber):
    budget = CONFIG.generation.token_budget
    for seconds in (1.0, 3.0):
        transcript = transcriber.transcribe(noise(seconds))
        if transcript.finish_reason == "length":
            assert len(transcript.tokens) == budget(seconds)
        else:
            assert len(transcript.tokens) < budget(seconds)


def test_files_arrays_and_file_objects_give_the_same(transcriber, tmp_path):
    samples = noise(1.0, 4)
    path = tmp_path / "talk.wav"
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    wanted = transcriber.transcribe(samples, max_tokens=6).tokens
    sources = [path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), mx.array(samples)]
    assert {transcriber.transcribe(source, max_tokens=6).tokens for source in sources} == {wanted}
    assert transcriber.transcribe_samples(samples, 16000, max_tokens=6).tokens == wanted


@pytest.mark.parametrize("seconds", [1.0, 8.0])
def test_streamed_pieces_join_to_the_text(transcriber, seconds):
    pieces: list[str] = []
    transcript = transcriber.transcribe(noise(seconds), max_tokens=20, segment_seconds=3.0, on_token=pieces.append)
    assert "".join(pieces) == transcript.text
    assert all(pieces)


def test_long_recordings_are_cut_and_covered(transcriber):
    transcript = transcriber.transcribe(noise(10.0), max_tokens=4, segment_seconds=4.0)
    assert len(transcript.segments) >= 3
    assert transcript.segments[0].start == 0
    assert transcript.segments[-1].end == 10.0
    for a, b in zip(transcript.segments, transcript.segments[1:], strict=False):
        assert a.end == b.start
    assert len(transcript.tokens) <= 4 * len(transcript.segments)


def test_encode_audio_gives_decoder_rows(transcriber):
    rows = transcriber.encode_audio(noise(1.0), 16000)
    assert rows.shape == (1, 17 + 4, CONFIG.decoder.hidden_size)
    transcriber_rows = transcriber.encode_audio(noise(1.0), 16000, language="en")
    assert float(mx.max(mx.abs(rows - transcriber_rows))) > 0


def test_text_in_text_out(transcriber):
    assert transcriber.generate_text("abc", 5) == transcriber.generate_text("abc", 5)
    chat = "<|im_start|>user\nabc<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert transcriber.complete("abc", 5) == transcriber.generate_text(chat, 5)
    assert transcriber.complete("abc", 8, temperature=5.0) != transcriber.complete("abc", 8)
    assert transcriber.translate_text("abc") == transcriber.complete("Translate to English: abc", 64 + 4 * 3)
    with pytest.raises(PromptError, match="empty"):
        transcriber.generate_text("")


def test_a_translation_is_added_on_request(transcriber):
    transcript = transcriber.transcribe(noise(1.0), max_tokens=3, translate=True)
    assert transcript.translation == transcriber.translate_text(transcript.text)
    assert "translation" in transcript.timings
    assert transcriber.transcribe(noise(1.0), max_tokens=3).translation is None


def test_an_unknown_option_is_an_error(transcriber):
    with pytest.raises(TypeError, match=r"options must be among language, .* but got langauge"):
        transcriber.transcribe(noise(1.0), langauge="zh")
    with pytest.raises(PromptError, match="unknown language 'fr'"):
        transcriber.transcribe(noise(1.0), language="fr")
    with pytest.raises(PromptError, match="unknown prompt profile"):
        transcriber.transcribe(noise(1.0), prompt_profile="poem")
    with pytest.raises(PromptError, match="'plain' cannot translate; use instruct or chatml"):
        transcriber.transcribe(noise(1.0), task="translate")
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        transcriber.transcribe(noise(1.0), max_tokens=0)


def test_bad_recordings_give_no_text(transcriber, tmp_path):
    (tmp_path / "x.wav").write_bytes(b"not audio")
    for source in (tmp_path / "x.wav", tmp_path / "none.wav", np.zeros(399, np.float32), np.full(16000, np.nan)):
        with pytest.raises(AudioError):
            transcriber.transcribe(source)


def test_a_model_that_is_not_there_is_explained(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no such model directory(.|\n)*--model demo(.|\n)*convert"):
        qwen4b_asr.load(tmp_path / "nothing")
