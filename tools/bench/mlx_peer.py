"""What the workers of peers on MLX share; importing it gives MLX the same BLAS as this project gives it.

The preloading is this project's own file, run by its path: the package is not in the peers' environments.
"""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

_FILE = Path(__file__).resolve().parents[2] / "src" / "qwen4b_asr" / "_blas.py"
_SPEC = importlib.util.spec_from_file_location("_bench_blas", _FILE)
assert _SPEC is not None
assert _SPEC.loader is not None
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)
BLAS: str | None = _MODULE.preload_openblas()

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402


def about(package: str, blas: str | None) -> dict[str, Any]:
    """Return what a peer says of itself."""
    return {
        "versions": {package: version(package), "mlx": version("mlx")},
        "threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "blas": Path(blas).name if blas else None,
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
