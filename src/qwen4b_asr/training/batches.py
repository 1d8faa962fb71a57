"""Training batches: strings joined from the bank, augmented, stacked and padded.

Batch number n is a function of the seed and n alone, so training can stop and go on anywhere.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..features import FrontendConfig
from . import augment
from .archives import SYLLABLE_SPEAKER
from .clips import PAD_FRAMES, Bank, Floats
from .numbers import english_string, mandarin_string
from .vocabulary import ENGLISH, WORDS

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class AugmentConfig:
    """How far strings are changed; probabilities and ranges.

    Args:
        frequency_warp: Widest change of the frequency axis, as a fraction.
        time_warp: Widest change of pace, as a fraction.
        word_time_warp: The same for each word by itself.
        gain_low: Lowest level, decibels against the recording.
        gain_high: Highest level.
        word_gain: Standard deviation of the level between words, decibels.
        noise: Probability of noise.
        snr_low: Lowest ratio of speech to noise, decibels.
        snr_high: Highest ratio.
        room: Probability of a room's tail.
        tilt: Strength of the spectral colouring.
        mask_bins: Widest masked band, bins.
        mask_frames: Longest masked span, frames.
        widest_gap: Longest pause between two words, frames.
    """

    frequency_warp: float = 0.08
    time_warp: float = 0.2
    word_time_warp: float = 0.1
    gain_low: float = -26.0
    gain_high: float = 8.0
    word_gain: float = 2.0
    noise: float = 0.6
    snr_low: float = 6.0
    snr_high: float = 50.0
    room: float = 0.2
    tilt: float = 0.7
    mask_bins: int = 8
    mask_frames: int = 8
    widest_gap: int = 30


@dataclass(frozen=True)
class MixConfig:
    """What share of the strings comes from where; the rest are English strings of recorded speakers.

    Args:
        synthetic_english: English words of a synthetic voice, joined.
        connected_english: English strings as a synthetic voice says them.
        synthetic_mandarin: Mandarin words of a synthetic voice, joined.
        connected_mandarin: Mandarin strings as a synthetic voice says them.
        recorded_mandarin: Recorded Mandarin syllables, joined.
        longest: Most words in a joined string.
        singles: Share of the joined strings that are one word.
    """

    synthetic_english: float = 0.16
    connected_english: float = 0.12
    synthetic_mandarin: float = 0.08
    connected_mandarin: float = 0.12
    recorded_mandarin: float = 0.08
    longest: int = 7
    singles: float = 0.2


@dataclass(frozen=True)
class Batch:
    """One training batch.

    Args:
        features: Stacked rows, not normalised (B, L, m · F), float32.
        rows: Real rows of each item (B,).
        words: Places in `vocabulary.WORDS` (B, U), -1 after the end.
        lengths: Words of each item (B,).
        languages: Language query of each item.
    """

    features: Floats
    rows: Integers
    words: Integers
    lengths: Integers
    languages: tuple[str, ...]


def stack_rows(frames: Floats, m: int, n: int) -> Floats:
    """Stack `m` frames every `n`, as `features.low_frame_rate` does, in NumPy."""
    total = frames.shape[0]
    rows = -(-total // n)
    index = np.arange(rows)[:, None] * n + np.arange(m)[None, :] - (m - 1) // 2
    return frames[np.clip(index, 0, total - 1)].reshape(rows, -1)


class Sampler:
    """Draws batches from a bank.

    Args:
        bank: The clips.
        frontend: Front-end constants the bank was made with.
        seed: Seed of everything drawn.
        excluded: Speakers to leave out.
        batch_size: Mean number of items in a batch.
        augmentation: How far strings are changed.
        mix: What share comes from where.
    """

    _POOL = 8  # batches drawn together and sorted by length, so that little of a batch is padding

    def __init__(
        self,
        bank: Bank,
        frontend: FrontendConfig,
        seed: int,
        *,
        excluded: frozenset[str] = frozenset(),
        batch_size: int = 32,
        augmentation: AugmentConfig | None = None,
        mix: MixConfig | None = None,
    ) -> None:
        self.bank, self.frontend, self.seed, self.batch_size = bank, frontend, seed, batch_size
        self.augmentation = augmentation or AugmentConfig()
        self.mix = mix or MixConfig()
        self.noises = augment.noise_library(frontend, seed)
        # voices[kind][(speaker, variant)][word] -> clips; connected[kind] -> clips
        self._voices: dict[str, dict[tuple[str, int], dict[int, list[int]]]] = {}
        self._connected: dict[str, list[int]] = {"english": [], "mandarin": []}
        for clip, (words, speaker, variant) in enumerate(zip(bank.words, bank.speakers, bank.variants, strict=True)):
            if speaker in excluded:
                continue
            language = "english" if words[0] < len(ENGLISH) else "mandarin"
            if len(words) > 1:
                self._connected[language].append(clip)
                continue
            synthetic = speaker.startswith(("espeak-", "flite-"))
            kind = f"{'synthetic' if synthetic else 'recorded'} {language}"
            self._voices.setdefault(kind, {}).setdefault((speaker, variant), {}).setdefault(words[0], []).append(clip)
        self._people = {kind: sorted({speaker for speaker, _ in voices}) for kind, voices in self._voices.items()}
        self._pool: tuple[int, list[list[tuple[Floats, list[int], str]]]] = (-1, [])

    def batch(self, number: int) -> Batch:
        """Return batch `number`; the same for the same seed, whatever was drawn before."""
        pool, place = divmod(number, self._POOL)
        if self._pool[0] != pool:
            rng = np.random.default_rng([self.seed, pool])
            items = sorted(
                (self.utterance(rng) for _ in range(self._POOL * self.batch_size)), key=lambda u: u[0].shape[0]
            )
            # Cut where the rows add up to equal shares: batches of single words are larger, of long strings smaller.
            filled = np.cumsum([u[0].shape[0] for u in items])
            cuts = np.searchsorted(filled, filled[-1] * np.arange(1, self._POOL) / self._POOL)
            shares = np.split(np.arange(len(items)), cuts)
            batches = [[items[i] for i in shares[place]] for place in rng.permutation(self._POOL)]
            self._pool = (pool, batches)
        return self._collate(self._pool[1][place])

    def utterance(self, rng: np.random.Generator) -> tuple[Floats, list[int], str]:
        """Draw one utterance: stacked rows (L, m · F), its words, its language query."""
        kind = self._draw_kind(rng)
        augmentation = self.augmentation
        if kind.startswith("connected"):
            clips = self._connected[kind.split()[1]]
            chosen = [clips[int(rng.integers(len(clips)))]]
        else:
            chosen = self._draw_words(kind, rng)
        frames, words = self._join(chosen, rng)
        frames = self._change(frames, rng, augmentation)
        spoken = "en" if words[0] < len(ENGLISH) else "zh"
        language = spoken if rng.random() < 0.4 else "auto"
        return stack_rows(frames, self.frontend.lfr_m, self.frontend.lfr_n), words, language

    def _draw_kind(self, rng: np.random.Generator) -> str:
        mix = self.mix
        shares = {
            "synthetic english": mix.synthetic_english,
            "connected english": mix.connected_english,
            "synthetic mandarin": mix.synthetic_mandarin,
            "connected mandarin": mix.connected_mandarin,
            "recorded mandarin": mix.recorded_mandarin,
        }
        point = rng.random()
        for kind, share in shares.items():
            if point < share:
                language = kind.split()[1]
                there = self._connected[language] if kind.startswith("connected") else self._voices.get(kind)
                if there:
                    return kind
                break
            point -= share
        return "recorded english" if "recorded english" in self._voices else next(iter(self._voices))

    def _draw_words(self, kind: str, rng: np.random.Generator) -> list[int]:
        mix = self.mix
        length = 1 if rng.random() < mix.singles else int(rng.integers(2, mix.longest + 1))
        people = self._people[kind]
        person = people[int(rng.integers(len(people)))]
        variants = [key for key in self._voices[kind] if key[0] == person]
        voice = self._voices[kind][variants[int(rng.integers(len(variants)))]]
        draw = random.Random(int(rng.integers(1 << 62)))
        if kind.endswith("english"):
            string = english_string(draw, length)
        elif person == SYLLABLE_SPEAKER and draw.random() < 0.5:
            string = tuple(draw.choices(WORDS[len(ENGLISH) :], k=length))
        else:
            string = mandarin_string(draw, length)
        words = [WORDS.index(w) for w in string]
        words = [w for w in words if w in voice] or [next(iter(voice))]
        return [voice[w][int(rng.integers(len(voice[w])))] for w in words]

    def _join(self, clips: list[int], rng: np.random.Generator) -> tuple[Floats, list[int]]:
        """Lay clips over a time line with pauses between them, summing energies where frames overlap."""
        bank, config, shift = self.bank, self.augmentation, self.frontend.frame_shift
        tight = rng.random() < 0.4  # as trimmed recordings are: nothing before the first word, nothing after the last
        cursor = 0 if tight else int(rng.integers(0, 60 if rng.random() < 0.5 else 15))
        wide = config.widest_gap if rng.random() < 0.7 else 6
        placed: list[tuple[int, Floats]] = []
        words: list[int] = []
        for clip in clips:
            factor = 1 + rng.uniform(-1, 1) * config.word_time_warp
            frames = augment.warp_time(bank.clip(clip), factor)
            frames = frames + np.float32(rng.normal() * config.word_gain * np.log(10) / 10)
            placed.append((cursor, frames))
            words += bank.words[clip]
            cursor += max(1, round(bank.samples[clip] / shift * factor)) + int(rng.integers(0, wide + 1))
        total = max(at + f.shape[0] for at, f in placed)
        line = np.full((total, self.frontend.num_mel_bins), augment.FLOOR, dtype=np.float32)
        for at, frames in placed:
            line[at : at + frames.shape[0]] = np.logaddexp(line[at : at + frames.shape[0]], frames)
        at, frames = placed[-1]
        end = at + PAD_FRAMES + round(bank.samples[clips[-1]] / shift * frames.shape[0] / bank.counts[clips[-1]])
        if tight:  # the window of the last frame ends with the sound, as that of the first begins with it
            line = line[PAD_FRAMES : max(PAD_FRAMES + 4, end - 2)]
        else:
            extra = int(rng.integers(0, 60 if rng.random() < 0.5 else 15))
            silence = np.full((extra, line.shape[1]), augment.FLOOR, dtype=np.float32)
            line = np.concatenate([line[PAD_FRAMES:end], silence])
        return line, words

    def _change(self, frames: Floats, rng: np.random.Generator, config: AugmentConfig) -> Floats:
        bins = frames.shape[1]
        frames = augment.warp_time(frames, 1 + rng.uniform(-1, 1) * config.time_warp)
        frames = augment.warp_frequency(frames, 1 + rng.uniform(-1, 1) * config.frequency_warp, self.frontend)
        if rng.random() < config.room:
            frames = augment.reverberate(frames, float(rng.uniform(0.7, 0.93)), float(rng.uniform(-5.0, -2.0)))
        frames = frames + augment.tilt(bins, rng, config.tilt)
        speech = float(np.log(np.exp(np.minimum(frames, 60.0)).mean()))
        if rng.random() < config.noise:
            noise = self.noises[int(rng.integers(len(self.noises)))]
            level = speech - rng.uniform(config.snr_low, config.snr_high) * np.log(10) / 10
            frames = augment.add_noise(frames, noise, level, int(rng.integers(noise.shape[0])))
        gain = rng.uniform(config.gain_low, config.gain_high) * np.log(10) / 10
        frames = np.maximum(frames + np.float32(gain), np.float32(augment.FLOOR))
        fill = frames.mean(axis=0)
        frames = augment.mask_blocks(frames, rng, config.mask_bins, config.mask_frames, fill)
        return frames.astype(np.float32)

    def _collate(self, items: list[tuple[Floats, list[int], str]]) -> Batch:
        rows = np.array([f.shape[0] for f, _, _ in items])
        lengths = np.array([len(w) for _, w, _ in items])
        features = np.zeros((len(items), int(rows.max()), items[0][0].shape[1]), dtype=np.float32)
        words = np.full((len(items), int(lengths.max())), -1, dtype=np.int64)
        for i, (f, w, _) in enumerate(items):
            features[i, : f.shape[0]] = f
            words[i, : len(w)] = w
        return Batch(features, rows, words, lengths, tuple(language for _, _, language in items))

    def statistics(self, batches: int = 6) -> tuple[Floats, Floats]:
        """Measure the normalisation on training strings: shift = -mean, scale = 1 / deviation, each (m · F,)."""
        total = np.zeros(self.frontend.output_size)
        square = np.zeros(self.frontend.output_size)
        count = 0
        for number in range(batches):
            batch = self.batch(number)
            for features, rows in zip(batch.features, batch.rows, strict=True):
                real = features[:rows].astype(np.float64)
                total += real.sum(axis=0)
                square += np.square(real).sum(axis=0)
                count += int(rows)
        mean = total / count
        deviation = np.sqrt(np.maximum(square / count - mean**2, 1e-6))
        return (-mean).astype(np.float32), (1 / deviation).astype(np.float32)
