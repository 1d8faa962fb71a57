"""Read the two archives of recordings, as streams: nothing is unpacked to disk."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import AsrError
from .vocabulary import ENGLISH, MANDARIN, PINYIN

_DIGIT = re.compile(r"(?:^|/)(\d)_([a-z]+)_(\d+)\.wav$")
_SYLLABLE = re.compile(r"(?:^|/)syllables/cmn-([a-zü]+)([1-5])\.mp3$")
_WORD = re.compile(rf"(?:^|/)words/cmn-([{''.join(MANDARIN)}]+)\.mp3$")

# Larger members cannot be one spoken word; reading them would only fill the memory.
_MEMBER_LIMIT = 4 << 20

SYLLABLE_SPEAKER = "audio-cmn-syllables"
WORD_SPEAKER = "audio-cmn-words"


class TrainingDataError(AsrError):
    """An archive or a synthetic voice that training needs is missing, damaged or not what it should be."""


@dataclass(frozen=True)
class Recording:
    """One recording of one word or of a few words.

    Args:
        words: What is said, words of `vocabulary.WORDS`.
        speaker: Whose voice it is.
        index: Take number within speaker and word.
        samples: Waveform (N,), float32, in [-1, 1].
        rate: Samples per second.
        citation: Whether a Mandarin syllable has the tone of the dictionary.
    """

    words: tuple[str, ...]
    speaker: str
    index: int
    samples: npt.NDArray[np.float32]
    rate: int
    citation: bool = True


def read_archive(path: str | os.PathLike[str]) -> list[Recording]:
    """Read every recording of number words from a tar archive (plain or compressed).

    Knows the layouts of the Free Spoken Digit Dataset (``{digit}_{speaker}_{index}.wav``) and of audio-cmn
    (``syllables/cmn-{pinyin}.mp3``, ``words/cmn-{characters}.mp3``, of which those with number characters only);
    other members are passed over. Members are decoded in memory, so no path inside the archive is ever followed.

    Args:
        path: The archive.

    Returns:
        Recordings sorted by speaker, words and index: the order does not depend on the archive's.

    Raises:
        TrainingDataError: If the file is missing, is no tar archive, ends early, holds a recording that cannot be
            decoded, or holds none at all.
    """
    source = Path(path)
    if not source.is_file():
        raise TrainingDataError(f"{source}: no such archive; name it with --archive")
    try:
        with tarfile.open(source, mode="r|*") as archive:
            recordings = list(_recordings(archive, source))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise TrainingDataError(f"{source}: not a readable tar archive ({error})") from error
    if not recordings:
        raise TrainingDataError(
            f"{source}: no recordings of number words found; expected the Free Spoken Digit Dataset "
            "(recordings/3_theo_7.wav) or audio-cmn (syllables/cmn-san1.mp3)"
        )
    return sorted(recordings, key=lambda r: (r.speaker, r.words, r.index))


def _recordings(archive: tarfile.TarFile, source: Path) -> Iterator[Recording]:
    for member in archive:
        label = parse_name(member.name) if member.isfile() else None
        if label is None:
            continue
        if member.size > _MEMBER_LIMIT:
            raise TrainingDataError(f"{source}: {member.name} has {member.size} bytes, too many for one word")
        stream = archive.extractfile(member)
        assert stream is not None  # a regular file always has one
        words, speaker, index, citation = label
        samples, rate = _decode(stream.read(), f"{source}: {member.name}")
        yield Recording(words, speaker, index, samples, rate, citation)


def parse_name(name: str) -> tuple[tuple[str, ...], str, int, bool] | None:
    """Read words, speaker, take and whether the tone is the dictionary's from a member's name.

    Returns:
        None for a name that is no recording of number words.
    """
    if found := _DIGIT.search(name):
        return (ENGLISH[int(found[1])],), found[2], int(found[3]), True
    if found := _SYLLABLE.search(name):
        for word, pinyin in zip(MANDARIN, PINYIN, strict=True):
            if pinyin[:-1] == found[1]:
                return (word,), SYLLABLE_SPEAKER, int(found[2]), pinyin[-1] == found[2]
    if found := _WORD.search(name):
        return tuple(found[1]), WORD_SPEAKER, 0, True
    return None


def _decode(data: bytes, name: str) -> tuple[npt.NDArray[np.float32], int]:
    import soundfile

    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        raise TrainingDataError(f"{name}: cannot be decoded ({error})") from error
    mono = np.ascontiguousarray(samples.mean(axis=1), dtype=np.float32)
    if mono.size == 0 or not np.isfinite(mono).all():
        raise TrainingDataError(f"{name}: holds no usable sound")
    return mono, int(rate)
