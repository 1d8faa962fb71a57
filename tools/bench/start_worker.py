"""Start a worker: ``python -m bench.start_worker MODULE [preload]``, with an OpenBLAS loaded before MLX if asked for.

This stands before every import of MLX, whoever sorts the imports of the workers. The preloading is this project's own
file, run by its path: the package is not in the peers' environments.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

BLAS_VARIABLE = "BENCH_BLAS"
"""Environment variable that tells the worker which library was loaded; empty for none."""

_FILE = Path(__file__).resolve().parents[2] / "src" / "qwen4b_asr" / "_blas.py"


def main(words: Sequence[str]) -> None:
    """Load the BLAS, then the worker, and serve."""
    os.environ[BLAS_VARIABLE] = (preload() or "") if "preload" in words[1:] else ""
    from bench.worker import serve

    serve(importlib.import_module(f"bench.{words[0]}").build)


def preload() -> str | None:
    """Load the OpenBLAS that this project loads for itself; return its path, None if there is none."""
    spec = importlib.util.spec_from_file_location("_bench_blas", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path: str | None = module.preload_openblas()
    return path


if __name__ == "__main__":
    main(sys.argv[1:])
