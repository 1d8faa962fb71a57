"""A row: one case of one kernel in one element type, with what every way to compute it took.

As JSON, a row is one object on one line (`SCHEMA` is its version; raise it when the meaning of a key changes):

    schema, date, command, project, revision, mlx, python, os, device, blas, tf32, load_average,
    load_average_after   the run
    roofline      bytes_per_second, flops_per_second by element type: ceilings measured in the same run
    kernel, case, dtype                        what was timed
    bytes, flops  what the case has to move and to compute at the least; null where the case does not say
    floor         seconds and bound ("bytes" or "flops"): the least time under the roofline
    rounds, chain rounds taken, calls in a sample
    ways          by name (kernel, reference, compiled, mlx):
                    state    "timed", "absent" (there is none here), "failed" (it raised), "wrong" (it was compared
                             with the reference and differs)
                    reason   why it was not timed
                    median, q1, q3   seconds per call in a chain of independent calls, waited for at its end
                    build    of these, seconds in which Python built the graph
                    alone    seconds of a call by itself, with its launch and the wait for it
                    times_reference  how many times as fast as the reference; above 1 is faster
    best          the fastest of reference, compiled, mlx: what MLX gives without a kernel
    times_best    how many times as fast as that the kernel is; null where it was not timed
    host_counts   counts from running the kernel's text on the CPU, on request; never a time
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .paths import NAMES, PLAIN
from .roofline import Floor
from .timing import Samples, ratio, summarise

SCHEMA = 1
State = Literal["timed", "absent", "failed", "wrong"]
_SECONDS = ("seconds", "ms", "median", "q1", "q3", "build", "alone", "speed")


@dataclass(frozen=True)
class Outcome:
    """What came of one way; times in seconds per call."""

    state: State
    reason: str = ""
    median: float | None = None
    q1: float | None = None
    q3: float | None = None
    build: float | None = None
    alone: float | None = None
    times_reference: float | None = None


@dataclass(frozen=True)
class Row:
    """One case of one kernel in one element type; the module says what each attribute means."""

    kernel: str
    case: str
    dtype: str
    bytes: int | None
    flops: int | None
    floor: Floor | None
    rounds: int
    chain: int
    ways: dict[str, Outcome]
    best: str | None = None
    times_best: float | None = None
    host_counts: dict[str, int] | None = field(default=None)

    def roofline_share(self, name: str) -> float | None:
        """Return which part of the roofline a way reaches, 1 being all of it; None where it is not known."""
        median = self.ways[name].median
        return self.floor.seconds / median if self.floor and median else None

    @property
    def spread(self) -> float | None:
        """The largest interquartile range among the ways, relative to its median: how disturbed the row is."""
        return max(
            ((way.q3 - way.q1) / way.median for way in self.ways.values() if way.median and way.q3 and way.q1),
            default=None,
        )

    @property
    def broken(self) -> bool:
        """Whether the kernel or the reference failed, or any way gave another result.

        That MLX cannot compile a reference, say, is no defect of a kernel.
        """
        failed = any(self.ways[name].state == "failed" for name in ("kernel", "reference"))
        return failed or any(way.state == "wrong" for way in self.ways.values())


def outcomes(samples: Mapping[str, Samples], untimed: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """Return what came of every way, in the order of `NAMES`.

    Args:
        samples: Of the ways that were timed.
        untimed: The others.
    """
    found = dict(untimed)
    for name, sample in samples.items():
        total = summarise(sample.total)
        found[name] = Outcome(
            "timed",
            median=total.median,
            q1=total.q1,
            q3=total.q3,
            build=summarise(sample.build).median,
            alone=summarise(sample.alone).median,
            times_reference=ratio(samples["reference"].total, sample.total) if "reference" in samples else None,
        )
    return {name: found[name] for name in NAMES}


def best_plain(samples: Mapping[str, Samples]) -> str | None:
    """Return the fastest way that is not the kernel."""
    plain = [name for name in PLAIN if name in samples]
    return min(plain, key=lambda name: summarise(samples[name].total).median, default=None)


def as_json(row: Row, run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row as the module describes it.

    Args:
        row: The row.
        run: What every row of the run says.

    Raises:
        ValueError: If it claims a kernel's time where no GPU ran it, or a time among the counts.
    """
    refuse_emulated(row, run["device"]["backend"])
    ways = {
        name: {key: value for key, value in asdict(way).items() if value not in (None, "")}
        for name, way in row.ways.items()
    }
    return {"schema": SCHEMA, **run, **asdict(row), "ways": ways}


def refuse_emulated(row: Row, backend: str | None) -> None:
    """Refuse a row that gives an emulated time as a kernel's speed.

    Args:
        row: The row.
        backend: What ran kernels; None where nothing did.

    Raises:
        ValueError: If it claims a kernel's time where no GPU ran it, or a time among the counts.
    """
    kernel = row.ways["kernel"]
    if backend is None and (kernel.state == "timed" or kernel.median is not None or row.times_best is not None):
        raise ValueError(f"[{row.kernel}] a kernel's time must come from a GPU but there is none")
    times = [name for name in row.host_counts or {} if set(name.lower().split("_")) & set(_SECONDS)]
    if times:
        raise ValueError(f"[{row.kernel}] counts of the host runner must not hold times but got {times}")


def notes(rows: Sequence[Row]) -> list[str]:
    """Return why ways were not timed, each reason once, with the kernels that it holds for."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, way in row.ways.items():
            if way.state != "timed":
                mark = "" if way.state == "absent" else f"{way.state}: "
                where = row.kernel if way.state == "absent" else f"{row.kernel} {row.case} {row.dtype}"
                found.setdefault((name, mark + way.reason), []).append(where)
    kernels = {row.kernel for row in rows}
    return [
        f"{name}: {reason}" + ("" if set(where) == kernels else f" ({', '.join(dict.fromkeys(where))})")
        for (name, reason), where in found.items()
    ]
