"""What the workers on MLX share."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from bench.start_worker import BLAS_VARIABLE


def about(package: str | None = None) -> dict[str, Any]:
    """Return what a side says of itself: its versions, threads and BLAS, and MLX's device."""
    return {
        "versions": {name: version(name) for name in (package, "mlx") if name},
        "threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "blas": Path(os.environ[BLAS_VARIABLE]).name or None,
        "device": str(mx.default_device()),
    }


def to_numpy(array: mx.array) -> np.ndarray:
    """Return an array as NumPy's float32."""
    return np.array(array.astype(mx.float32))


def peak() -> int:
    """Return the most bytes that MLX's arrays took since the last call."""
    most = mx.get_peak_memory()
    mx.reset_peak_memory()
    return most


def evaluated(array: mx.array) -> mx.array:
    """Compute an array and return it."""
    mx.eval(array)
    return array
