"""What memory this machine has for a model, and how MLX is held to a part of it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

KEPT_ON_GPU = 256 << 20
"""Bytes of freed buffers that MLX may keep for the next use on a GPU; by default it keeps all that it ever had."""

_GIB = 1 << 30
_CGROUPS = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
_OLD_NAMES = ("memory.limit_in_bytes", "memory.usage_in_bytes")


@dataclass(frozen=True)
class Machine:
    """Bytes of memory; None stands for what cannot be known.

    Args:
        total: What there is, for all programs.
        usable: What a model should not exceed: on Metal the working set that macOS recommends, on a CPU what is free.
    """

    total: int | None
    usable: int | None


def this_machine() -> Machine:
    """Look at the default device's memory."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return _processor()
    info: dict[str, Any] = dict(mx.device_info())
    total = info.get("memory_size") or info.get("total_memory")
    usable = info.get("max_recommended_working_set_size") or info.get("free_memory") or total
    return Machine(total and int(total), usable and int(usable))


def apple_working_set(memory: int) -> int:
    """Return what macOS recommends that a GPU's working set does not exceed, on a machine of so much memory.

    Two thirds up to 32 GB and three quarters above: what Metal's ``recommendedMaxWorkingSetSize`` says where nobody
    has changed ``iogpu.wired_limit_mb``.
    """
    return memory * 2 // 3 if memory <= 32 * _GIB else memory * 3 // 4


def kept_buffers() -> int:
    """Return how many bytes of freed buffers MLX is allowed to keep once `hold` was called."""
    if mx.default_device().type != mx.DeviceType.cpu:
        return KEPT_ON_GPU
    limit = mx.set_cache_limit(0)  # the only way to read it is to set it
    mx.set_cache_limit(limit)
    return int(limit)


def hold(peak: int, limit: int | None = None) -> None:
    """Have MLX free buffers rather than keep them, and keep the model itself from being swapped out.

    Args:
        peak: The most bytes that the arrays will take.
        limit: Bytes of arrays from which on MLX waits for what it has queued before it takes more.
    """
    held = peak + mx.get_active_memory()
    if limit is not None:
        mx.set_memory_limit(max(limit, held))
    if mx.default_device().type == mx.DeviceType.cpu:
        return  # its own limit is 32 MiB
    mx.set_cache_limit(KEPT_ON_GPU)
    if mx.metal.is_available():
        recommended = this_machine().usable
        with suppress(RuntimeError, ValueError):  # before macOS 15, or an administrator allows less
            mx.set_wired_limit(held if recommended is None else min(held, recommended))


def _processor() -> Machine:
    total = _sysconf("SC_PHYS_PAGES") * _sysconf("SC_PAGE_SIZE") or None
    if sys.platform == "darwin":
        return Machine(total, total and apple_working_set(total))
    usable = _available() or total
    for most, used in _cgroups():
        total = most if total is None else min(total, most)
        usable = max(most - used, 0) if usable is None else min(usable, max(most - used, 0))
    return Machine(total, usable)


def _sysconf(name: str) -> int:
    try:
        return max(os.sysconf(name), 0)
    except (AttributeError, ValueError, OSError):  # Windows, or a system without it
        return 0


def _available() -> int | None:
    """Bytes that Linux can give without swapping."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read(_PROC / "meminfo"), re.MULTILINE)
    return int(match[1]) << 10 if match else None


def _cgroups() -> Iterator[tuple[int, int]]:
    """Yield limit and use of every control group that this process is in; what files cache can be had back."""
    for line in _read(_PROC / "self" / "cgroup").splitlines():
        _, controllers, place = (*line.split(":", 2), "", "")[:3]
        if controllers not in ("", "memory"):
            continue
        root = _CGROUPS / controllers
        names = ("memory.max", "memory.current") if not controllers else _OLD_NAMES
        folder = root / place.strip("/")
        for group in (folder, *folder.parents):
            limit, used = (_read(group / name).strip() for name in names)
            if limit.isdecimal() and used.isdecimal():
                cached = re.search(r"^(?:total_)?inactive_file (\d+)", _read(group / "memory.stat"), re.MULTILINE)
                yield int(limit), int(used) - (int(cached[1]) if cached else 0)
            if group == root:
                break


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
