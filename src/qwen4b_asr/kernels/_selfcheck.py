"""Whether a kernel computes on this machine what its plain operations compute, and where the answer is kept."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from ._cases import Case

ALLOWANCE = {"float32": 32.0, "float16": 2.0, "bfloat16": 2.0}
"""Error that is always allowed, in units of the type's precision times the largest value expected.

Twice the plain operations' own error is allowed besides. In float32 those may happen to add up in the very order of
the exact result, so that there sums of some hundred products need room of their own.
"""


def find_mismatch(kernel: Callable[..., Any], reference: Callable[..., Any], cases: Iterable[Case]) -> str | None:
    """Compare a kernel with its plain operations on the cases whose role is ``check``.

    Its error must be at most twice that of the plain operations in the same element type, both against float32 on the
    CPU, plus `ALLOWANCE`; results that are no floats must be equal.

    Args:
        kernel: The kernel's launch.
        reference: The plain operations, with the same arguments.
        cases: What to try.

    Returns:
        What differs, with the case and the type, or None.

    Raises:
        Exception: What either of them raises.
    """
    for case in cases:
        for dtype in case.dtypes if "check" in case.roles else ():
            arguments = case.arguments(dtype)
            # The kernel first: what it leaves unwritten must not hold the plain result's freed memory.
            actual = _results(kernel(**arguments))
            mx.eval(actual)
            plain = _results(reference(**arguments))
            with mx.stream(mx.cpu):
                exact = _results(reference(**{name: _widened(value) for name, value in arguments.items()}))
                mx.eval(exact)
            mx.eval(plain)
            if len(actual) != len(plain):
                return f"{case.name}, {dtype}: {len(actual)} results instead of {len(plain)}"
            for index, trio in enumerate(zip(actual, plain, exact, strict=True)):
                if problem := compare(*trio):
                    return f"{case.name}, {dtype}, result {index}: {problem}"
    return None


def compare(actual: mx.array, plain: mx.array, exact: mx.array) -> str | None:
    """Judge one result of a kernel.

    Args:
        actual: The kernel's.
        plain: The plain operations', in the same element type.
        exact: The plain operations' from inputs widened to float32.

    Returns:
        What is wrong with it, or None.
    """
    if actual.shape != plain.shape or actual.dtype != plain.dtype:
        return f"{actual.shape} of {actual.dtype} instead of {plain.shape} of {plain.dtype}"
    with mx.stream(mx.cpu):  # in float64, which no GPU has
        if not mx.issubdtype(plain.dtype, mx.floating):
            wrong = cast(int, (actual != plain).sum().item())
            return f"{wrong} of {plain.size} values differ" if wrong else None
        got, low, high = (array.astype(mx.float64) for array in (actual, plain, exact))
        finite = mx.isfinite(low)
        same_places = mx.isfinite(got) == finite
        same_values = finite | (got == low) | (mx.isnan(got) & mx.isnan(low))
        if not (same_places & same_values).all().item():
            return "infinities or NaN are not where they should be"
        name = str(plain.dtype).removeprefix("mlx.core.")
        own, scale, error = (_largest(values, finite) for values in (low - high, high, got - high))
        allowed = 2 * own + ALLOWANCE[name] * mx.finfo(plain.dtype).eps * scale
        return None if error <= allowed else f"error {error:.3g}, allowed {allowed:.3g}"


def _largest(values: mx.array, where: mx.array) -> float:
    """The largest magnitude among some values; 0 among none."""
    return cast(float, mx.where(where, mx.abs(values), 0).max().item()) if values.size else 0.0


def _results(value: Any) -> list[mx.array]:
    return [value] if isinstance(value, mx.array) else list(value)


def _widened(value: Any) -> Any:
    if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating):
        return value.astype(mx.float32)
    return value


# --- What is remembered -------------------------------------------------------------------------------------------


def machine(backend: str) -> dict[str, str]:
    """Return what a passed check depends on besides the kernel: MLX, the GPU, and the system with its compiler."""
    info = mx.device_info()
    return {
        "mlx": version("mlx"),
        "backend": backend,
        "device": f"{info.get('device_name', 'unknown')} {info.get('architecture', '')}".strip(),
        "system": platform.platform(),
    }


def cache_folder() -> Path | None:
    """Return the folder for remembered checks, or None if the user has no home; it need not exist."""
    try:
        if configured := os.environ.get("XDG_CACHE_HOME"):
            base = Path(configured)
        else:
            base = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    except RuntimeError:
        return None
    return base / "qwen4b-asr" / "kernels" if base.is_absolute() else None


def has_passed(key: Mapping[str, str]) -> bool:
    """Return whether a check with this very key is remembered; a damaged file is none."""
    path = _file(key)
    try:
        return path is not None and json.loads(path.read_text(encoding="utf-8")) == dict(key)
    except (OSError, ValueError):
        return False


def remember_passed(key: Mapping[str, str]) -> None:
    """Keep a passed check for the next start, if that can be written; failures are not kept, they may be passing."""
    path = _file(key)
    if path is None:
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(dict(key), indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        pass


def _file(key: Mapping[str, str]) -> Path | None:
    folder = cache_folder()
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
    return folder / f"{key['kernel']}-{digest[:16]}.json" if folder else None
