"""Qwen3's per-head RMS norm and rotary positions of queries and keys, in one launch for a step or a prompt.

Source of the maths: the Qwen3 technical report and transformers' ``models/qwen3/modeling_qwen3.py``; rotation by
halves as in ``rotate_half``.
Shapes: B batch, S positions, H query heads, G key heads, E head width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx

from ._cases import Case, Generator
from ._dispatch import Operation
from ._loader import Kernel

_KERNEL = Kernel("qk_norm_rope.metal")
_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# A step has too few heads to fill a GPU, so each gets a SIMD group; a prompt shares the angles among four.
_PROMPT_RUN = 4
_PROMPT_POSITIONS = 32


def qk_norm_rope(
    q: mx.array,
    k: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    *,
    eps: float,
    theta: float,
    offset: int | mx.array = 0,
) -> tuple[mx.array, mx.array]:
    """Normalise each head of queries and keys and rotate it by its position.

    Args:
        q: Queries (B, S, H, E) as projected, floating point, E even.
        k: Keys (B, S, G, E), of the dtype of `q`.
        q_weight: Norm weight of the queries (E,).
        k_weight: Norm weight of the keys (E,).
        eps: Epsilon of the norms.
        theta: Base of the rotary frequencies.
        offset: Position of row 0, below 2^24; a 0-d int32 array where it is computed on the device, (B,) where each
            item has its own, which the kernel leaves to the plain operations.

    Returns:
        Queries (B, H, S, E) and keys (B, G, S, E), ready for attention and cache.

    Raises:
        ValueError: On shapes that do not fit one another.
    """
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.shape[3] % 2:
        raise ValueError(
            f"[qk_norm_rope] q and k must be (B, S, heads, E) with one B, S and even E but got {q.shape} and {k.shape}"
        )
    if q_weight.shape != q.shape[3:] or k_weight.shape != k.shape[3:]:
        raise ValueError(
            f"[qk_norm_rope] norm weights must be {q.shape[3:]} but got {q_weight.shape} and {k_weight.shape}"
        )
    if isinstance(offset, mx.array) and offset.shape not in ((), (q.shape[0],)):
        raise ValueError(f"[qk_norm_rope] offset must be () or ({q.shape[0]},) but got {offset.shape}")
    dtypes = {q.dtype, k.dtype, q_weight.dtype, k_weight.dtype}
    apart = isinstance(offset, mx.array) and offset.ndim > 0
    if apart or len(dtypes) > 1 or q.dtype not in _DTYPES or not (q.size and k.size):
        return qk_norm_rope_reference(q, k, q_weight, k_weight, eps=eps, theta=theta, offset=offset)
    rotated: tuple[mx.array, mx.array] = OPERATION(q, k, q_weight, k_weight, eps=eps, theta=theta, offset=offset)
    return rotated


def qk_norm_rope_reference(
    q: mx.array,
    k: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    *,
    eps: float,
    theta: float,
    offset: int | mx.array = 0,
) -> tuple[mx.array, mx.array]:
    """Compute `qk_norm_rope` by MLX's own operations; arguments and result as there."""

    def turn(x: mx.array, weight: mx.array) -> mx.array:
        x = mx.fast.rms_norm(x, weight, eps).swapaxes(1, 2)
        return mx.fast.rope(x, x.shape[-1], traditional=False, base=theta, scale=1.0, offset=offset)

    return turn(q, q_weight), turn(k, k_weight)


def qk_norm_rope_kernel(
    q: mx.array,
    k: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    *,
    eps: float,
    theta: float,
    offset: int | mx.array = 0,
) -> tuple[mx.array, mx.array]:
    """Compute `qk_norm_rope` by the kernel; arguments and result as there."""
    batch, positions, q_heads, width = q.shape
    k_heads = k.shape[2]
    run = _PROMPT_RUN if batch * positions >= _PROMPT_POSITIONS else 1
    frequency, epsilon = _constants(width, theta, eps)
    start = offset.astype(mx.int32) if isinstance(offset, mx.array) else mx.array(offset, dtype=mx.int32)
    q_out, k_out = _KERNEL(
        inputs=[q, k, q_weight, k_weight, frequency, epsilon, start],
        template=[("T", q.dtype), ("E", width), ("RUN", run)],
        grid=(32 * batch * positions, -(-(q_heads + k_heads) // run), 1),
        threadgroup=(32, 4, 1),
        output_shapes=[(batch, heads, positions, width) for heads in (q_heads, k_heads)],
        output_dtypes=[q.dtype, q.dtype],
    )
    return q_out, k_out


@lru_cache(maxsize=8)
def _constants(width: int, theta: float, eps: float) -> tuple[mx.array, mx.array]:
    """Return the angle per position of each pair (E / 2,), rounded once, and epsilon ()."""
    frequencies = [theta ** (-2 * i / width) for i in range(width // 2)]
    return mx.array(frequencies, dtype=mx.float32), mx.array(eps, dtype=mx.float32)


def _case(
    name: str, roles: set[str], batch: int, positions: int, heads: tuple[int, int], width: int, offset: int = 0
) -> Case:
    def make(rng: Generator, dtype: mx.Dtype) -> dict[str, Any]:
        q, k = (mx.array(rng.standard_normal((batch, positions, h, width)) * 3).astype(dtype) for h in heads)
        weights = [mx.array(rng.uniform(0.5, 2.0, width)).astype(dtype) for _ in heads]
        return {
            "q": q, "k": k, "q_weight": weights[0], "k_weight": weights[1],
            "eps": 1e-6, "theta": 1e6, "offset": offset,
        }  # fmt: skip

    def traffic(arguments: dict[str, Any]) -> int:
        item: int = arguments["q"].dtype.size
        return 2 * item * batch * positions * sum(heads) * width

    def operations(_: dict[str, Any]) -> int:
        return 8 * batch * positions * sum(heads) * width

    return Case(name, make, roles=frozenset(roles), bytes=traffic, flops=operations)


CASES = (
    _case("tiny-step", {"check", "test"}, 1, 1, (4, 2), 8, offset=7),
    _case("tiny-prompt", {"check", "test"}, 2, 17, (3, 1), 70, offset=3),
    _case("smallest", {"test"}, 1, 1, (1, 1), 2),
    _case("far", {"test"}, 1, 2, (2, 1), 128, offset=39_999),
    _case("4b-step", {"bench"}, 1, 1, (32, 8), 128, offset=600),
    _case("4b-prompt", {"bench"}, 1, 520, (32, 8), 128),
    _case("0.6b-step", {"bench"}, 1, 1, (16, 8), 128, offset=600),
)
OPERATION = Operation(
    "qk_norm_rope",
    kernel=qk_norm_rope_kernel,
    reference=qk_norm_rope_reference,
    cases=CASES,
    files=("qk_norm_rope.metal",),
)
