"""The bank of clips: every recording at a few speeds, as log-mel frames that can be laid over a time line.

Strings are joined from the bank in the mel domain, which costs a hundredth of joining and analysing waveforms.
A clip's frames include those whose window only partly covers it, so summing the energies of neighbouring clips
gives the frames of the joined waveform up to the cross terms of at most two frames.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..features import FrontendConfig
from .archives import Recording
from .vocabulary import WORDS

Floats = npt.NDArray[np.float32]

PAD_FRAMES = 2
"""Frames at the start of a clip whose window begins before the clip."""

SPEEDS = (1.0, 0.9, 1.12, 0.84, 1.05, 1.2)
"""Speed of each variant of a recording: pitch and vocal tract change with it, so each is a new speaker."""


@dataclass(frozen=True)
class Bank:
    """All clips of one training run.

    Args:
        frames: Log-mel frames of all clips, one after the other (frames, F), float16.
        starts: First frame of each clip.
        counts: Frames of each clip.
        samples: Samples of each clip at the front end's rate, without padding.
        words: What each clip says, places in `vocabulary.WORDS`.
        speakers: Whose voice.
        variants: Which of `SPEEDS`.
        digest: A hash of everything that the bank was made from.
    """

    frames: npt.NDArray[np.float16]
    starts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    samples: npt.NDArray[np.int64]
    words: tuple[tuple[int, ...], ...]
    speakers: tuple[str, ...]
    variants: tuple[int, ...]
    digest: str = ""

    def clip(self, index: int) -> Floats:
        """Return one clip's frames (T, F), float32."""
        start = self.starts[index]
        return self.frames[start : start + self.counts[index]].astype(np.float32)


def at_rate(samples: Floats, rate: float, target: int) -> Floats:
    """Resample with a band-limited filter; a fractional `rate` changes the speed."""
    import soxr

    return samples if rate == target else soxr.resample(samples, rate, target, "HQ").astype(np.float32)


def trim(samples: Floats, rate: int, *, floor_decibels: float = 36.0, margin_seconds: float = 0.02) -> Floats:
    """Cut silence from both ends: 10-ms frames more than `floor_decibels` below the loudest one."""
    hop = rate // 100
    count = samples.size // hop
    if count < 3:
        return samples
    energy = np.square(samples[: count * hop].reshape(count, hop)).mean(axis=1)
    loud = np.flatnonzero(energy > energy.max() * 10 ** (-floor_decibels / 10))
    margin = int(margin_seconds * rate)
    return samples[max(0, loud[0] * hop - margin) : (loud[-1] + 1) * hop + margin]


def analyse(samples: Floats, config: FrontendConfig, phase: int = 0) -> Floats:
    """Compute a clip's frames with silence around it: frame `PAD_FRAMES` begins `phase` samples before the clip."""
    import mlx.core as mx

    from ..features import fbank

    shift = config.frame_shift
    padded = np.pad(samples, (PAD_FRAMES * shift + phase, config.frame_length))
    return np.array(fbank(mx.array(padded), config))


def _variants(task: tuple[Sequence[Recording], FrontendConfig, int, int]) -> list[tuple[Floats, int, int]]:
    """Analyse recordings at `count` speeds each; returns (frames, samples, variant) in order."""
    recordings, config, count, seed = task
    out = []
    for number, recording in enumerate(recordings):
        draw = np.random.default_rng([seed, number])
        clean = recording.samples
        for variant in range(count):
            factor = SPEEDS[variant] * (draw.uniform(0.985, 1.015) if variant else 1.0)
            samples = at_rate(clean, recording.rate * factor, config.sample_rate)
            phase = int(draw.integers(0, config.frame_shift)) if variant else 0
            out.append((analyse(samples, config, phase), samples.size, variant))
    return out


def build_bank(
    groups: Sequence[tuple[Sequence[Recording], int]],
    config: FrontendConfig,
    seed: int,
    work_dir: Path,
    progress: Callable[[Iterable[Any], int], Iterable[Any]],
    workers: int = 2,
) -> Bank:
    """Analyse recordings at several speeds, or read the bank that an earlier run left in the work directory.

    Args:
        groups: Recordings, already trimmed, with the number of variants of each.
        config: Front-end constants.
        seed: Seed of the speed jitter.
        work_dir: Where the bank is kept, under a hash of everything it depends on.
        progress: Called as ``progress(iterable, total)`` for a progress bar.
        workers: Processes to use.
    """
    digest = hashlib.sha256(repr((config, SPEEDS, seed)).encode())
    for recordings, count in groups:
        digest.update(str(count).encode())
        for r in recordings:
            digest.update(repr((r.words, r.speaker, r.index, r.rate)).encode() + r.samples.tobytes())
    path = work_dir / f"clips-{digest.hexdigest()[:16]}.npz"
    everyone = [(r, count) for recordings, count in groups for r in recordings]
    if not path.is_file():
        size = 64
        tasks = [
            (recordings[i : i + size], config, count, seed + i)
            for recordings, count in groups
            for i in range(0, len(recordings), size)
        ]
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            made = [item for chunk in progress(pool.map(_variants, tasks), len(tasks)) for item in chunk]
        work_dir.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        with open(partial, "wb") as file:
            np.savez(
                file,
                frames=np.concatenate([f for f, _, _ in made]).astype(np.float16),
                counts=np.array([f.shape[0] for f, _, _ in made]),
                samples=np.array([n for _, n, _ in made]),
            )
        os.replace(partial, path)
    with np.load(path) as kept:
        frames, counts, samples = kept["frames"], kept["counts"], kept["samples"]
    number = {word: i for i, word in enumerate(WORDS)}
    labels = [(r, v) for r, count in everyone for v in range(count)]
    return Bank(
        frames=frames,
        starts=np.cumsum(counts) - counts,
        counts=counts,
        samples=samples,
        words=tuple(tuple(number[w] for w in r.words) for r, _ in labels),
        speakers=tuple(r.speaker for r, _ in labels),
        variants=tuple(v for _, v in labels),
        digest=digest.hexdigest(),
    )
