"""The bank of clips and what is drawn from it."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from qwen4b_asr.features import FrontendConfig, fbank
from qwen4b_asr.training import augment
from qwen4b_asr.training.archives import Recording
from qwen4b_asr.training.batches import AugmentConfig, MixConfig, Sampler
from qwen4b_asr.training.clips import PAD_FRAMES, SPEEDS, analyse, at_rate, build_bank, trim
from qwen4b_asr.training.loader import Loader
from qwen4b_asr.training.vocabulary import ENGLISH, MANDARIN, WORDS

CONFIG = FrontendConfig(num_mel_bins=40, high_freq=4000.0)
SHIFT = CONFIG.frame_shift
PLAIN = AugmentConfig(
    frequency_warp=0, time_warp=0, word_time_warp=0, gain_low=0, gain_high=0, word_gain=0, noise=0, room=0, tilt=0,
    mask_bins=0, mask_frames=0, widest_gap=0,
)  # fmt: skip


def tone(word, speaker, seconds=0.3, rate=8000, index=0):
    """A chord of its own for every word and speaker."""
    pitch = 200 + 97 * WORDS.index(word) + 13 * len(speaker)
    time = np.arange(int(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * pitch * time) + 0.1 * np.sin(2 * np.pi * 3.1 * pitch * time)
    return Recording((word,), speaker, index, wave.astype(np.float32), rate)


def no_progress(items, total):
    return items


@pytest.fixture(scope="module")
def recordings():
    english = [tone(w, s, index=i) for s in ("ann", "bob") for w in ENGLISH for i in range(2)]
    spoken = [tone(w, "espeak-en-0", rate=16000) for w in ENGLISH]
    mandarin = [tone(w, "audio-cmn-syllables", rate=16000) for w in MANDARIN]
    whole = replace(tone("one", "espeak-en-0", 1.0, 16000), words=("one", "two", "two"))
    return english, [*spoken, whole], mandarin


@pytest.fixture(scope="module")
def bank(recordings, tmp_path_factory):
    english, spoken, mandarin = recordings
    return build_bank(
        [(english, 3), (spoken, 1), (mandarin, 1)], CONFIG, 1, tmp_path_factory.mktemp("work"), no_progress
    )


def test_clips_keep_their_labels_and_lengths(bank, recordings):
    english, spoken, mandarin = recordings
    assert len(bank.words) == 3 * len(english) + len(spoken) + len(mandarin)
    assert bank.words[0] == (WORDS.index("eight"),) or bank.words[0] == (WORDS.index("zero"),)
    assert bank.variants[:4] == (0, 1, 2, 0)
    assert bank.speakers[0] == "ann"
    for clip in range(6):
        assert bank.samples[clip] == pytest.approx(0.3 * 16000 / SPEEDS[bank.variants[clip]], rel=0.02)
    assert bank.words[3 * len(english) + len(spoken) - 1] == tuple(WORDS.index(w) for w in ("one", "two", "two"))
    np.testing.assert_allclose(
        bank.clip(0), analyse(at_rate(english[0].samples, 8000, 16000), CONFIG), atol=0.02
    )  # float16


def test_a_bank_is_read_again_and_told_apart(recordings, tmp_path):
    english = recordings[0][:4]
    first = build_bank([(english, 2)], CONFIG, 1, tmp_path, no_progress)

    def fail(items, total):
        raise AssertionError("made again")

    again = build_bank([(english, 2)], CONFIG, 1, tmp_path, fail)
    np.testing.assert_array_equal(again.frames, first.frames)
    assert again.digest == first.digest
    other = build_bank([(english[:3], 2)], CONFIG, 1, tmp_path, no_progress)
    assert other.digest != first.digest


def test_joining_in_the_mel_domain_equals_joining_waveforms(bank, recordings):
    """Away from the one or two frames that straddle a joint, frames are those of the joined waveform."""
    english = recordings[0]
    sampler = Sampler(bank, CONFIG, 1, augmentation=PLAIN)
    chosen = [0, 6, 30]  # variant 0 of three recordings
    pieces = [at_rate(english[c // 3].samples, 8000, 16000) for c in chosen]
    wave = np.concatenate(pieces)
    expected = np.array(fbank(mx.array(wave), CONFIG))

    class Tight:  # the draws that lead to no pause anywhere
        def random(self):
            return 0.0

        def integers(self, low, high=None):
            return 0

        def uniform(self, low, high):
            return 0.0

        def normal(self):
            return 0.0

    frames, words = sampler._join(chosen, Tight())
    assert words == [bank.words[c][0] for c in chosen]
    assert abs(len(frames) - len(expected)) <= 1
    total = min(len(frames), len(expected))
    error = np.abs(frames[:total] - expected[:total]).max(axis=1)
    joints = np.cumsum([p.size for p in pieces])[:-1] / SHIFT
    far = np.array([min(abs(t + 1 - j) for j in joints) > 3 for t in range(total)])
    loud = expected[:total].max(axis=1) > 5
    assert far.sum() > 60
    assert error[far & loud].max() < 0.1
    assert np.median(error) < 0.05


def test_first_frame_of_a_clip_begins_with_it():
    click = np.zeros(4000, np.float32)
    click[0] = 0.5
    loud = np.exp(analyse(click, CONFIG)).sum(axis=1) > 1
    assert loud[: PAD_FRAMES + 1].all()
    assert not loud[PAD_FRAMES + 1 :].any()


def test_trimming_keeps_the_sound():
    samples = np.concatenate([np.zeros(8000), 0.5 * np.sin(np.arange(4000)), 1e-4 * np.ones(8000)]).astype(np.float32)
    kept = trim(samples, 16000)
    assert 4000 <= kept.size <= 4000 + 2 * 320 + 2 * 160
    assert np.abs(kept).sum() == pytest.approx(np.abs(samples[8000:12000]).sum(), rel=0.01)


def test_batches_depend_on_their_number_alone(bank):
    one, other = Sampler(bank, CONFIG, 3, batch_size=4), Sampler(bank, CONFIG, 3, batch_size=4)
    late = one.batch(9)
    for number in (0, 8, 9):
        again = other.batch(number)
    for name in ("features", "rows", "words", "lengths"):
        np.testing.assert_array_equal(getattr(again, name), getattr(late, name))
    assert again.languages == late.languages
    assert not np.array_equal(Sampler(bank, CONFIG, 4, batch_size=4).batch(9).features, late.features)


def test_excluded_speakers_are_never_heard(bank):
    sampler = Sampler(bank, CONFIG, 1, excluded=frozenset({"bob"}))
    heard = {speaker for voices in sampler._voices.values() for speaker, _ in voices}
    assert heard == {"ann", "espeak-en-0", "audio-cmn-syllables"}


def test_strings_are_of_one_speaker_and_one_speed(bank):
    sampler = Sampler(bank, CONFIG, 1, mix=MixConfig(longest=7))
    rng = np.random.default_rng(0)
    for _ in range(60):
        for kind in ("recorded english", "recorded mandarin", "synthetic english"):
            clips = sampler._draw_words(kind, rng)
            assert len({(bank.speakers[c], bank.variants[c]) for c in clips}) == 1
            assert 1 <= len(clips) <= 9


def test_batches_are_whole(bank):
    sampler = Sampler(bank, CONFIG, 1, batch_size=4)
    items = 0
    for number in range(8):
        batch = sampler.batch(number)
        items += len(batch.rows)
        assert batch.features.shape[0] == len(batch.rows) == len(batch.lengths) == len(batch.languages)
        for i, (rows, words) in enumerate(zip(batch.rows, batch.lengths, strict=True)):
            assert np.isfinite(batch.features[i]).all()
            assert not batch.features[i, rows:].any()
            assert (batch.words[i, :words] >= 0).all()
            assert (batch.words[i, words:] == -1).all()
            language = {"en"} if batch.words[i, 0] < len(ENGLISH) else {"zh"}
            assert batch.languages[i] in language | {"auto"}
    assert items == 32


def test_normalisation_makes_training_rows_standard(bank):
    sampler = Sampler(bank, CONFIG, 1, batch_size=4)
    shift, scale = sampler.statistics(8)
    batches = [sampler.batch(i) for i in range(8)]
    rows = np.concatenate([b.features[i, :n] for b in batches for i, n in enumerate(b.rows)])
    normal = (rows + shift) * scale
    np.testing.assert_allclose(normal.mean(axis=0), 0, atol=1e-2)
    np.testing.assert_allclose(normal.std(axis=0), 1, atol=1e-2)


def test_augmentation_does_what_it_says():
    rng = np.random.default_rng(0)
    frames = rng.normal(size=(50, 40)).astype(np.float32)
    assert augment.warp_time(frames, 1.2).shape == (60, 40)
    np.testing.assert_array_equal(augment.warp_time(frames, 1.0), frames)
    ramp = np.repeat(np.arange(50, dtype=np.float32)[:, None], 40, axis=1)
    np.testing.assert_allclose(np.diff(augment.warp_time(ramp, 2.0)[2:-2, 0]), 0.5, atol=1e-4)
    np.testing.assert_allclose(augment.warp_frequency(frames, 1.0, CONFIG), frames, atol=1e-3)
    peak = np.zeros((1, 40), np.float32)
    peak[0, 20] = 1
    assert augment.warp_frequency(peak, 1.1, CONFIG).argmax() > 20 > augment.warp_frequency(peak, 0.9, CONFIG).argmax()
    noise = augment.noise_library(CONFIG, 1, seconds=1.0)
    for kind in noise:
        assert np.log(np.exp(kind).mean()) == pytest.approx(0, abs=1e-3)
    silent = np.full((30, 40), augment.FLOOR, np.float32)
    assert np.exp(augment.add_noise(silent, noise[0], 3.0, 95)).mean() == pytest.approx(np.exp(3.0), rel=0.2)
    tail = augment.reverberate(np.array([[5.0], [-5.0], [-5.0]], np.float32), 0.5, -1.0)[:, 0]
    assert tail[0] == pytest.approx(5.0)
    assert tail[1] == pytest.approx(4.0 + np.log(0.5), abs=1e-3)
    masked = augment.mask_blocks(frames, rng, 8, 8, np.full(40, 9.0, np.float32))
    assert ((masked == frames) | (masked == 9.0)).all()


def test_the_loader_gives_the_samplers_batches(bank):
    sampler = Sampler(bank, CONFIG, 5, batch_size=2)
    with Loader(Sampler(bank, CONFIG, 5, batch_size=2), ahead=3) as loader:
        for first, count in ((6, 5), (0, 2), (4, 0)):
            batches = list(loader(first, count))
            assert len(batches) == count
            for number, batch in enumerate(batches, start=first):
                np.testing.assert_array_equal(batch.features, sampler.batch(number).features)
        left = loader(0, 50)
        next(left)
        left.close()  # a loop that stops early leaves no batch waiting
