"""Many recordings at once: the transcripts of single runs, in order, whatever shares a batch; a bad one sinks none."""

import dataclasses
from functools import lru_cache

import mlx.core as mx
import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from qwen4b_asr.batch_audio import encode_together, similar_lengths
from qwen4b_asr.config import GenerationConfig, ModelConfig
from qwen4b_asr.errors import AudioError, BatchError, PromptError
from qwen4b_asr.fastconformer import FastConformerConfig
from qwen4b_asr.listen import Stopwatch
from qwen4b_asr.mel import MelConfig, MelFrontend
from qwen4b_asr.model import SpeechModel
from qwen4b_asr.nano_adaptor import NanoAdaptorConfig
from qwen4b_asr.nano_prompt import NanoPromptConfig
from qwen4b_asr.projection import ProjectionConfig
from qwen4b_asr.recognise import Recogniser
from qwen4b_asr.segment import split_at_pauses
from qwen4b_asr.tokenizer import Tokenizer
from qwen4b_asr.transcribe import Transcriber
from qwen4b_asr.transcript import Transcript
from tests.helpers.tiny import CONFIG, byte_tokenizer, max_abs, randomise

FAMILIES = {
    "4b": CONFIG,
    "nano": dataclasses.replace(
        CONFIG,
        encoder=dataclasses.replace(CONFIG.encoder, num_queries=0, vocab_size=0),
        adaptor=NanoAdaptorConfig(input_size=32, hidden_size=40, output_size=24, num_heads=4, ffn_size=6),
        prompt=NanoPromptConfig(),
    ),
    "canary": dataclasses.replace(
        CONFIG,
        frontend=MelConfig(num_mel_bins=16),
        encoder=FastConformerConfig(
            input_size=16, output_size=32, attention_heads=2, linear_units=48, num_blocks=2, kernel_size=5,
            subsampling_channels=4,
        ),
        adaptor=ProjectionConfig(input_size=32, output_size=24),
    ),
    "ctc": ModelConfig(
        name="symbols",
        frontend=CONFIG.frontend,
        encoder=CONFIG.encoder,
        adaptor=None,
        decoder=None,
        prompt=None,
        generation=GenerationConfig(),
        ctc_symbols=("", *" abcdefghi"),
    ),
}  # fmt: skip
SYMBOLS = FAMILIES["ctc"].ctc_symbols
WRITERS = [name for name in FAMILIES if name != "ctc"]


@lru_cache(maxsize=4)
def listener(family: str) -> Transcriber | Recogniser:
    config = FAMILIES[family]
    model = SpeechModel(config)
    randomise(model, 3)
    if isinstance(config.frontend, MelConfig):  # random triangles and variances would be negative
        model.frontend = MelFrontend(config.frontend)
        for layer in model.audio_encoder.layers:
            layer.conv.batch_norm.running_var = mx.abs(layer.conv.batch_norm.running_var) + 0.5
    assert bool(mx.all(mx.isfinite(model.audio_encoder(model.frontend(mx.array(noise(1.0, 0)))[None])[0])))
    if config.decoder is None:
        return Recogniser(model, config)
    return Transcriber(model, config, _tokenizer())


@lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        byte_tokenizer().save(str(path))
        return Tokenizer(path)


def noise(seconds: float, seed: int) -> np.ndarray:
    """Return noise whose loudness changes, so that windows are cut at different places."""
    rng = np.random.default_rng(seed)
    size = int(seconds * 16_000)
    loudness = np.repeat(rng.uniform(0.01, 0.3, size // 1600 + 1), 1600)[:size]
    return (rng.normal(size=size) * loudness).astype(np.float32)


def told(transcript: Transcript) -> dict:
    """Return what a transcript says, without how long it took."""
    values = transcript.to_dict()
    for name in ("timings", "decoder_passes", "drafted", "accepted"):
        values.pop(name, None)
    return values


durations = st.lists(st.floats(0.1, 9.0), min_size=1, max_size=6)


@pytest.mark.parametrize("family", list(FAMILIES))
@given(durations, st.integers(1, 4), st.integers(0, 99), st.booleans())
def test_a_batch_gives_the_transcripts_of_single_runs(family, seconds, batch_size, seed, itn):
    recordings = [noise(s, seed + i) for i, s in enumerate(seconds)]
    options = {"segment_seconds": 3.0, "use_itn": itn, "language": "en"}
    if family in WRITERS:
        options["max_tokens"] = 5
    model = listener(family)
    found = model.transcribe_batch(recordings, batch_size=batch_size, **options)
    assert [told(t) for t in found] == [told(model.transcribe(r, **options)) for r in recordings]


@pytest.mark.parametrize("keep", [None, True, False])
def test_rows_that_nano_keeps(keep):
    model = listener("nano")
    recordings = [noise(s, 7) for s in (1.0, 2.7, 2.5, 0.4)]
    options = {"low_frame_rate": keep, "max_tokens": 6, "history": ()}
    found = model.transcribe_batch(recordings, batch_size=3, **options)
    assert [told(t) for t in found] == [told(model.transcribe(r, **options)) for r in recordings]


@pytest.mark.parametrize("decoder", ["ctc", "ctc-beam"])
def test_the_ctc_head_of_a_model_with_a_language_model(decoder):
    writer = listener("4b")
    config = dataclasses.replace(CONFIG, ctc_symbols=SYMBOLS)
    model = Transcriber(writer.model, config, writer.tokenizer)
    recordings = [noise(s, 5) for s in (1.0, 4.0, 1.1)]
    found = model.transcribe_batch(recordings, batch_size=2, decoder=decoder, segment_seconds=3.0)
    single = [model.transcribe(r, decoder=decoder, segment_seconds=3.0) for r in recordings]
    assert [told(t) for t in found] == [told(t) for t in single]
    assert any(t.tokens for t in found)


def test_seeded_draws_are_those_of_single_runs():
    recordings = [noise(1.0 + i / 3, i) for i in range(4)]
    options = {"temperature": 0.7, "top_k": 20, "seed": 3, "max_tokens": 6}
    found = listener("4b").transcribe_batch(recordings, batch_size=3, **options)
    assert [told(t) for t in found] == [told(listener("4b").transcribe(r, **options)) for r in recordings]


# --- order, failures, memory -----------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["short", "long", "bad", "none"]), max_size=7), st.integers(1, 3))
def test_results_come_in_order_and_a_bad_file_sinks_no_other(tmp_path_factory, kinds, batch_size):
    folder = tmp_path_factory.mktemp("files")
    (folder / "bad.wav").write_bytes(b"not audio")
    for name, seconds in (("short", 0.5), ("long", 5.0)):
        soundfile.write(folder / f"{name}.wav", noise(seconds, 1), 16_000)
    handed: list[tuple[int, object]] = []
    options = {"batch_size": batch_size, "max_tokens": 2, "segment_seconds": 3.0}
    found = listener("4b").transcribe_batch(
        [folder / f"{kind}.wav" for kind in kinds],
        on_transcript=lambda number, result: handed.append((number, result)),
        errors="return",
        **options,
    )
    assert handed == list(enumerate(found))
    wanted = {"short": 0.5, "long": 5.0}
    for kind, result in zip(kinds, found, strict=True):
        if kind in wanted:
            assert result.duration_seconds == wanted[kind]
        else:
            assert isinstance(result, AudioError)
            assert f"{kind}.wav" in str(result)


def test_failures_are_raised_when_all_others_are_done():
    handed = []
    sources = [noise(0.5, 0), np.zeros(3, np.float32), noise(0.7, 1)]
    with pytest.raises(BatchError, match=r"1 of 3 recordings failed; the first: samples: lasts 0\.2 ms") as caught:
        listener("4b").transcribe_batch(sources, max_tokens=2, on_transcript=lambda *result: handed.append(result))
    assert [number for number, _ in handed] == [0, 1, 2]
    assert caught.value.results == [result for _, result in handed]
    assert [type(result) for result in caught.value.results] == [Transcript, AudioError, Transcript]


def test_recordings_are_read_a_few_batches_ahead():
    read = []
    done = []

    def sources():
        for i in range(60):
            read.append(i)
            yield noise(0.3, i)

    def on_transcript(number, _):
        done.append(number)
        assert len(read) <= number + 1 + 2 * 2 * 8  # two pools: what is decoded, and what the next slot is taken from

    listener("4b").transcribe_batch(sources(), batch_size=2, max_tokens=1, on_transcript=on_transcript)
    assert done == list(range(60))


def test_timings_are_shares_of_what_was_done_together():
    found = listener("4b").transcribe_batch([noise(1.0, 0), noise(4.0, 1)], max_tokens=3, segment_seconds=3.0)
    for transcript in found:
        stages = {"audio", "features", "encoder", "adaptor", "prefill", "decode"}
        assert set(transcript.timings) == {*stages, "total"}
        assert transcript.timings["total"] == pytest.approx(sum(transcript.timings[s] for s in stages))


def test_one_window_is_transcribed_as_it_always_was(monkeypatch):
    monkeypatch.setattr("qwen4b_asr.batch.BatchGeneration", None)
    found = listener("4b").transcribe_batch([noise(1.0, 0)], max_tokens=3)
    assert [told(t) for t in found] == [told(listener("4b").transcribe(noise(1.0, 0), max_tokens=3))]
    assert listener("4b").transcribe_batch([]) == []


def test_misuse_is_refused():
    model = listener("4b")
    with pytest.raises(ValueError, match="batch_size must be at least 1 but got 0"):
        model.transcribe_batch([], batch_size=0)
    with pytest.raises(ValueError, match="errors must be 'raise' or 'return' but got 'ignore'"):
        model.transcribe_batch([], errors="ignore")
    with pytest.raises(ValueError, match="batch_size must be 1 with a draft but got 2"):
        model.transcribe_batch([], batch_size=2, draft=True)
    with pytest.raises(TypeError, match="options must be among"):
        model.transcribe_batch([], langauge="zh")
    with pytest.raises(PromptError, match="unknown language 'xx'"):
        model.transcribe_batch([noise(1.0, 0)] * 2, language="xx")
    with pytest.raises(PromptError, match="has no hotwords"):
        listener("ctc").transcribe_batch([], hotwords=("a",))


# --- windows side by side --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(FAMILIES))
@given(st.lists(st.floats(0.05, 4.0), min_size=1, max_size=4), st.integers(0, 99))
def test_windows_are_encoded_as_they_are_alone(family, seconds, seed):
    model = listener(family)
    waveforms = [noise(s, seed + i) for i, s in enumerate(seconds)]
    audio = encode_together(model, waveforms, "zh", True, Stopwatch())
    for i, waveform in enumerate(waveforms):
        alone = model.audio_states(waveform, "zh", True, Stopwatch())[0]
        assert bool(mx.all(mx.isfinite(alone)))
        assert audio.rows[i] == alone.shape[0]
        assert max_abs(audio.states[i, : alone.shape[0]] - alone) < 1e-4 * max(1.0, max_abs(alone))
        assert np.array(audio.mask[i]).tolist() == [j < audio.rows[i] for j in range(audio.mask.shape[1])]


@dataclasses.dataclass
class Stretch:
    samples: np.ndarray


@given(st.lists(st.integers(1, 500_000), max_size=30), st.integers(1, 9))
def test_groups_are_of_similar_length_and_none_is_lost(sizes, most):
    windows = [Stretch(np.broadcast_to(np.float32(0), size)) for size in sizes]
    groups = list(similar_lengths(windows, most, 16_000))
    assert sorted(id(w) for group in groups for w in group) == sorted(map(id, windows))
    lengths = [[w.samples.size for w in group] for group in groups]
    flat = [size for group in lengths for size in group]
    assert flat == sorted(flat, reverse=True)
    for group in lengths:
        assert len(group) <= most
        whole = group[0] * len(group)
        assert len(group) == 1 or whole - sum(group) <= whole / 8
        if mx.default_device().type == mx.DeviceType.cpu:
            assert len(group) == 1 or whole <= 30 * 16_000


def test_the_test_recordings_are_cut():
    assert len(split_at_pauses(noise(9.0, 0), 16_000, 3.0)) >= 3
