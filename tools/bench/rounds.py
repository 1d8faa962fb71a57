"""Rounds of `tools/bench_transcribe.py`: whether sides agree, then their times in turns, then medians and ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .sides import Side, SideError

LEAST_ROUNDS = 3
STATES_LIMIT = 1e-4
"""Largest relative L2 difference between two sides' rows: both add up in float32, through seventy layers."""


@dataclass
class Samples:
    """What was measured of one part of one side, an entry per round.

    Attributes:
        wall: Seconds.
        cpu: Seconds of the processor for the whole request that the part belongs to.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One stage beside its peers.

    Attributes:
        stage: Its name.
        seconds: Audio that it had.
        times: Side -> median, quartiles and median of processor time, in seconds.
        ratios: Peer -> how many times as long it took, the median over rounds; above 1 this project is faster.
        cpu_ratios: The same of processor time.
        differences: Peer -> how far its result is from this project's; None where the two are equal ids.
        notes: What else is to be said.
    """

    stage: str
    seconds: float
    times: dict[str, dict[str, float]]
    ratios: dict[str, float]
    cpu_ratios: dict[str, float]
    differences: dict[str, float | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def turns(names: Sequence[str], turn: int) -> list[str]:
    """Return the order of a round: each side is first in turn, and every second round runs backwards."""
    shift = turn % len(names)
    order = [*names[shift:], *names[:shift]]
    return order if turn % 2 == 0 else order[::-1]


def relative_difference(got: np.ndarray, wanted: np.ndarray) -> float:
    """Return the L2 norm of the difference over that of what is wanted.

    Raises:
        ValueError: If the shapes differ by more than axes of length one.
    """
    one, other = np.squeeze(got).astype(np.float64), np.squeeze(wanted).astype(np.float64)
    if one.shape != other.shape:
        raise ValueError(f"[relative_difference] shapes must agree but got {got.shape} and {wanted.shape}")
    return float(np.linalg.norm(one - other) / max(np.linalg.norm(other), 1e-30))


def same_tokens(got: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Return the first place where two runs of ids differ, None if nowhere."""
    if list(got) == list(wanted):
        return None
    return next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))


def take(
    sides: Sequence[Side], stage: str, rounds: int, seconds: float, *, beside: str | None = None
) -> tuple[dict[str, dict[str, Samples]], list[dict[str, Any]]]:
    """Run a stage on every side in every round.

    Args:
        sides: Which; each has run the stage before.
        stage: Its name.
        rounds: Rounds at most.
        seconds: No round begins after so many, once there are `LEAST_ROUNDS`.
        beside: A stage that the first side runs in every round too, such as a reading of the ceiling.

    Returns:
        Part -> side -> samples, and the answers to `beside`.
    """
    named = {side.name: side for side in sides}
    samples: dict[str, dict[str, Samples]] = {}
    extra = []
    end = time.perf_counter() + seconds
    for turn in range(rounds):
        if turn >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name in turns(list(named), turn):
            answer = named[name].ask("run", stage=stage)
            for part, wall in answer["seconds"].items():
                one = samples.setdefault(part, {}).setdefault(name, Samples())
                one.wall.append(wall)
                one.cpu.append(answer["cpu_seconds"])
        if beside is not None:
            extra.append(sides[0].ask("run", stage=beside))
    return samples, extra


def row(
    stage: str,
    seconds: float,
    samples: Mapping[str, Samples],
    own: str,
    differences: Mapping[str, float | None] | None = None,
    notes: Sequence[str] = (),
) -> Row:
    """Return the row of a stage.

    Args:
        stage: Its name.
        seconds: Audio that it had.
        samples: By side.
        own: The side that the others are compared with.
        differences: From the comparison before the rounds.
        notes: What else is to be said.
    """
    base = samples[own]
    others = {name: one for name, one in samples.items() if name != own}
    return Row(
        stage=stage,
        seconds=seconds,
        times={name: summary(one) for name, one in samples.items()},
        # Of neighbours in time, so that a change of load between rounds cancels.
        ratios={name: ratio(one.wall, base.wall) for name, one in others.items()},
        cpu_ratios={name: ratio(one.cpu, base.cpu) for name, one in others.items()},
        differences=dict(differences or {}),
        notes=tuple(notes),
    )


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def summary(samples: Samples) -> dict[str, float]:
    """Return median, quartiles and least wall time, and median and least processor time, of at least one sample."""
    wall = samples.wall
    q1, median, q3 = statistics.quantiles(wall, n=4, method="inclusive") if len(wall) > 1 else [wall[0]] * 3
    return {
        "median": median,
        "q1": q1,
        "q3": q3,
        "least": min(wall),
        "cpu": statistics.median(samples.cpu),
        "cpu_least": min(samples.cpu),
        "rounds": len(wall),
    }


def stages_of(sides: Sequence[Side], path: Path) -> dict[str, list[Side]]:
    """Give every side its inputs; return the sides that have each stage, the first side's stages in its order."""
    answers = {side.name: side.ask("inputs", path=str(path))["stages"] for side in sides}
    own = answers[sides[0].name]
    return {stage: [side for side in sides if stage in answers[side.name]] for stage in own}


@dataclass
class Check:
    """What came of comparing a stage's results before timing it.

    Attributes:
        agreeing: The sides that may be timed; a result that is another one makes the time mean nothing.
        gaps: Peer that agrees -> relative difference of its rows, or None where its ids are equal.
        problems: Peer that does not -> why.
    """

    agreeing: list[Side]
    gaps: dict[str, float | None] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def check(sides: Sequence[Side], stage: str, folder: Path, tokens: bool) -> Check:
    """Compare a stage's results.

    Args:
        sides: Which; the first is compared with.
        stage: Its name.
        folder: For files in between.
        tokens: Whether the results are token ids.

    Raises:
        SideError: If the first side cannot run it.
    """
    wanted = _result(sides[0], stage, folder, tokens)
    found = Check([sides[0]])
    for side in sides[1:]:
        try:
            got = _result(side, stage, folder, tokens)
            gap = None if tokens else relative_difference(got, wanted)
            place = same_tokens(got, wanted) if tokens else None
        except (SideError, ValueError) as error:
            found.problems[side.name] = str(error)
            continue
        if place is not None:
            found.problems[side.name] = (
                f"its token {place} is {got[place : place + 1]}, not {wanted[place : place + 1]}"
            )
        elif gap is not None and not gap <= STATES_LIMIT:
            found.problems[side.name] = f"its rows are {gap:.1e} off (relative L2)"
        else:
            found.agreeing.append(side)
            found.gaps[side.name] = gap
    return found


def _result(side: Side, stage: str, folder: Path, tokens: bool) -> Any:
    """Return token ids, or an array that travels in a file."""
    if tokens:
        return side.ask("run", stage=stage)["tokens"]
    path = folder / f"{side.name}.npy"
    side.ask("save", stage=stage, path=str(path))
    array = np.load(path)
    path.unlink()
    return array
