"""Low-frame-rate rows with mean and variance normalisation, in one pass.

Source of the maths: ``apply_lfr`` and ``apply_cmvn`` in FunASR's ``funasr/frontends/wav_frontend.py``.
Shapes: T frames, F bins, L = ceil(T / n) rows.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ._cases import Case, Generator
from ._dispatch import Operation
from ._loader import Kernel

_KERNEL = Kernel("lfr_cmvn.metal")
_DTYPES = (mx.float32, mx.float16, mx.bfloat16)


def lfr_cmvn(fbank: mx.array, shift: mx.array, scale: mx.array, *, m: int, n: int) -> mx.array:
    """Stack `m` neighbouring frames every `n` frames, and normalise: ``(low_frame_rate(fbank) + shift) * scale``.

    Without statistics there is nothing to join: `low_frame_rate` is a single gather.

    Args:
        fbank: Frames (T, F), floating point, T ≥ 1.
        shift: (m · F,).
        scale: (m · F,).
        m: Frames in a row.
        n: Frames between rows.

    Returns:
        Rows (ceil(T / n), m · F), of the dtype that the inputs promote to.

    Raises:
        ValueError: On shapes that do not fit one another.
    """
    _require_frames("lfr_cmvn", fbank, m, n)
    if shift.shape != (m * fbank.shape[1],) or scale.shape != shift.shape:
        raise ValueError(
            f"[lfr_cmvn] shift and scale must be ({m * fbank.shape[1]},) but got {shift.shape} and {scale.shape}"
        )
    if fbank.dtype not in _DTYPES or shift.dtype not in _DTYPES or shift.dtype != scale.dtype or not fbank.size:
        return lfr_cmvn_reference(fbank, shift, scale, m=m, n=n)
    rows: mx.array = OPERATION(fbank, shift, scale, m=m, n=n)
    return rows


def low_frame_rate(frames: mx.array, m: int, n: int) -> mx.array:
    """Stack `m` neighbouring frames every `n` frames, repeating the edge frames.

    ``row[t] = concat(frame[clip(n·t + j - (m - 1) // 2, 0, T - 1)] for j in range(m))``
    (FunASR's ``apply_lfr``).

    Args:
        frames: (T, F) with T ≥ 1.
        m: Frames in a row.
        n: Frames between rows.

    Returns:
        Rows (ceil(T / n), m · F).

    Raises:
        ValueError: If `frames` is not (T, F) with at least one frame.
    """
    _require_frames("low_frame_rate", frames, m, n)
    total = frames.shape[0]
    rows = -(-total // n)
    index = mx.arange(rows)[:, None] * n + mx.arange(m)[None, :] - (m - 1) // 2
    return frames[mx.clip(index, 0, total - 1)].reshape(rows, -1)


def lfr_cmvn_reference(fbank: mx.array, shift: mx.array, scale: mx.array, *, m: int, n: int) -> mx.array:
    """Compute `lfr_cmvn` by MLX's own operations; arguments and result as there."""
    return (low_frame_rate(fbank, m, n) + shift) * scale


def lfr_cmvn_kernel(fbank: mx.array, shift: mx.array, scale: mx.array, *, m: int, n: int) -> mx.array:
    """Compute `lfr_cmvn` by the kernel; arguments and result as there."""
    frames, bins = fbank.shape
    rows = -(-frames // n)
    dtype = fbank.dtype if fbank.dtype == shift.dtype else mx.float32  # two half types promote to float32 as well
    return _KERNEL(
        inputs=[fbank, shift, scale],
        template=[("T", fbank.dtype), ("S", shift.dtype), ("O", dtype), ("M", m), ("N", n)],
        grid=(bins, rows, m),
        threadgroup=(32, 8, 1),
        output_shapes=[(rows, m * bins)],
        output_dtypes=[dtype],
    )[0]


def _require_frames(owner: str, frames: mx.array, m: int, n: int) -> None:
    if frames.ndim != 2 or frames.shape[0] == 0:
        raise ValueError(f"[{owner}] frames must have shape (T, F) with T >= 1 but got {frames.shape}")
    if m < 1 or n < 1:
        raise ValueError(f"[{owner}] m and n must be at least 1 but got {m} and {n}")


def _case(name: str, roles: set[str], frames: int, bins: int, m: int = 7, n: int = 6) -> Case:
    rows = -(-frames // n)

    def make(rng: Generator, dtype: mx.Dtype) -> dict[str, Any]:
        return {
            "fbank": mx.array(rng.standard_normal((frames, bins)) * 4 + 8).astype(dtype),
            "shift": mx.array(rng.standard_normal(m * bins) - 8).astype(dtype),
            "scale": mx.array(rng.uniform(0.1, 0.4, m * bins)).astype(dtype),
            "m": m,
            "n": n,
        }

    def traffic(arguments: dict[str, Any]) -> int:
        item: int = arguments["fbank"].dtype.size
        return item * (frames * bins + rows * m * bins + 2 * m * bins)

    def operations(_: dict[str, Any]) -> int:
        return 2 * rows * m * bins

    return Case(name, make, roles=frozenset(roles), bytes=traffic, flops=operations)


CASES = (
    _case("tiny", {"check", "test"}, 20, 5),
    _case("odd", {"check", "test"}, 23, 3, m=4, n=2),
    _case("one-frame", {"test"}, 1, 1, m=5, n=3),
    _case("6s", {"bench"}, 598, 80),
    _case("30s", {"bench"}, 2998, 80),
)
OPERATION = Operation(
    "lfr_cmvn", kernel=lfr_cmvn_kernel, reference=lfr_cmvn_reference, cases=CASES, files=("lfr_cmvn.metal",)
)
