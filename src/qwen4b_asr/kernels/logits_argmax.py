"""The next token under greedy decoding, chosen on the device: repetition penalty, n-gram ban, argmax.

With the history on the device too, step after step can be queued without waiting for one token to reach the host.
The order and the arithmetic are transformers' (``generation/logits_process.py``).
Shapes: B batch, V vocabulary, N room in the history.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ._cases import Case, Generator
from ._dispatch import Operation
from ._loader import Kernel

_KERNEL = Kernel("logits_argmax.metal")
_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# Ids of one threadgroup: 75 threadgroups for Qwen3's vocabulary, eight ids a thread.
_SPAN = 2048
_THREADS = 256


def logits_argmax(
    logits: mx.array,
    history: mx.array,
    length: mx.array,
    *,
    penalty: float = 1.0,
    ngram: int = 0,
) -> mx.array:
    """Choose the most likely token of each row after penalty and ban, in float32.

    Logits of tokens in the history become s · penalty if s < 0, else s / penalty, once per distinct token; tokens that
    would repeat an n-gram of the history become minus infinity. Of equal scores the lowest id wins, as it does if all
    are minus infinity. A score that is not a number counts as the largest, as in `mx.argmax` on the CPU.

    Args:
        logits: (B, V), floating point.
        history: Token ids so far (B, N), int32, oldest first; what lies behind `length` has no meaning.
        length: Ids held (B,), int32, each in 0..N.
        penalty: Repetition penalty, positive; 1 is off.
        ngram: Size of the n-grams that must not repeat; 0 is off.

    Returns:
        Token ids (B,), int32, on the device.

    Raises:
        ValueError: On shapes, dtypes or options that are none of these.
    """
    batch = logits.shape[0]
    if logits.ndim != 2 or not logits.size:
        raise ValueError(f"[logits_argmax] logits must be (B, V), not empty, but got {logits.shape}")
    if history.ndim != 2 or history.shape[0] != batch or history.dtype != mx.int32:
        raise ValueError(f"[logits_argmax] history must be ({batch}, N) of int32 but got {history.shape}")
    if length.shape != (batch,) or length.dtype != mx.int32:
        raise ValueError(f"[logits_argmax] length must be ({batch},) of int32 but got {length.shape}")
    if not penalty > 0 or ngram < 0:
        raise ValueError(f"[logits_argmax] penalty must be positive, ngram not negative, but got {penalty} and {ngram}")
    if logits.dtype not in _DTYPES or not history.size:
        return logits_argmax_reference(logits, history, length, penalty=penalty, ngram=ngram)
    ids: mx.array = OPERATION(logits, history, length, penalty=penalty, ngram=ngram)
    return ids


def logits_argmax_reference(
    logits: mx.array,
    history: mx.array,
    length: mx.array,
    *,
    penalty: float = 1.0,
    ngram: int = 0,
) -> mx.array:
    """Compute `logits_argmax` by MLX's own operations; arguments and result as there."""
    scores = logits.astype(mx.float32)
    room = history.shape[1]
    if room and penalty != 1.0:
        held = mx.arange(room)[None, :] < length[:, None]
        penalised = mx.where(scores < 0, scores * penalty, scores / penalty)
        scores = mx.where(_flags(history, held, scores.shape[1]), penalised, scores)
    if 0 < ngram <= room:
        starts = room - ngram + 1
        same = mx.arange(starts)[None, :] + ngram <= length[:, None]
        for j in range(ngram - 1):
            place = mx.maximum(length[:, None] - ngram + 1 + j, 0)
            same = same & (history[:, j : j + starts] == mx.take_along_axis(history, place, axis=1))
        scores = mx.where(_flags(history[:, ngram - 1 :], same, scores.shape[1]), -mx.inf, scores)
    return mx.argmax(scores, axis=1).astype(mx.int32)


def _flags(ids: mx.array, wanted: mx.array, vocabulary: int) -> mx.array:
    """Mark the ids (B, N) that are wanted (B, N), bool, in a table of the vocabulary (B, V), bool."""
    wanted = wanted & (ids >= 0) & (ids < vocabulary)
    # Ids that are not wanted share a place behind the vocabulary.
    places = mx.where(wanted, ids, vocabulary)
    table = mx.zeros((ids.shape[0], vocabulary + 1), dtype=mx.int32)
    return mx.put_along_axis(table, places, mx.array(1, dtype=mx.int32), axis=1)[:, :vocabulary] != 0


def logits_argmax_kernel(
    logits: mx.array,
    history: mx.array,
    length: mx.array,
    *,
    penalty: float = 1.0,
    ngram: int = 0,
) -> mx.array:
    """Compute `logits_argmax` by the kernel; arguments and result as there.

    The kernel leaves the best of each block of the vocabulary. Two of MLX's operations take the best block: a launch
    of its own would save one of them.
    """
    batch, vocabulary = logits.shape
    blocks = -(-vocabulary // _SPAN)
    best, ids = _KERNEL(
        inputs=[logits, history, length, mx.array(penalty, dtype=mx.float32)],
        template=[("T", logits.dtype), ("NGRAM", ngram), ("SPAN", _SPAN)],
        grid=(blocks * _THREADS, batch, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(batch, blocks), (batch, blocks)],
        output_dtypes=[mx.uint32, mx.int32],
    )
    return mx.take_along_axis(ids, mx.argmax(best, axis=1, keepdims=True), axis=1)[:, 0]


def _case(name: str, roles: set[str], lengths: tuple[int, ...], vocabulary: int, ngram: int = 4) -> Case:
    """Describe a batch whose histories hold `lengths` tokens, of few kinds so that n-grams do repeat."""
    batch, room = len(lengths), max(8, *lengths)

    def make(rng: Generator, dtype: mx.Dtype) -> dict[str, Any]:
        logits = rng.standard_normal((batch, vocabulary)) * 4
        kinds = rng.integers(0, vocabulary, 3)
        logits[:, kinds] += 8  # the tokens of the history would win if nothing spoke against them
        return {
            "logits": mx.array(logits).astype(dtype),
            "history": mx.array(rng.choice(kinds, (batch, room))).astype(mx.int32),
            "length": mx.array(lengths, dtype=mx.int32),
            "penalty": 1.2,
            "ngram": ngram,
        }

    def traffic(arguments: dict[str, Any]) -> int:
        return int(arguments["logits"].nbytes) + 4 * sum(lengths)

    return Case(name, make, roles=frozenset(roles), bytes=traffic)


CASES = (
    _case("tiny", {"check", "test"}, (9, 0, 30), 37, ngram=2),
    _case("two-blocks", {"check", "test"}, (40,), _SPAN + 5),
    _case("no-ban", {"test"}, (12,), 300, ngram=0),
    _case("single-tokens", {"test"}, (12,), 300, ngram=1),
    _case("qwen3-start", {"bench"}, (8,), 151936),
    _case("qwen3-200-tokens", {"bench"}, (200,), 151936),
    _case("qwen3-batch-8", {"bench"}, (200,) * 8, 151936),
)
OPERATION = Operation(
    "logits_argmax",
    kernel=logits_argmax_kernel,
    reference=logits_argmax_reference,
    cases=CASES,
    files=("logits_argmax.metal",),
)
