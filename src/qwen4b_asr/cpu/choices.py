"""Choices in several rows on NumPy: see `sampling.Sampler.process_run` and `sampling.best_two` for the maths.

For sixteen rows of Qwen3's vocabulary MLX takes 40 to 50 ms on two cores, a third of a step of Qwen3-0.6B, and this
takes four. Shapes: K rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..sampling import NEAR, Sampler, SamplingOptions, run_changes
from .products import Array, view

Entries = Sequence[tuple[int, int]]
"""Rows and token ids."""


def choose_run(
    sampler: Sampler, logits: mx.array, generated: Sequence[int], run: Sequence[int]
) -> tuple[list[int], Array, Array]:
    """Choose a token in each row of a run, after the penalty and the ban that it would have alone.

    Args:
        sampler: Has the options.
        logits: (K, V), float32; row i is what follows `generated` and the first i tokens of `run`.
        generated: Token ids so far.
        run: K - 1 token ids.

    Returns:
        Token ids (K), by how much each leads (K,), and the largest magnitude of each row's logits (K,). A lead is no
        number where the best scores are infinite or no numbers.
    """
    penalised, banned = run_changes(sampler.options, generated, run)
    best, leads, size = _choose(view(logits), penalised, sampler.options.repetition_penalty, banned)
    return best.tolist(), leads, size


def choose_rows(
    logits: mx.array, generated: Sequence[Sequence[int]], options: Sequence[SamplingOptions]
) -> tuple[list[int], list[bool]]:
    """Choose the next token of many utterances, `batch_sampling.greedy_rows`.

    Args:
        logits: (K, V), float32.
        generated: Token ids so far of each row.
        options: Of each row.

    Returns:
        Token ids (K), and for each row whether rounding may decide between the best two (K).
    """
    penalised: list[tuple[int, int]] = []
    banned: list[tuple[int, int]] = []
    penalties: list[float] = []
    for row, (history, option) in enumerate(zip(generated, options, strict=True)):
        worse, never = run_changes(option, history)
        penalised += [(row, token) for _, token in worse]
        penalties += [option.repetition_penalty] * len(worse)
        banned += [(row, token) for _, token in never]
    best, leads, size = _choose(view(logits), penalised, np.array(penalties, np.float32), banned)
    penalty = np.array([option.repetition_penalty for option in options], np.float32)
    stretch = np.maximum(penalty, 1 / penalty)
    return best.tolist(), np.logical_not(leads > np.float32(NEAR) * stretch * size).tolist()


def _choose(
    logits: Array, penalised: Entries, penalty: float | Array, banned: Entries
) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.intp]], Array, Array]:
    """Return the best token of each row, its lead, and the largest magnitude of the logits, (K,) each."""
    size = np.maximum(logits.max(axis=-1), -logits.min(axis=-1))
    scores = logits.copy()
    if penalised:
        rows, ids = np.array(penalised).T
        old = scores[rows, ids]
        scores[rows, ids] = np.where(old < 0, old * np.float32(penalty), old / np.float32(penalty))
    if banned:
        rows, ids = np.array(banned).T
        scores[rows, ids] = -np.inf
    every = np.arange(len(scores))
    best = scores.argmax(axis=-1)
    top = scores[every, best]
    scores[every, best] = -np.inf
    with np.errstate(invalid="ignore"):
        leads: Array = top - scores.max(axis=-1)
    return best, leads, size
