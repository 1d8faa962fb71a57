"""Whether two ways computed the same: a wrong result's time is worth nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from qwen4b_asr.kernels._dispatch import Operation

LIMIT = {"float32": 1e-4, "float16": 8 * 2.0**-10, "bfloat16": 8 * 2.0**-7}
"""Largest difference allowed, relative to the largest value expected.

For real sizes, where both sides add up hundreds of products and rotate by hundreds of radians, each with rounding of
its own. It is there to see a wrong tile or a wrong row; the kernels' own cases and tests judge to the last bits.
"""


def difference(actual: Any, expected: Any) -> str | None:
    """Compare two results.

    Args:
        actual: An array, or a sequence of arrays.
        expected: What it should be.

    Returns:
        What differs, or None.
    """
    got, wanted = arrays(actual), arrays(expected)
    if len(got) != len(wanted):
        return f"{len(got)} results instead of {len(wanted)}"
    for index, (one, other) in enumerate(zip(got, wanted, strict=True)):
        if said := _compare(one, other):
            return said if len(got) == 1 else f"result {index}: {said}"
    return None


def arrays(result: Any) -> list[mx.array]:
    """Return an operation's result, one array or a sequence of them, as a list."""
    return [result] if isinstance(result, mx.array) else list(result)


def self_check(operation: Operation) -> str | None:
    """Compare a kernel with its reference on its small cases, as the program does before it first trusts it.

    Args:
        operation: Whose kernel to try, on a GPU.

    Returns:
        What is wrong with it, or None.
    """
    from qwen4b_asr.kernels._selfcheck import find_mismatch

    return find_mismatch(operation.kernel, operation.reference, operation.cases)


def _compare(got: mx.array, wanted: mx.array) -> str | None:
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return f"{got.shape} of {got.dtype} instead of {wanted.shape} of {wanted.dtype}"
    if not mx.issubdtype(wanted.dtype, mx.floating):
        wrong = int(np.sum(np.array(got) != np.array(wanted)))
        return f"{wrong} of {wanted.size} values differ from the reference's" if wrong else None
    one, other = (np.array(array.astype(mx.float32)).astype(np.float64) for array in (got, wanted))
    finite = np.isfinite(other)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return "infinities or NaN are not where the reference's are"
    if not np.isfinite(one[finite]).all():
        return "infinities or NaN where the reference has none"
    error = float(np.abs(one[finite] - other[finite]).max(initial=0))
    allowed = LIMIT[str(wanted.dtype).removeprefix("mlx.core.")] * float(np.abs(other[finite]).max(initial=0))
    return None if error <= allowed else f"off the reference by {error:.3g}, allowed {allowed:.3g}"
