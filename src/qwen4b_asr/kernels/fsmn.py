"""SANM's memory block in one pass: key mask, depthwise convolution, residual and output mask.

Source of the maths: "SAN-M: Memory Equipped Self-Attention for End-to-End Speech Recognition" (Gao et al., 2020) and
``MultiHeadedAttentionSANM.forward_fsmn`` in FunASR's ``funasr/models/sanm/attention.py``.
Shapes: B batch, L rows, S columns of the packed projection, D width, K taps.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ._cases import Case, Generator
from ._dispatch import Operation
from ._loader import Kernel

_KERNEL = Kernel("fsmn.metal")
_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# Rows of one thread: at 11 taps, 18 reads for 8 results. More rows would leave short utterances with too few threads.
_ROWS = 8


def fsmn(
    qkv: mx.array,
    weight: mx.array,
    mask: mx.array,
    *,
    left: int,
    offset: int | None = None,
    shifted_adds: bool | None = None,
) -> mx.array:
    """Compute the memory of the values inside a packed projection.

    ``memory = (depthwise(x) + x) * mask`` with ``x = qkv[..., offset : offset + D] * mask``.

    Args:
        qkv: Packed projection (B, L, S), floating point.
        weight: Taps (D, K, 1), MLX's convolution layout, of the dtype of `qkv`.
        mask: (B, L), bool, True on real rows.
        left: Rows of left context; the right context is K - 1 - left.
        offset: First column of the values; by default they are the last D columns.
        shifted_adds: Without the kernel, sum K shifted copies instead of calling the convolution. The same result; on
            the CPU it is up to 2.2 times as fast and its gradient three times. None decides by the device, and takes
            what is quickest without a gradient on the CPU: all windows at once, three times as fast as a convolution.

    Returns:
        Memory (B, L, D), zero on masked rows.

    Raises:
        ValueError: On shapes that do not fit one another.
    """
    if qkv.ndim != 3 or weight.ndim != 3 or weight.shape[2] != 1:
        raise ValueError(f"[fsmn] shapes must be (B, L, S) and (D, K, 1) but got {qkv.shape} and {weight.shape}")
    width, taps, _ = weight.shape
    if mask.shape != qkv.shape[:2] or mask.dtype != mx.bool_:
        raise ValueError(f"[fsmn] mask must be {qkv.shape[:2]} of bool but got {mask.shape} of {mask.dtype}")
    if not 0 <= left < taps:
        raise ValueError(f"[fsmn] left must lie in 0..{taps - 1} but got {left}")
    first = qkv.shape[2] - width if offset is None else offset
    if not 0 <= first <= qkv.shape[2] - width:
        raise ValueError(f"[fsmn] {width} columns must lie in the {qkv.shape[2]} of qkv but begin at {first}")
    if qkv.dtype != weight.dtype or qkv.dtype not in _DTYPES or not qkv.size:
        return fsmn_reference(qkv, weight, mask, left=left, offset=first, shifted_adds=shifted_adds)
    memory: mx.array = OPERATION(qkv, weight, mask, left=left, offset=first, shifted_adds=shifted_adds)
    return memory


def fsmn_reference(
    qkv: mx.array,
    weight: mx.array,
    mask: mx.array,
    *,
    left: int,
    offset: int | None = None,
    shifted_adds: bool | None = None,
) -> mx.array:
    """Compute `fsmn` by MLX's own operations; arguments and result as there."""
    width, taps, _ = weight.shape
    first = qkv.shape[2] - width if offset is None else offset
    keep = mask[:, :, None].astype(qkv.dtype)
    v = qkv[:, :, first : first + width] * keep
    padded = mx.pad(v, [(0, 0), (left, taps - 1 - left), (0, 0)])
    batch, rows = v.shape[:2]
    if shifted_adds is None and mx.default_device().type == mx.DeviceType.cpu:
        length = rows + taps - 1
        windows = mx.as_strided(padded, (batch, rows, taps, width), (length * width, width, width, 1))
        # Contiguous, or the product would go through it element by element.
        memory = v + (windows * mx.contiguous(weight[:, :, 0].T)).sum(axis=2)
    elif shifted_adds:
        memory = v
        for k in range(taps):
            memory = memory + padded[:, k : k + rows] * weight[:, k, 0]
    else:
        memory = mx.conv1d(padded, weight, groups=width) + v
    return memory * keep


def fsmn_kernel(
    qkv: mx.array,
    weight: mx.array,
    mask: mx.array,
    *,
    left: int,
    offset: int | None = None,
    shifted_adds: bool | None = None,
) -> mx.array:
    """Compute `fsmn` by the kernel; arguments and result as there, `shifted_adds` has no meaning."""
    batch, rows, columns = qkv.shape
    width, taps, _ = weight.shape
    first = columns - width if offset is None else offset
    template = [("T", qkv.dtype), ("K", taps), ("LEFT", left), ("OFFSET", first), ("ROWS", _ROWS)]
    return _KERNEL(
        inputs=[qkv, weight, mask],
        template=template,
        grid=(width, -(-rows // _ROWS), batch),
        threadgroup=(32, 8, 1),
        output_shapes=[(batch, rows, width)],
        output_dtypes=[qkv.dtype],
    )[0]


def _case(
    name: str, roles: set[str], lengths: tuple[int, ...], width: int, taps: int = 11, left: int = 5, packed: int = 3
) -> Case:
    """Describe a padded batch of `lengths` rows; the values are the last of `packed` parts of the projection."""
    batch, rows = len(lengths), max(lengths)

    def make(rng: Generator, dtype: mx.Dtype) -> dict[str, Any]:
        return {
            "qkv": mx.array(rng.standard_normal((batch, rows, packed * width))).astype(dtype),
            "weight": mx.array(rng.standard_normal((width, taps, 1)) * taps**-0.5).astype(dtype),
            "mask": mx.arange(rows)[None, :] < mx.array(lengths)[:, None],
            "left": left,
        }

    def traffic(arguments: dict[str, Any]) -> int:
        item = arguments["qkv"].dtype.size
        return batch * rows * (2 * width * item + 1) + width * taps * item

    def operations(_: dict[str, Any]) -> int:
        return batch * rows * width * 2 * taps

    return Case(name, make, roles=frozenset(roles), bytes=traffic, flops=operations)


CASES = (
    _case("tiny", {"check", "test"}, (13, 9), 5, taps=3, left=1),
    _case("eleven-taps", {"check", "test"}, (21, 1, 16), 33),
    _case("one-row", {"test"}, (1,), 2, taps=1, left=0, packed=1),
    _case("shifted", {"test"}, (17,), 7, taps=5, left=3),
    _case("6s", {"bench"}, (104,), 512),
    _case("30s", {"bench"}, (504,), 512),
    _case("8x30s", {"bench"}, (504, 480, 431, 377, 300, 211, 104, 54), 512),
)
OPERATION = Operation("fsmn", kernel=fsmn_kernel, reference=fsmn_reference, cases=CASES, files=("fsmn.metal",))
