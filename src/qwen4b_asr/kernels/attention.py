"""Softmax attention in one pass: key mask or causal, grouped heads, any head width up to 256, any strides.

Source of the maths: "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness" (Dao et al., 2022)
and "Online normalizer calculation for softmax" (Milakov and Gimelshein, 2018).
Shapes: B batch, H query heads, G key heads, I queries, J keys, E head width.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from ._cases import Case, Generator
from ._dispatch import Operation
from ._loader import Kernel

# Views of a packed projection and slices of a cache are read in place.
_KERNEL = Kernel("attention.metal", ensure_row_contiguous=False)
_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
_MAX_WIDTH = 256
# Up to so many queries MLX has a kernel that spreads the keys over the whole GPU; query tiles would leave it idle.
_FEW_QUERIES = 8
_THREADGROUP_BYTES = 32768


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: mx.array | None = None,
    causal: bool = False,
    offset: int = 0,
) -> mx.array:
    """Attend with every query over the keys that it sees.

    ``softmax(scale * q @ k.T) @ v`` with the scores of hidden keys left out. A query that sees no key at all gets
    zeros from the kernel; what MLX's own operation gives then depends on the device.

    Args:
        q: Queries (B, H, I, E), floating point. Like `k` and `v` it may be a view with any strides.
        k: Keys (B, G, J, E); G divides H, and head h reads key head h // (H / G).
        v: Values (B, G, J, E).
        scale: Factor of the scores.
        mask: (B, J), bool, True on real keys; None if all are. The kernel never reads what it hides. A mask with four
            axes, as `mx.fast.scaled_dot_product_attention` takes it, keeps to that operation.
        causal: Hide the keys behind each query's own position.
        offset: Position of the first query among the keys; only used if `causal`.

    Returns:
        (B, H, I, E), of the dtype of `q`.

    Raises:
        ValueError: On shapes that do not fit one another.
    """
    if not _suits(q, k, v, scale, mask) or q.shape[2] <= _FEW_QUERIES:
        return attention_reference(q, k, v, scale=scale, mask=mask, causal=causal, offset=offset)
    out: mx.array = OPERATION(q, k, v, scale=scale, mask=mask, causal=causal, offset=offset)
    return out


def attention_reference(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: mx.array | None = None,
    causal: bool = False,
    offset: int = 0,
) -> mx.array:
    """Compute `attention` by plain operations, MLX's own or on a CPU others; arguments and result as there."""
    queries, keys = q.shape[2], k.shape[2]
    if not causal and _suits(q, k, v, scale, mask) and powers_of_two_pay(q, k):
        return _powers_of_two(q, k, v, scale, mask)
    if causal and mask is None and offset == keys - queries:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
    seen = mask[:, None, None, :] if mask is not None and mask.ndim == 2 else mask
    if causal:
        before = mx.arange(keys)[None, :] <= mx.arange(queries)[:, None] + offset
        seen = before if seen is None else before & seen
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=seen)


def powers_of_two_pay(q: mx.array, k: mx.array) -> bool:
    """Whether `_powers_of_two` is the quicker way: on a CPU, for the many queries of encoders."""
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    return on_cpu and q.dtype == mx.float32 and q.shape[1] == k.shape[1] and q.shape[2] > _FEW_QUERIES


def _powers_of_two(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    """Compute `attention` without MLX's softmax, whose exponential takes most of the time of attention on a CPU.

    ``exp(x) = 2 ** (x / ln 2)``, and MLX's power is the C library's, which takes half as long; the factor goes into the
    queries, and the sums divide rows of width E instead of J. A query that sees no key gets the values' mean.
    """
    scores = (q * (scale / math.log(2))) @ k.swapaxes(2, 3)
    if mask is not None:
        hidden = float(mx.finfo(mx.float32).min)
        scores = scores + mx.where(mask, 0.0, hidden)[:, None, None, :]
    weights = mx.power(2.0, scores - mx.stop_gradient(mx.max(scores, axis=-1, keepdims=True)))
    return (weights @ v) / mx.sum(weights, axis=-1, keepdims=True)


def attention_kernel(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: mx.array | None = None,
    causal: bool = False,
    offset: int = 0,
) -> mx.array:
    """Compute `attention` by the kernel; arguments and result as there, but for masks of four axes."""
    batch, heads, queries, width = q.shape
    groups, keys = k.shape[1:3]
    if mask is None:
        mask = mx.broadcast_to(mx.array(True), (batch, keys))
    group = heads // groups
    tile_rows, tile_keys = tile_sizes(queries * group, width, q.dtype.size)
    tiles = -(-queries * group // tile_rows)
    out = _KERNEL(
        inputs=[q, k, v, mask, mx.array(scale, dtype=mx.float32), mx.array(offset, dtype=mx.int32)],
        template=[
            ("T", q.dtype),
            ("E", width),
            ("GROUP", group),
            ("ROWS", tile_rows),
            ("KEYS", tile_keys),
            ("CAUSAL", causal),
        ],
        grid=(tiles * tile_rows * 4, groups, batch),
        threadgroup=(tile_rows * 4, 1, 1),
        output_shapes=[(batch, queries, heads, width)],
        output_dtypes=[q.dtype],
    )[0]
    return out.swapaxes(1, 2)


def tile_sizes(rows: int, width: int, item_bytes: int) -> tuple[int, int]:
    """Choose the tile of the kernel: as many rows, then as many keys, as threadgroup memory has room for.

    Args:
        rows: Rows there are: queries times heads that share a key head.
        width: Head width E.
        item_bytes: Bytes of an element.

    Returns:
        Rows of a query tile (8, 16 or 32), keys of a key tile (8, 16 or 32).
    """
    room = _THREADGROUP_BYTES // (-(-width // 8) * 8 * item_bytes + 16)
    tile_rows = next(size for size in (32, 16, 8) if size == 8 or (size + 8 <= room and size < rows + 8))
    return tile_rows, next(size for size in (32, 16, 8) if tile_rows + size <= room)


def _suits(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None) -> bool:
    """Whether the kernel can do it; MLX's own operation judges what is plainly wrong."""
    return (
        q.ndim == k.ndim == v.ndim == 4
        and q.dtype == k.dtype == v.dtype
        and q.dtype in _DTYPES
        and q.size > 0
        and k.size > 0
        and k.shape == v.shape
        and q.shape[1] % k.shape[1] == 0
        and q.shape[3] <= _MAX_WIDTH
        and scale > 0
        and (mask is None or (mask.ndim == 2 and mask.dtype == mx.bool_))
    )


def _case(
    name: str,
    roles: set[str],
    lengths: tuple[int, ...],
    heads: int,
    width: int,
    groups: int | None = None,
    queries: int | None = None,
) -> Case:
    """Describe a padded batch of `lengths` keys; causal, with its last `queries` positions, if those are given."""
    batch, keys = len(lengths), max(lengths)
    rows = keys if queries is None else queries
    key_heads = groups or heads

    def make(rng: Generator, dtype: mx.Dtype) -> dict[str, Any]:
        def values(positions: int, of_heads: int) -> mx.array:
            return mx.array(rng.standard_normal((batch, positions, of_heads, width))).astype(dtype).swapaxes(1, 2)

        arguments = {"q": values(rows, heads), "k": values(keys, key_heads), "v": values(keys, key_heads)}
        if queries is not None:
            return {**arguments, "scale": width**-0.5, "causal": queries > 1, "offset": keys - queries}
        return {**arguments, "scale": width**-0.5, "mask": mx.arange(keys)[None, :] < mx.array(lengths)[:, None]}

    def traffic(arguments: dict[str, Any]) -> int:
        return 2 * int(arguments["q"].nbytes) + 2 * int(arguments["k"].nbytes)

    def operations(_: dict[str, Any]) -> int:
        pairs = sum(rows * length for length in lengths)
        if queries is not None:
            pairs -= queries * (queries - 1) // 2
        return 4 * heads * width * pairs

    return Case(name, make, roles=frozenset(roles), bytes=traffic, flops=operations)


CASES = (
    _case("masked-64", {"check", "test"}, (17, 9), heads=2, width=64),
    _case("masked-128", {"check", "test"}, (33,), heads=1, width=128),
    _case("masked-256", {"check", "test"}, (19, 12), heads=1, width=256),
    _case("causal-grouped-128", {"check", "test"}, (21,), heads=4, groups=2, width=128, queries=9),
    _case("causal-64", {"test"}, (40,), heads=2, width=64, queries=40),
    _case("odd-width", {"test"}, (11, 3), heads=2, width=10),
    _case("one-query", {"test"}, (37,), heads=4, groups=1, width=64, queries=1),
    _case("encoder-6s", {"bench"}, (104,), heads=4, width=128),
    _case("encoder-30s", {"bench"}, (504,), heads=4, width=128),
    _case("encoder-8x30s", {"bench"}, (504, 480, 431, 377, 300, 211, 104, 54), heads=4, width=128),
    _case("adaptor-6s", {"bench"}, (104,), heads=8, width=256),
    _case("adaptor-30s", {"bench"}, (504,), heads=8, width=256),
    _case("prefill-540", {"bench"}, (540,), heads=32, groups=8, width=128, queries=540),
    _case("decode-600", {"bench"}, (600,), heads=32, groups=8, width=128, queries=1),
)
# Off unless asked for: MLX fuses attention itself for most head widths, and no Apple GPU has yet shown this one to be
# faster there or at 256, where MLX does not.
OPERATION = Operation(
    "attention",
    kernel=attention_kernel,
    reference=attention_reference,
    cases=CASES,
    files=("attention.metal",),
    default=False,
)
