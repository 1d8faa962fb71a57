"""Word error of a model directory, for the CTC head and for the language model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..ctc import collapse
from ..encoder import NUM_QUERY_FRAMES
from ..transcribe import Transcriber
from .corpus import (
    HELD_OUT_TAKES,
    Corpus,
    Item,
    mandarin_voice_items,
    mandarin_word_items,
    single_items,
    sixteen_kilohertz,
    string_items,
)
from .vocabulary import ENGLISH, WORDS


def edit_distance(reference: Sequence[str], heard: Sequence[str]) -> int:
    """Count the substitutions, deletions and insertions between two word sequences (Levenshtein)."""
    row = list(range(len(heard) + 1))
    for i, wanted in enumerate(reference, start=1):
        diagonal, row[0] = row[0], i
        for j, got in enumerate(heard, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (wanted != got))
    return row[-1]


def words_of(text: str) -> list[str]:
    """Split a transcript into words: English between spaces, Mandarin by character."""
    out: list[str] = []
    for part in text.split():
        out += [part] if part in ENGLISH else list(part)
    return out


@dataclass(frozen=True)
class Score:
    """Errors on one test set.

    Args:
        name: The test set.
        items: Recordings.
        words: Words said.
        ctc_errors: Word errors of the CTC head's best path.
        text_errors: Word errors of the transcripts.
    """

    name: str
    items: int
    words: int
    ctc_errors: int
    text_errors: int

    def row(self) -> str:
        """Return a line of a Markdown table."""
        ctc, text = (100 * e / max(1, self.words) for e in (self.ctc_errors, self.text_errors))
        return f"| {self.name} | {self.items} | {self.words} | {ctc:.1f} % | {text:.1f} % |"

    def __add__(self, other: Score) -> Score:
        return Score(
            self.name,
            self.items + other.items,
            self.words + other.words,
            self.ctc_errors + other.ctc_errors,
            self.text_errors + other.text_errors,
        )


TABLE_HEAD = "| test set | recordings | words | word error, CTC | word error, text |\n|---|---|---|---|---|"


def ctc_words(transcriber: Transcriber, samples: Any, language: str = "auto") -> list[str]:
    """Transcribe 16-kHz samples (N,) with the CTC head alone."""
    features = transcriber.model.frontend(mx.array(samples))[None]
    states, _ = transcriber.model.audio_encoder(features, language=language)
    logits = np.array(transcriber.model.audio_encoder.ctc_logits(states))[0, NUM_QUERY_FRAMES:]
    return [WORDS[token.id - 1] for token in collapse(logits.argmax(axis=1).tolist())]


def score(
    transcriber: Transcriber, name: str, items: Iterable[Item], *, language: str = "auto", text: bool = True
) -> Score:
    """Transcribe test recordings, one at a time and greedily, as a user would, and count word errors.

    Args:
        transcriber: The model.
        name: The test set's name.
        items: The recordings.
        language: The language asked for.
        text: Whether to run the language model; the CTC head always is.
    """
    total = Score(name, 0, 0, 0, 0)
    for item in items:
        samples = sixteen_kilohertz(item)
        by_ctc = edit_distance(item.words, ctc_words(transcriber, samples, language))
        by_text = 0
        if text:
            transcript = transcriber.transcribe_samples(samples, language=language)
            by_text = edit_distance(item.words, words_of(transcript.text))
        total = total + Score(name, 1, len(item.words), by_ctc, by_text)
    return total


def evaluate(
    transcriber: Transcriber,
    corpus: Corpus,
    *,
    speakers: Sequence[str] | None = None,
    strings: int = 40,
    takes: int = HELD_OUT_TAKES,
    seed: int = 1,
    work_dir: Path | None = None,
    progress: Callable[[str], Callable[[Iterable[Any], int], Iterable[Any]]],
) -> list[Score]:
    """Score a model on the held-out recordings.

    Args:
        transcriber: The model.
        corpus: The recordings.
        speakers: English speakers; None means all.
        strings: Strings of 3 to 7 digits per speaker.
        takes: Takes of every digit to test on; more than the default only makes sense for a speaker left out.
        seed: Seed of the held-out synthetic voices; the strings are always the same.
        work_dir: Where the synthetic voices are kept; None leaves Mandarin out.
        progress: Makes a progress bar from a description.

    Returns:
        One score per speaker and set, then the sums over speakers, then Mandarin.
    """
    chosen = list(speakers or corpus.speakers)
    scores: list[Score] = []
    for kind in ("single digits", "strings of 3-7"):
        total: Score | None = None
        for speaker in progress(kind)(chosen, len(chosen)):
            items = (
                single_items(corpus, speaker, takes)
                if kind == "single digits"
                else string_items(corpus, speaker, strings, takes)
            )
            one = score(transcriber, f"{speaker}, {kind}", items)
            scores.append(one)
            total = one if total is None else total + one
        if total is not None and len(chosen) > 1:
            scores.append(Score(f"**all, {kind}**", total.items, total.words, total.ctc_errors, total.text_errors))
    if work_dir is not None:
        mandarin = mandarin_voice_items(seed, work_dir, progress("Mandarin voices"))
        sets = {f"unheard synthetic voices, {name}": items for name, items in mandarin.items()}
        sets["recorded words of an unheard speaker"] = mandarin_word_items(corpus)
        for name, items in sets.items():
            for language in ("auto", "zh"):
                scores.append(score(transcriber, f"Mandarin ({language}), {name}", items, language=language))
    return scores
