"""From the archives to what training and evaluation hear: who is held out, what is trimmed, what is joined."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..features import FrontendConfig
from .archives import SYLLABLE_SPEAKER, WORD_SPEAKER, Recording, TrainingDataError, read_archive
from .clips import Bank, at_rate, build_bank, trim
from .numbers import mandarin_string
from .recipe import Recipe
from .vocabulary import ENGLISH, MANDARIN
from .voices import script, speak_all

HELD_OUT_TAKES = 5
"""Takes 0-4 of every digit and speaker are the Free Spoken Digit Dataset's own test set."""

Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class Corpus:
    """All recordings of the archives.

    Args:
        digits: English digits of recorded speakers.
        syllables: Recorded Mandarin syllables, trimmed; one speaker.
        words: Recorded Mandarin words of another speaker, never trained on.
    """

    digits: list[Recording]
    syllables: list[Recording]
    words: list[Recording]

    @property
    def speakers(self) -> list[str]:
        """The recorded English speakers."""
        return sorted({r.speaker for r in self.digits})


def read_corpus(archives: Sequence[Path]) -> Corpus:
    """Read the archives.

    Raises:
        TrainingDataError: If one cannot be read, or English digits or Mandarin syllables are missing.
    """
    recordings = [r for archive in archives for r in read_archive(archive)]
    digits = [r for r in recordings if r.words[0] in ENGLISH]
    syllables = [replace(r, samples=trim(r.samples, r.rate)) for r in recordings if r.speaker == SYLLABLE_SPEAKER]
    words = [r for r in recordings if r.speaker == WORD_SPEAKER]
    for found, what in ((digits, "the Free Spoken Digit Dataset"), (syllables, "audio-cmn (its syllables)")):
        if not found:
            raise TrainingDataError(f"{what} is not among the archives; name both archives with --archive")
    return Corpus(digits, syllables, words)


def training_bank(
    corpus: Corpus, recipe: Recipe, config: FrontendConfig, work_dir: Path, progress: Callable[[str], Progress]
) -> Bank:
    """Make the bank of clips: recordings that are not held out, syllables, synthetic voices.

    Args:
        corpus: The recordings.
        recipe: Voices, speeds and seed.
        config: Front-end constants.
        work_dir: Where synthetic speech and the bank are kept between runs.
        progress: Makes a progress bar from a description.

    Raises:
        TrainingDataError: If espeak-ng is missing or fails.
    """
    lines = script(recipe.seed, recipe.english_voices, recipe.mandarin_voices)
    voices = speak_all(lines, work_dir, progress("synthetic voices"))
    groups = [
        ([r for r in corpus.digits if r.index >= HELD_OUT_TAKES], recipe.recorded_speeds),
        (corpus.syllables, recipe.recorded_speeds),
        ([replace(r, samples=trim(r.samples, r.rate)) for r in voices], recipe.synthetic_speeds),
    ]
    return build_bank(groups, config, recipe.seed, work_dir, progress("clips"))


@dataclass(frozen=True)
class Item:
    """A test recording and what is said in it: samples (N,) at `rate`."""

    words: tuple[str, ...]
    samples: npt.NDArray[np.float32]
    rate: int


def join(recordings: Sequence[Recording], draw: random.Random, widest_gap_seconds: float = 0.2) -> Item:
    """Join whole recordings of one rate with pauses of digital silence of 0 .. `widest_gap_seconds`."""
    rate = recordings[0].rate
    pieces = [recordings[0].samples]
    for recording in recordings[1:]:
        pieces += [np.zeros(int(draw.uniform(0, widest_gap_seconds) * rate), np.float32), recording.samples]
    return Item(tuple(w for r in recordings for w in r.words), np.concatenate(pieces), rate)


def single_items(corpus: Corpus, speaker: str, takes: int = HELD_OUT_TAKES) -> list[Item]:
    """Return a speaker's first `takes` recordings of every digit, exactly as they are."""
    return [Item(r.words, r.samples, r.rate) for r in _takes(corpus, speaker, takes)]


def string_items(corpus: Corpus, speaker: str, count: int, takes: int = HELD_OUT_TAKES, seed: int = 0) -> list[Item]:
    """Join a speaker's first `takes` recordings of every digit to `count` strings of 3 to 7 digits."""
    recordings = _takes(corpus, speaker, takes)
    draw = random.Random(f"{seed} {speaker}")
    return [join(draw.choices(recordings, k=draw.randint(3, 7)), draw) for _ in range(count)]


def _takes(corpus: Corpus, speaker: str, takes: int) -> list[Recording]:
    return [r for r in corpus.digits if r.speaker == speaker and r.index < takes]


def mandarin_word_items(corpus: Corpus) -> list[Item]:
    """Return the recorded Mandarin words, of a speaker that training never hears."""
    return [Item(r.words, r.samples, r.rate) for r in corpus.words]


def mandarin_voice_items(seed: int, work_dir: Path, progress: Progress, voices: int = 12) -> dict[str, list[Item]]:
    """Let synthetic Mandarin voices that training never hears say every word and strings of 3 to 7."""
    spoken = speak_all(script(seed, 0, voices, held_out=True), work_dir, progress)
    draw = random.Random(seed)
    singles = [replace(r, samples=trim(r.samples, r.rate)) for r in spoken if len(r.words) == 1]
    strings = []
    for speaker in sorted({r.speaker for r in singles}):
        words = {r.words[0]: r for r in singles if r.speaker == speaker}
        strings += [join([words[w] for w in _string(draw)], draw) for _ in range(10)]
    return {
        "single words": [Item(r.words, r.samples, r.rate) for r in singles],
        "joined strings": strings,
        "connected strings": [Item(r.words, r.samples, r.rate) for r in spoken if len(r.words) > 1],
    }


def _string(draw: random.Random) -> tuple[str, ...]:
    while True:
        words = mandarin_string(draw, draw.randint(3, 7))
        if 3 <= len(words) <= 7 and set(words) <= set(MANDARIN):
            return words


def sixteen_kilohertz(item: Item) -> npt.NDArray[np.float32]:
    """Return an item's samples at 16 kHz."""
    return at_rate(item.samples, item.rate, 16000)
