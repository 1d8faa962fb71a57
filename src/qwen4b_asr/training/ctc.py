"""Connectionist temporal classification: loss, gradient and soft alignment in closed form.

Graves et al., "Connectionist Temporal Classification" (2006): the forward and backward variables give the
probability of every (row, symbol) on a path that spells the text. The gradient with respect to the logits is
softmax minus that occupancy, so no graph is needed through the recursion, which is also several times slower.
Shapes: B batch, R rows, V symbols, U text length, S = 2U + 1 states.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

_NEVER = -1e30  # a logarithm of zero that stays finite in sums


@dataclass(frozen=True)
class CtcResult:
    """What one batch's forward and backward pass gives.

    Args:
        losses: Negative log-probability of each text (B,); infinite where it cannot be spelled in the rows.
        gradient: Of the sum of the finite losses, with respect to the logits (B, R, V).
        alignment: Probability that row r carries text position u (B, R, U).
    """

    losses: Floats
    gradient: Floats
    alignment: Floats


def ctc(logits: Floats, rows: Integers, texts: Integers, lengths: Integers, *, blank: int = 0) -> CtcResult:
    """Compute CTC losses, their gradient and the soft alignment.

    Args:
        logits: Unnormalised scores (B, R, V).
        rows: Real rows of each item (B,); the rows after them count for nothing.
        texts: Symbols (B, U), anything after `lengths`.
        lengths: Symbols of each text (B,).
        blank: The blank symbol.

    Returns:
        Losses, gradient and alignment; all zero (loss infinite) for an item whose rows cannot spell its text.

    Raises:
        ValueError: If the shapes do not agree.
    """
    batch, total, _ = logits.shape
    if rows.shape != (batch,) or lengths.shape != (batch,) or texts.shape[:1] != (batch,):
        raise ValueError(
            f"[ctc] rows, texts and lengths must have batch size {batch} but got "
            f"{rows.shape}, {texts.shape} and {lengths.shape}"
        )
    if rows.max(initial=0) > total or lengths.max(initial=0) > texts.shape[1]:
        raise ValueError("[ctc] rows and lengths must lie within the logits and texts")
    log_probs = logits - logits.max(axis=2, keepdims=True)
    log_probs = (log_probs - np.log(np.exp(log_probs).sum(axis=2, keepdims=True))).astype(np.float32)

    states = 2 * texts.shape[1] + 1
    labels = np.full((batch, states), blank, dtype=np.int64)
    labels[:, 1::2] = np.where(np.arange(texts.shape[1]) < lengths[:, None], texts, blank)
    # From a symbol one may jump over the blank to the next one, unless both are the same.
    jump = np.zeros((batch, states), dtype=bool)
    jump[:, 3::2] = labels[:, 3::2] != labels[:, 1:-2:2]
    last = 2 * lengths
    reachable = np.arange(states) <= last[:, None]
    scores = np.where(reachable[:, None], np.take_along_axis(log_probs, labels[:, None, :], axis=2), _NEVER)

    alpha = _forward(scores, jump)
    # Backward is forward on the reversed text and reversed rows of each item.
    flip_state = np.where(reachable, last[:, None] - np.arange(states), np.arange(states))
    flip_row = np.where(np.arange(total) < rows[:, None], rows[:, None] - 1 - np.arange(total), np.arange(total))
    item = np.arange(batch)
    reversed_scores = scores[item[:, None, None], flip_row[:, :, None], flip_state[:, None, :]]
    reversed_jump = np.zeros_like(jump)
    flipped = np.take_along_axis(labels, flip_state, axis=1)
    reversed_jump[:, 3::2] = flipped[:, 3::2] != flipped[:, 1:-2:2]
    beta = _forward(reversed_scores, reversed_jump)[item[:, None, None], flip_row[:, :, None], flip_state[:, None, :]]

    end = alpha[item, np.maximum(rows - 1, 0)]
    likelihood = np.logaddexp(end[item, last], np.where(lengths > 0, end[item, np.maximum(last - 1, 0)], _NEVER))
    likelihood = np.where(rows > 0, likelihood, np.where(lengths == 0, 0.0, _NEVER))
    possible = likelihood > _NEVER / 2
    real = (np.arange(total) < rows[:, None]) & possible[:, None]
    log_occupancy = alpha + beta - scores - likelihood[:, None, None]
    keep = real[:, :, None] & reachable[:, None, :]
    occupancy = np.exp(np.where(keep, np.minimum(log_occupancy, 0.0), -np.inf)).astype(np.float32)

    gradient = np.where(real[:, :, None], np.exp(log_probs), 0.0).astype(np.float32)
    gradient[:, :, blank] -= occupancy[:, :, 0::2].sum(axis=2)
    for u in range(texts.shape[1]):
        gradient[item, :, labels[:, 2 * u + 1]] -= occupancy[:, :, 2 * u + 1]
    losses = np.where(possible, -likelihood, np.inf).astype(np.float32)
    return CtcResult(losses, gradient, occupancy[:, :, 1::2])


def _forward(scores: Floats, jump: npt.NDArray[np.bool_]) -> Floats:
    """Return log forward variables (B, R, S), the row's own score included."""
    batch, total, states = scores.shape
    alpha = np.full((batch, total, states), _NEVER, dtype=np.float32)
    if total == 0:
        return alpha
    alpha[:, 0, :2] = scores[:, 0, :2]
    barrier = np.where(jump, 0.0, _NEVER).astype(np.float32)
    for r in range(1, total):
        before = alpha[:, r - 1]
        step = before.copy()
        step[:, 1:] = np.logaddexp(step[:, 1:], before[:, :-1])
        step[:, 2:] = np.logaddexp(step[:, 2:], before[:, :-2] + barrier[:, 2:])
        alpha[:, r] = np.maximum(step + scores[:, r], _NEVER)
    return alpha
