"""A residual and the RMS norm that follows it, in one launch.

Source of the maths: the Qwen3 technical report and transformers' ``models/qwen3/modeling_qwen3.py``.
Shapes: B batch, S positions, H width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx

from ._cases import Case, Generator
from ._dispatch import Operation
from ._loader import Kernel

_KERNEL = Kernel("add_rms_norm.metal")
_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
_THREADS = 256


def add_rms_norm(x: mx.array, delta: mx.array, weight: mx.array, *, eps: float) -> tuple[mx.array, mx.array]:
    """Add what a block gives to the stream, and normalise the sum for the next block.

    Args:
        x: The stream (B, S, H), floating point.
        delta: What is added to it, of the same shape.
        weight: Weight of the norm (H,).
        eps: Epsilon of the norm.

    Returns:
        The sum and its norm, (B, S, H) each.

    Raises:
        ValueError: On shapes that do not fit one another.
    """
    if x.ndim != 3 or delta.shape != x.shape or weight.shape != x.shape[2:]:
        raise ValueError(
            f"[add_rms_norm] x and delta must be (B, S, H) and weight (H,) but got {x.shape}, {delta.shape} and "
            f"{weight.shape}"
        )
    if len({x.dtype, delta.dtype, weight.dtype}) > 1 or x.dtype not in _DTYPES or not x.size:
        return add_rms_norm_reference(x, delta, weight, eps=eps)
    pair: tuple[mx.array, mx.array] = OPERATION(x, delta, weight, eps=eps)
    return pair


def add_rms_norm_reference(x: mx.array, delta: mx.array, weight: mx.array, *, eps: float) -> tuple[mx.array, mx.array]:
    """Compute `add_rms_norm` by MLX's own operations; arguments and result as there."""
    total = x + delta
    return total, mx.fast.rms_norm(total, weight, eps)


def add_rms_norm_kernel(x: mx.array, delta: mx.array, weight: mx.array, *, eps: float) -> tuple[mx.array, mx.array]:
    """Compute `add_rms_norm` by the kernel; arguments and result as there."""
    batch, positions, width = x.shape
    rows = batch * positions
    total, normed = _KERNEL(
        inputs=[x.reshape(rows, width), delta.reshape(rows, width), weight, _constant(eps)],
        template=[("T", x.dtype)],
        grid=(_THREADS, rows, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(rows, width)] * 2,
        output_dtypes=[x.dtype] * 2,
    )
    return total.reshape(x.shape), normed.reshape(x.shape)


@lru_cache(maxsize=8)
def _constant(eps: float) -> mx.array:
    return mx.array(eps, dtype=mx.float32)


def _case(name: str, roles: set[str], batch: int, positions: int, width: int) -> Case:
    def make(rng: Generator, dtype: mx.Dtype) -> dict[str, Any]:
        x, delta = (mx.array(rng.standard_normal((batch, positions, width)) * 3).astype(dtype) for _ in range(2))
        return {"x": x, "delta": delta, "weight": mx.array(rng.uniform(0.5, 2.0, width)).astype(dtype), "eps": 1e-6}

    def traffic(arguments: dict[str, Any]) -> int:
        return 4 * int(arguments["x"].nbytes)

    def operations(_: dict[str, Any]) -> int:
        return 5 * batch * positions * width

    return Case(name, make, roles=frozenset(roles), bytes=traffic, flops=operations)


CASES = (
    _case("tiny-step", {"check", "test"}, 1, 1, 40),
    _case("tiny-prompt", {"check", "test"}, 2, 3, 300),
    _case("smallest", {"test"}, 1, 1, 1),
    _case("4b-step", {"bench"}, 1, 1, 2560),
    _case("4b-prompt", {"bench"}, 1, 520, 2560),
    _case("0.6b-step", {"bench"}, 1, 1, 1024),
)
OPERATION = Operation(
    "add_rms_norm",
    kernel=add_rms_norm_kernel,
    reference=add_rms_norm_reference,
    cases=CASES,
    files=("add_rms_norm.metal",),
)
