"""Synthetic speakers: espeak-ng in many accents and voices, and flite where it is installed.

Everything that is said is a `Line`, fixed by a seed. The sound is made once and kept in the work directory.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .archives import Recording, TrainingDataError
from .numbers import english_string, mandarin_string
from .vocabulary import ENGLISH, MANDARIN

RATE = 16000

_ACCENTS = (
    "en-us",
    "en-gb",
    "en-gb-x-rp",
    "en-gb-scotland",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-029",
    "en-us-nyc",
)
# `cmn` reads 三一 as "san one"; the voice with Latin letters as pinyin reads every character.
_MANDARIN_VOICE = "cmn-latn-pinyin"
_VARIANT_NAMES = (
    "adam Alex Alicia Andrea Andy Annie antonio aunty belinda benjamin boris caleb david Denis Diogo ed edward "
    "edward2 Gene Gene2 Gustave Henrique Hugo Iven Iven2 Iven3 Iven4 Jacky John kaukovalta Lee linda marcelo Marco "
    "Mario max Michael michel miguel mike Nguyen norbert pablo paul pedro quincy rob robert sandro shelby steph "
    "steph2 steph3 travis victor Zac anika klatt klatt2 klatt3 klatt4 klatt5 klatt6 f1 f2 f3 f4 f5 m1 m2 m3 m4 m5 m6 "
    "m7 m8 grandma grandpa AnxiousAndy RicishayMax RicishayMax2 RicishayMax3"
)
_VARIANTS = tuple(_VARIANT_NAMES.split(" "))
HELD_OUT_VARIANTS = ("Andrea", "Hugo", "f4", "m7", "pedro", "steph2")
"""espeak-ng voices that training never hears, so that there are unknown Mandarin voices to test on."""

_FLITE_VOICES = ("kal", "kal16", "awb", "rms", "slt")


@dataclass(frozen=True)
class Line:
    """What a synthetic voice says, and how.

    Args:
        words: Words of `vocabulary.WORDS`.
        speaker: Name of the voice; lines of one name sound like one person.
        engine: ``espeak-ng`` or ``flite``.
        voice: The engine's own voice name.
        pitch: espeak-ng: 0..99; flite: mean fundamental frequency in Hz.
        pace: espeak-ng: words a minute; flite: duration stretch in percent.
        take: Number of the line within its speaker.
    """

    words: tuple[str, ...]
    speaker: str
    engine: str
    voice: str
    pitch: int
    pace: int
    take: int


def script(seed: int, english_voices: int, mandarin_voices: int, *, held_out: bool = False) -> list[Line]:
    """Decide who says what.

    Every voice says each of its words once alone and six strings without a pause; flite's five voices do so at
    several pitches and paces.

    Args:
        seed: Seed of every choice.
        english_voices: Number of English espeak-ng voices (accent, variant, pitch).
        mandarin_voices: Number of Mandarin espeak-ng voices.
        held_out: Draw the variants from `HELD_OUT_VARIANTS` instead of all the others, and leave flite out.
    """
    draw = random.Random(f"{seed} {held_out}")
    variants = HELD_OUT_VARIANTS if held_out else tuple(v for v in _VARIANTS if v not in HELD_OUT_VARIANTS)
    lines: list[Line] = []

    def add(
        name: str, engine: str, voice: str, pitch: int, pace: Callable[[], int], words: Iterable[tuple[str, ...]]
    ) -> None:
        lines.extend(Line(w, name, engine, voice, pitch, pace(), i) for i, w in enumerate(words))

    for number in range(english_voices):
        voice = f"{draw.choice(_ACCENTS)}+{variants[number % len(variants)]}"
        words = [(w,) for w in ENGLISH] + [english_string(draw, draw.randint(2, 7)) for _ in range(6)]
        add(f"espeak-en-{number}", "espeak-ng", voice, draw.randint(15, 90), lambda: draw.randint(100, 210), words)
    for number in range(mandarin_voices):
        voice = f"{_MANDARIN_VOICE}+{variants[number % len(variants)]}"
        words = [(w,) for w in MANDARIN] + [mandarin_string(draw, draw.randint(2, 7)) for _ in range(6)]
        add(f"espeak-zh-{number}", "espeak-ng", voice, draw.randint(15, 90), lambda: draw.randint(100, 200), words)
    if not held_out and english_voices and shutil.which("flite"):
        for number in range(8 * len(_FLITE_VOICES)):
            voice = _FLITE_VOICES[number % len(_FLITE_VOICES)]
            words = [(w,) for w in ENGLISH] + [english_string(draw, draw.randint(2, 7)) for _ in range(6)]
            pitch = draw.randint(150, 230) if voice == "slt" else draw.randint(80, 150)
            add(f"flite-{number}", "flite", voice, pitch, lambda: draw.randint(75, 130), words)
    return lines


def speak(line: Line) -> Recording:
    """Synthesise one line.

    Raises:
        TrainingDataError: If the engine is not installed, fails, or stays silent.
    """
    import soundfile
    import soxr

    text = " ".join(line.words) if line.words[0] in ENGLISH else "".join(line.words)
    if line.engine == "espeak-ng":
        options = ["-v", line.voice, "-p", str(line.pitch), "-s", str(line.pace), "--stdout", text]
    else:
        stretch, pitch = f"duration_stretch={line.pace / 100}", f"int_f0_target_mean={line.pitch}"
        options = ["-voice", line.voice, "--setf", stretch, "--setf", pitch, "-t", text, "-o", "/dev/stdout"]
    try:
        done = subprocess.run([line.engine, *options], capture_output=True, timeout=30, check=False)
    except FileNotFoundError as error:
        raise TrainingDataError(
            f"{line.engine} is not installed; it speaks part of the training material (Debian: apt install "
            f"{line.engine}; macOS: brew install {line.engine})"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise TrainingDataError(f"{line.engine} did not finish saying {text!r} as {line.voice}") from error
    if done.returncode or not done.stdout:
        message = done.stderr.decode(errors="replace").strip()
        raise TrainingDataError(f"{line.engine} failed to say {text!r} as {line.voice}: {message or done.returncode}")
    samples, rate = soundfile.read(io.BytesIO(_with_sizes(done.stdout)), dtype="float32", always_2d=True)
    mono = soxr.resample(samples[:, 0], rate, RATE) if rate != RATE else samples[:, 0]
    if not np.abs(mono).max(initial=0.0) > 1e-3:
        raise TrainingDataError(f"{line.engine} said nothing for {text!r} as {line.voice}")
    return Recording(line.words, line.speaker, line.take, mono.astype(np.float32), RATE)


def _with_sizes(wav: bytes) -> bytes:
    """Put the true sizes into the header of a WAV that was written to a pipe."""
    data = wav.find(b"data")
    if data < 0:
        return wav
    body = wav[data + 8 :]
    return (
        b"RIFF" + (data + len(body)).to_bytes(4, "little") + wav[8 : data + 4] + len(body).to_bytes(4, "little") + body
    )


def speak_all(
    lines: list[Line], work_dir: Path, progress: Callable[[Iterable[Any], int], Iterable[Any]]
) -> list[Recording]:
    """Synthesise many lines at once on every core, or read them from an earlier run.

    Args:
        lines: What to say.
        work_dir: Where the sound is kept; the file's name is a hash of `lines`.
        progress: Called as ``progress(iterable, total)``; returns the iterable, for a progress bar.
    """
    name = hashlib.sha256(repr([asdict(line) for line in lines]).encode()).hexdigest()[:16]
    path = work_dir / f"voices-{name}.npz"
    if path.is_file():
        with np.load(path) as kept:
            samples, ends = kept["samples"], kept["ends"]
        pieces = np.split(samples, ends[:-1])
        return [
            Recording(line.words, line.speaker, line.take, piece.astype(np.float32) / np.float32(32768), RATE)
            for line, piece in zip(lines, pieces, strict=True)
        ]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        recordings = list(progress(pool.map(speak, lines), len(lines)))
    pieces = [np.clip(np.round(r.samples * 32768), -32768, 32767).astype(np.int16) for r in recordings]
    work_dir.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with open(partial, "wb") as file:
        np.savez(file, samples=np.concatenate(pieces), ends=np.cumsum([p.size for p in pieces]))
    os.replace(partial, path)
    return [
        Recording(r.words, r.speaker, r.index, p.astype(np.float32) / np.float32(32768), RATE)
        for r, p in zip(recordings, pieces, strict=True)
    ]
