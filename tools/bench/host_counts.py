"""What a kernel's text does when it is run thread by thread on the CPU: counts, which do not depend on the machine.

The tests' host runner does the running (tests/helpers/metal_host). How long that takes says nothing of a GPU, so no
time is taken here at all.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from .check import arrays
from .facts import ROOT

if TYPE_CHECKING:
    from qwen4b_asr.kernels._cases import Case
    from qwen4b_asr.kernels._dispatch import Operation


def unavailable() -> str | None:
    """Return why nothing can be counted here, or None."""
    try:
        return _runner().unavailable()
    except ImportError as error:
        return f"it needs the checkout's tests/helpers: {error}"


def count(operation: Operation, case: Case, dtype: str) -> dict[str, int]:
    """Run a kernel once on the CPU and count.

    Args:
        operation: Whose kernel.
        case: The sizes.
        dtype: Element type, one of the case's.

    Returns:
        Launches; threads; barriers and SIMD-group functions that they called, each thread's call counted; bytes of
        threadgroup memory of the launch that takes most.
    """
    from qwen4b_asr.kernels._loader import override

    counts = dict.fromkeys(("launches", "threads", "barrier_calls", "simd_calls", "threadgroup_bytes"), 0)
    metal_kernel = _runner().metal_kernel

    def factory(**parameters: Any) -> Callable[..., Any]:
        kernel = metal_kernel(**parameters)

        def launch(**call: Any) -> Any:
            outputs = kernel(**call)
            did = kernel.statistics
            counts["launches"] += 1
            counts["threads"] += did.threads
            counts["barrier_calls"] += did.barriers
            counts["simd_calls"] += did.simd_calls
            counts["threadgroup_bytes"] = max(counts["threadgroup_bytes"], did.threadgroup_bytes)
            return outputs

        return launch

    with override("metal", factory):
        mx.eval(arrays(operation.kernel(**case.arguments(dtype))))
    return counts


def _runner() -> ModuleType:
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return importlib.import_module("tests.helpers.metal_host")
