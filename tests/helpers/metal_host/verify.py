"""Runs a kernel in every way that Metal leaves open, and wants the same bits each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from .engine_library import Schedule
from .errors import ScheduleError
from .runner import Record, scheduled

POISONS = (0xFF, 0x7F)
"""What unwritten memory holds: NaN in every float type; then NaN in half, a huge number in float and bfloat."""

ORDERS = (
    ("in order", 0, 0),
    ("in reverse order", 1, 0),
    ("in random order 1", 2, 1),
    ("in random order 2", 2, 2),
    ("first SIMD groups far ahead", 3, 0),
    ("last SIMD groups far ahead", 4, 0),
)
SCHEDULES = tuple(
    Schedule(f"{name}, poison {poison:#04x}", order, seed, poison, at_end=(index + turn) % 2 == 0)
    for turn, poison in enumerate(POISONS)
    for index, (name, order, seed) in enumerate(ORDERS)
)
"""Six orders by two poisons. Buffers end at inaccessible memory in one half of them and begin there in the other."""

WHOLE_THREADGROUPS = Schedule("in whole threadgroups, as CUDA launches them", whole_threadgroups=True)


def verify(call: Callable[[], Any], *, whole_threadgroups: bool = True) -> Any:
    """Call a function under every schedule; all launches in it, and what it returns, must agree to the bit.

    Args:
        call: Launches kernels made by `metal_kernel`, and returns arrays (nested in lists, tuples or dicts) or None.
            Must do the same each time.
        whole_threadgroups: Also launch with the grid rounded up to whole threadgroups: the kernel must check its
            bounds in every thread, as its CUDA form has to.

    Returns:
        What the first call returned.

    Raises:
        ScheduleError: If two schedules differ: names the kernel, the output and the first element that does, and
            whether it was never written or depends on the order.
        LaunchError: If a kernel did something undefined.
    """
    first: list[Record] = []
    result: Any = None
    values: list[bytes] = []
    schedules = (*SCHEDULES, WHOLE_THREADGROUPS) if whole_threadgroups else SCHEDULES
    for number, schedule in enumerate(schedules):
        with scheduled(schedule) as records:
            returned = call()
            found = [_bytes(array) for array in _arrays(returned)]
        if number == 0:
            result, first, values = returned, records, found
            if not records:
                raise ScheduleError("[verify] the call should launch a kernel but launched none")
            continue
        _compare(first, records, schedules[0], schedule)
        if found != values:
            raise ScheduleError(f"[verify] results differ between runs {schedules[0].name} and {schedule.name}")
    return result


def _arrays(value: Any) -> Iterator[mx.array]:
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _arrays(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _arrays(item)


def _bytes(array: mx.array) -> bytes:
    contiguous = mx.contiguous(array)
    if contiguous.size == 0:
        return b""
    return np.array(contiguous.reshape(-1).view(mx.uint8)).tobytes()


def _compare(first: list[Record], second: list[Record], one: Schedule, other: Schedule) -> None:
    if [record.kernel for record in first] != [record.kernel for record in second]:
        raise ScheduleError("[verify] the call should launch the same kernels each time but did not")
    for before, after in zip(first, second, strict=True):
        for index, name in enumerate(before.names):
            a, b = before.outputs[index], after.outputs[index]
            if np.array_equal(a, b):
                continue
            size = before.item_bytes[index]
            differing = np.flatnonzero((a.reshape(-1, size) != b.reshape(-1, size)).any(axis=1))
            element = tuple(int(i) for i in np.unravel_index(differing[0], before.shapes[index] or (1,)))
            item = slice(differing[0] * size, (differing[0] + 1) * size)
            unwritten = (a[item] == one.poison).all() and (b[item] == other.poison).all()
            what = (
                "is never written"
                if unwritten and one.poison != other.poison
                else "differs: it depends on the order of threads, or on memory that nobody wrote"
            )
            raise ScheduleError(
                f"[{before.kernel}] element {element} of output {name!r} {what} "
                f"({len(differing)} of {len(a) // size} elements; runs {one.name} and {other.name})"
            )
