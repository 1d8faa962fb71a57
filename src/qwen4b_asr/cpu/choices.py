"""The choices of a verified run on NumPy: see `sampling.Sampler.process_run` and `sampling.best_two` for the maths.

For sixteen rows of Qwen3's vocabulary MLX takes 40 to 50 ms on two cores, a third of a step of Qwen3-0.6B, and this
takes four. Shapes: K rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..sampling import Sampler
from .products import Array, view


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
    raw = view(logits)
    size = np.maximum(raw.max(axis=-1), -raw.min(axis=-1))
    scores = raw.copy()
    penalised, banned = sampler.run_changes(generated, run)
    penalty = np.float32(sampler.options.repetition_penalty)
    if penalised:
        rows, ids = np.array(penalised).T
        old = scores[rows, ids]
        scores[rows, ids] = np.where(old < 0, old * penalty, old / penalty)
    if banned:
        rows, ids = np.array(banned).T
        scores[rows, ids] = -np.inf
    every = np.arange(len(scores))
    best = scores.argmax(axis=-1)
    top = scores[every, best]
    scores[every, best] = -np.inf
    with np.errstate(invalid="ignore"):
        leads: Array = top - scores.max(axis=-1)
    return best.tolist(), leads, size
