"""From an operation's case to its row: make inputs, compare, warm up, take turns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from .check import arrays, difference
from .facts import Device
from .paths import ways
from .roofline import Roofline
from .rows import Outcome, Row, best_plain, outcomes
from .timing import Arguments, Call, chain_length, ratio, run_chain, take_turns

if TYPE_CHECKING:
    from qwen4b_asr.kernels._cases import Case
    from qwen4b_asr.kernels._dispatch import Operation

# Inputs of so many bytes in all do not fit a cache, so each call reads from memory, as the roofline's copy does.
COLD_BYTES = {"cpu": 64 * 2**20, "gpu": 256 * 2**20}
MOST_SETS = 8
MOST_RESULT_BYTES = 2**30
MOST_CALLS = 256


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: Rounds of a case at most.
        seconds: Of a case, after which no further round begins.
        sample_seconds: What one sample should last at least.
        check: Compare every way with the reference first.
    """

    rounds: int = 15
    seconds: float = 5.0
    sample_seconds: float = 0.02
    check: bool = False


def measure(
    operation: Operation,
    case: Case,
    dtype: str,
    device: Device,
    roofline: Roofline,
    effort: Effort,
    *,
    instead: Outcome | None = None,
) -> Row:
    """Time every way to compute one case.

    Args:
        operation: Whose case it is.
        case: The sizes.
        dtype: Element type, one of the case's.
        device: MLX's default device.
        roofline: What it can do at best.
        effort: How long to measure.
        instead: What is known to be wrong with the kernel, which is then not run.
    """
    inputs = input_sets(case, dtype, COLD_BYTES[device.type])
    moved = case.bytes(inputs[0]) if case.bytes else None
    flops = case.flops(inputs[0]) if case.flops else None
    calls: dict[str, Call] = {}
    untimed: dict[str, Outcome] = {}
    results: dict[str, Any] = {}
    for name, way in ways(operation, inputs[0], device).items():
        if name == "kernel" and instead is not None:
            untimed[name] = instead
        elif way.call is None:
            untimed[name] = Outcome("absent", way.reason)
        else:
            try:
                for _ in range(2):  # the first compiles; what the second still does, every call does
                    results[name] = way.call(inputs[0])
                    mx.eval(results[name])
                calls[name] = way.call
            except Exception as error:  # whatever a compiler or a driver raises: the others are still to be timed
                untimed[name] = Outcome("failed", f"{type(error).__name__}: {first_line(error)}")
    if effort.check and "reference" in calls:
        for name in [name for name in calls if name != "reference"]:
            said = difference(results[name], results["reference"])
            if said:
                untimed[name] = Outcome("wrong", said)
                del calls[name]
    most = max(1, min(MOST_CALLS, MOST_RESULT_BYTES // max(1, result_bytes(results))))
    results.clear()
    length = longest_chain(calls, inputs, effort.sample_seconds, most)
    samples = take_turns(calls, inputs, length, effort.rounds, effort.seconds)
    mx.clear_cache()
    best = best_plain(samples)
    return Row(
        kernel=operation.name,
        case=case.name,
        dtype=dtype,
        bytes=moved,
        flops=flops,
        floor=roofline.floor(moved, flops, dtype),
        rounds=max((len(sample.total) for sample in samples.values()), default=0),
        chain=length,
        ways=outcomes(samples, untimed),
        best=best,
        times_best=ratio(samples[best].total, samples["kernel"].total) if best and "kernel" in samples else None,
    )


def input_sets(case: Case, dtype: str, total_bytes: int) -> list[Arguments]:
    """Make as many sets of arguments as fill `total_bytes`, `MOST_SETS` at most, evaluated."""
    first = case.arguments(dtype)
    size = sum(value.nbytes for value in first.values() if isinstance(value, mx.array))
    count = min(MOST_SETS, math.ceil(total_bytes / max(1, size)))
    sets: list[Arguments] = [first, *(case.arguments(dtype, seed) for seed in range(1, count))]
    mx.eval([[value for value in one.values() if isinstance(value, mx.array)] for one in sets])
    return sets


def longest_chain(calls: Mapping[str, Call], inputs: list[Arguments], seconds: float, most: int) -> int:
    """Return the chain with which the fastest way lasts `seconds`: one length for all, so that ratios are fair."""
    alone = {name: run_chain(call, inputs, 1)[1] for name, call in calls.items()}
    if not alone:
        return 1
    fastest = calls[min(alone, key=lambda name: alone[name])]
    return chain_length(lambda length: run_chain(fastest, inputs, length)[1], seconds, most)


def result_bytes(results: Mapping[str, Any]) -> int:
    """Return the bytes of the largest result."""
    return max((sum(array.nbytes for array in arrays(result)) for result in results.values()), default=0)


def first_line(error: Exception) -> str:
    """Return the first line of what an error says: a compiler says much more."""
    return (str(error).strip().splitlines() or ["it says nothing"])[0]
