"""The engine and kernels as seen through ctypes; structures are those of engine/runtime.h and engine/regions.h."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .build import engine
from .errors import LaunchError

INPUT, OUTPUT, METADATA = 0, 1, 2
LOCK = threading.Lock()  # the engine runs one launch at a time
VECTOR_ALIGNMENT = 16
LIMIT_SECONDS = int(os.environ.get("METAL_HOST_LIMIT_SECONDS", "60"))
"""Processor time that one launch may take before it counts as endless."""


class Region(ctypes.Structure):
    """A piece of memory between inaccessible pages."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("body", ctypes.c_void_p),
        ("body_bytes", ctypes.c_uint64),
        ("kind", ctypes.c_int32),
        ("canary", ctypes.c_int32),
    )


class Launch(ctypes.Structure):
    """How to run a kernel."""

    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("order", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
        ("poison", ctypes.c_int32),
        ("whole_threadgroups", ctypes.c_int32),
        ("at_end", ctypes.c_int32),
        ("limit_seconds", ctypes.c_int32),
        ("vectors", ctypes.c_int32),
    )


class Report(ctypes.Structure):
    """What happened."""

    _fields_ = (
        ("threads", ctypes.c_uint64),
        ("switches", ctypes.c_uint64),
        ("barriers", ctypes.c_uint64),
        ("simd_calls", ctypes.c_uint64),
        ("threadgroup_bytes", ctypes.c_uint64),
        ("error", ctypes.c_char * 1024),
    )


@dataclass(frozen=True)
class Schedule:
    """One way of running a kernel, in what Metal leaves open.

    Attributes:
        name: For messages.
        order: Which threads run first (`Order` in engine/runtime.h).
        seed: Of the random order.
        poison: The byte that fills memory nobody has written.
        at_end: Whether buffers end, or begin, at inaccessible memory.
        whole_threadgroups: Launch whole threadgroups only, as CUDA does, however the grid ends.
    """

    name: str
    order: int = 0
    seed: int = 0
    poison: int = 0xFF
    at_end: bool = True
    whole_threadgroups: bool = False


@dataclass
class Buffer:
    """Memory to hand to a kernel.

    Attributes:
        name: For messages.
        kind: INPUT, OUTPUT or METADATA.
        content: What it holds at first (uint8).
        origin: Where in it the kernel's pointer points, in bytes.
        item_bytes: Of one element.
        misalignment: Of the pointer, modulo 16.
    """

    name: str
    kind: int
    content: np.ndarray
    origin: int = 0
    item_bytes: int = 1
    misalignment: int = 0


@functools.cache
def _engine() -> ctypes.CDLL:
    library = ctypes.CDLL(str(engine()))
    region = ctypes.POINTER(Region)
    library.metal_host_services.restype = ctypes.c_void_p
    library.metal_host_fibers.restype = ctypes.c_char_p
    library.metal_host_region_map.argtypes = (region, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_int)
    library.metal_host_region_unmap.argtypes = (region,)
    library.metal_host_region_protect.argtypes = (region,)
    library.metal_host_region_damage.argtypes = (region,)
    library.metal_host_region_damage.restype = ctypes.c_int64
    return library


def fibers() -> str:
    """Return how the engine switches between threads: ``x86-64``, ``arm64`` or ``ucontext``."""
    return str(_engine().metal_host_fibers().decode())


@functools.cache
def kernel_entry(path: Path) -> ctypes._CFuncPtr:
    """Load a kernel's library, link it to the engine and return its entry point."""
    library = ctypes.CDLL(str(path))
    library.metal_host_bind.argtypes = (ctypes.c_void_p,)
    library.metal_host_bind(_engine().metal_host_services())
    return library.metal_host_entry


@contextmanager
def _regions(buffers: list[Buffer], schedule: Schedule, vectors: bool) -> Iterator[ctypes.Array[Region]]:
    regions = (Region * len(buffers))()
    try:
        for region, buffer in zip(regions, buffers, strict=True):
            region.name, region.kind, region.bytes = buffer.name.encode(), buffer.kind, buffer.content.nbytes
            # Without vector types nothing needs more than an element's alignment: guards stand flush at both ends.
            alignment = VECTOR_ALIGNMENT if vectors else buffer.item_bytes
            misalignment = (buffer.misalignment - buffer.origin) % alignment
            if not _engine().metal_host_region_map(
                ctypes.byref(region), alignment, misalignment, schedule.at_end, schedule.poison
            ):
                raise MemoryError(f"no address space for buffer {buffer.name!r} of {buffer.content.nbytes} bytes")
            ctypes.memmove(region.data, buffer.content.ctypes.data, buffer.content.nbytes)
            if buffer.kind != OUTPUT:
                _engine().metal_host_region_protect(ctypes.byref(region))
        yield regions
    finally:
        for region in regions:
            _engine().metal_host_region_unmap(ctypes.byref(region))


def launch(
    entry: ctypes._CFuncPtr,
    kernel: str,
    buffers: list[Buffer],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    schedule: Schedule,
    vectors: bool,
) -> tuple[list[np.ndarray], Report]:
    """Run a kernel once.

    Args:
        entry: From `kernel_entry`.
        kernel: Its name, for messages.
        buffers: Its arguments in order.
        grid: Threads along each axis.
        threadgroup: Threads of a threadgroup along each axis.
        schedule: In which order to run them, and with what in unwritten memory.
        vectors: Whether the kernel reads and writes vectors.

    Returns:
        The bytes of every OUTPUT buffer, and what happened.

    Raises:
        LaunchError: If the kernel did something undefined.
    """
    settings = Launch(
        kernel=kernel.encode(),
        grid=(ctypes.c_uint32 * 3)(*grid),
        threadgroup=(ctypes.c_uint32 * 3)(*threadgroup),
        order=schedule.order,
        seed=schedule.seed,
        poison=schedule.poison,
        whole_threadgroups=schedule.whole_threadgroups,
        at_end=schedule.at_end,
        limit_seconds=LIMIT_SECONDS,
        vectors=vectors,
    )
    report = Report()
    with LOCK, _regions(buffers, schedule, vectors) as regions:
        pointers = (ctypes.c_void_p * len(buffers))(
            *(region.data + buffer.origin for region, buffer in zip(regions, buffers, strict=True))
        )
        status = _engine().metal_host_launch(
            entry, pointers, regions, len(buffers), ctypes.byref(settings), ctypes.byref(report)
        )
        if status:
            raise LaunchError(report.error.decode(errors="replace"))
        outputs = []
        for region, buffer in zip(regions, buffers, strict=True):
            if buffer.kind != OUTPUT:
                continue
            if offset := _engine().metal_host_region_damage(ctypes.byref(region)):
                raise LaunchError(
                    f"[{kernel}] wrote to byte {offset} of output {buffer.name!r}, which has {buffer.content.nbytes}"
                )
            outputs.append(np.frombuffer(ctypes.string_at(region.data, region.bytes), np.uint8))
    return outputs, report
