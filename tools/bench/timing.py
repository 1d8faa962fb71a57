"""Times of several ways to compute the same thing, taken in turns.

The ways take turns within one run, round by round and in changing order, so that whatever else the machine does slows
all of them alike; ratios are of neighbours in time. One sample is a chain of independent calls that is built, evaluated
and waited for as a whole, long enough that the launch and the wait at its end do not count. What a single call costs
with them is measured beside it (`Samples.alone`), and so is the part that Python takes to build the graph.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

Arguments = dict[str, Any]
Call = Callable[[Arguments], Any]

LEAST_ROUNDS = 3


@dataclass
class Samples:
    """What was measured of one way, in seconds per call; one entry per round."""

    total: list[float] = field(default_factory=list)
    build: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of some seconds."""

    median: float
    q1: float
    q3: float


def summarise(seconds: Sequence[float]) -> Summary:
    """Return median and quartiles.

    Args:
        seconds: At least one.
    """
    if len(seconds) == 1:
        return Summary(seconds[0], seconds[0], seconds[0])
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return Summary(median, q1, q3)


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Return the median of the rounds' ratios: how many times longer `over` takes than `under`."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def run_chain(call: Call, inputs: Sequence[Arguments], length: int, first: int = 0) -> tuple[float, float]:
    """Compute `length` independent calls and wait for all of them.

    Args:
        call: What to time.
        inputs: Sets of arguments, used in turn: one set alone would stay in the cache.
        length: Calls.
        first: Where among `inputs` to begin.

    Returns:
        Seconds that building the graph took, and seconds in all.
    """
    start = time.perf_counter()
    results = [call(inputs[(first + i) % len(inputs)]) for i in range(length)]
    built = time.perf_counter()
    mx.eval(results)
    mx.synchronize()
    return built - start, time.perf_counter() - start


def chain_length(run: Callable[[int], float], target_seconds: float, most: int) -> int:
    """Return how many calls make a sample of `target_seconds`, at most `most`.

    Args:
        run: Seconds that a chain of the given length takes.
        target_seconds: What a sample should last, so that the clock's and the launch's share is small.
        most: Upper bound.
    """
    length = 1
    while length < most:
        seconds = run(length)
        if seconds >= target_seconds:
            break
        # At least that many: the launch and the wait, which the measured seconds hold too, do not grow along.
        wanted = math.ceil(length * target_seconds / max(seconds, 1e-9))
        length = min(most, max(length + 1, wanted))
    return length


def take_turns(
    calls: Mapping[str, Call], inputs: Sequence[Arguments], length: int, rounds: int, seconds: float
) -> dict[str, Samples]:
    """Sample every call in every round.

    Args:
        calls: What to time, by name; each has run before, so that nothing is compiled in here.
        inputs: Sets of arguments.
        length: Calls in a sample.
        rounds: Rounds to take.
        seconds: No round begins after so many, once there are `LEAST_ROUNDS`.

    Returns:
        Samples by name.
    """
    samples = {name: Samples() for name in calls}
    names = list(calls)
    end = time.perf_counter() + seconds
    for turn in range(rounds):
        if turn >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        shift = turn % len(names)
        order = names[shift:] + names[:shift]
        for name in order if turn % 2 == 0 else order[::-1]:
            build, total = run_chain(calls[name], inputs, length, first=turn)
            samples[name].total.append(total / length)
            samples[name].build.append(build / length)
            samples[name].alone.append(total if length == 1 else run_chain(calls[name], inputs, 1, first=turn)[1])
    return samples
