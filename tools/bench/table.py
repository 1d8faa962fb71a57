"""Rows as text: a table for the terminal, one for Markdown, from the same cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .paths import IS_REFERENCE
from .rows import Row, notes

NONE = "–"


@dataclass(frozen=True)
class Column:
    """A heading, the cell of a row, and whether it is a number."""

    head: str
    cell: Callable[[Row], str]
    number: bool = True


def columns(rows: Sequence[Row]) -> list[Column]:
    """Return the columns that say something of `rows`: without a GPU, none of the kernel's."""
    kernel = any(row.ways["kernel"].state != "absent" for row in rows)
    names = [("kernel", "kernel, ms")] * kernel
    names += [("reference", "reference, ms"), ("compiled", "compiled, ms"), ("mlx", "MLX op, ms")]
    found = [
        Column("op", lambda row: row.kernel, False),
        Column("case", lambda row: row.case, False),
        Column("dtype", lambda row: row.dtype, False),
    ]
    found += [Column(head, lambda row, name=name: milliseconds(row, name)) for name, head in names]  # type: ignore[misc]
    if kernel:
        found += [
            Column("times reference", lambda row: times(row.ways["kernel"].times_reference)),
            Column("times MLX's best", lambda row: times(row.times_best)),
            Column("of roofline", lambda row: percent(row.roofline_share("kernel"))),
        ]
    found += [
        Column("MLX's best", lambda row: row.best or NONE, False),
        Column("its roofline" if kernel else "of roofline", lambda row: percent(share_of_best(row))),
        Column("spread", lambda row: percent(row.spread)),
    ]
    return found


def milliseconds(row: Row, name: str) -> str:
    """Return the median of a way, or a word for why there is none."""
    way = row.ways[name]
    if way.median is not None:
        return three_digits(1e3 * way.median)
    if way.reason == IS_REFERENCE:
        return "= ref."
    return {"failed": "FAILED", "wrong": "WRONG"}.get(way.state, NONE)


def three_digits(value: float) -> str:
    """Return `value` with three significant digits and no exponent: 0.00123, 1.23, 123, 1230."""
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def times(value: float | None) -> str:
    """Return a factor; above 1 is faster."""
    return NONE if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    """Return a share in percent."""
    if value is None:
        return NONE
    return "<1 %" if 0 < value < 0.01 else f"{100 * value:.0f} %"


def share_of_best(row: Row) -> float | None:
    """Return which part of the roofline the fastest of MLX's own ways reaches."""
    return row.roofline_share(row.best) if row.best else None


def terminal(rows: Sequence[Row], run: Mapping[str, Any]) -> str:
    """Return the table with its reading, for a terminal."""
    head = columns(rows)
    cells = [[column.head for column in head], *([column.cell(row) for column in head] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = [
        "  ".join(
            f"{text:>{width}}" if column.number else f"{text:<{width}}"
            for text, width, column in zip(line, widths, head, strict=True)
        ).rstrip()
        for line in cells
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, "", *counts(rows), *reading(rows, run)])


def markdown(rows: Sequence[Row]) -> str:
    """Return the table as Markdown."""
    head = columns(rows)
    lines = ["| " + " | ".join(column.head for column in head) + " |"]
    lines.append("|" + "|".join("--:" if column.number else "---" for column in head) + "|")
    lines += ["| " + " | ".join(column.cell(row) for column in head) + " |" for row in rows]
    return "\n".join(lines)


def block(rows: Sequence[Row], run: Mapping[str, Any], title: str) -> str:
    """Return what kernels/README.md shows of a device: what ran, on what, the table, and what is missing from it.

    Args:
        rows: The table.
        run: What every row says of the run.
        title: The device's name.
    """
    tf32 = ", TF32 on" if run["tf32"] else ""
    lines = [
        f"### {title}",
        "",
        f"{run['date'][:10]} · {run['os']} · MLX {run['mlx']}, {run['blas'] or 'BLAS of its own'}{tf32}, "
        f"Python {run['python']} · qwen4b-asr {run['project']} at {run['revision'] or 'an unknown revision'}",
        "",
        "```sh",
        run["command"],
        "```",
        "",
        markdown(rows),
        "",
        f"Measured in the same run: {ceilings(run)}.",
    ]
    if load := load_words(run):
        lines[-1] += f" {load}"
    missing = notes(rows)
    return "\n".join([*lines, *([""] if missing else []), *(f"* {note}." for note in missing)])


def load_words(run: Mapping[str, Any]) -> str:
    """Return how busy the machine was, as a sentence; empty where that is not known."""
    before, after, cores = run["load_average"], run.get("load_average_after"), run["device"]["cores"]
    if before is None:
        return ""
    shared = " Other work shared the machine: trust the ratios more than the times." if before >= 0.5 * cores else ""
    return f"Load average {before} before and {after} after, {cores} cores.{shared}"


def ceilings(run: Mapping[str, Any]) -> str:
    """Return the measured roofline in words."""
    roofline = run["roofline"]
    products = ", ".join(f"{dtype} {three_digits(rate / 1e9)}" for dtype, rate in roofline["flops_per_second"].items())
    return f"{three_digits(roofline['bytes_per_second'] / 1e9)} GB/s copied; matrix products in GFLOP/s: {products}"


def reading(rows: Sequence[Row], run: Mapping[str, Any]) -> list[str]:
    """Return how to read the table, and why cells are empty."""
    lines = [
        "ms: median per call, in chains of independent calls; the ways took turns. times: how many times as fast,",
        "above 1 is faster. spread: the largest interquartile range of the row's times.",
        f"roofline, measured in this run: {ceilings(run)}.",
    ]
    if load := load_words(run):
        lines.append(load)
    return lines + [f"{note}." for note in notes(rows)]


def counts(rows: Sequence[Row]) -> list[str]:
    """Return the host runner's counts as lines, none without them."""
    counted = [row for row in rows if row.host_counts]
    if not counted:
        return []
    lines = ["Counts of the kernel's text, run thread by thread on this CPU (what it does, not how fast):"]
    for row in counted:
        said = ", ".join(f"{name.replace('_', ' ')} {number:,}" for name, number in (row.host_counts or {}).items())
        lines.append(f"  {row.kernel} {row.case} {row.dtype}: {said}")
    return [*lines, ""]
