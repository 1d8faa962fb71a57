"""The next token of many utterances at once, each with its own history and options, and how sure the choice is.

The arithmetic is that of `sampling`, entry by entry, so that a row gets what it would get alone. What can differ is
the logits: a matrix product over several rows rounds otherwise than one over a single row, so that two tokens of nearly
equal score may change places. `greedy_rows` says which rows came near that.
Shapes: B rows, V vocabulary, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .sampling import NEAR, SamplingOptions, banned_by_ngram, best_two


def greedy_rows(
    logits: mx.array, generated: Sequence[Sequence[int]], options: Sequence[SamplingOptions]
) -> tuple[mx.array, mx.array]:
    """Choose the most likely token of each row after its own penalty and ban.

    Args:
        logits: (B, V).
        generated: Token ids so far of each row.
        options: Of each row.

    Returns:
        Token ids (B,), and for each row whether the best two scores lie so near that rounding may decide, (B,), bool.
    """
    scores = logits.astype(mx.float32)
    size = mx.max(mx.abs(scores), axis=1)
    scores = _penalised(scores, generated, [option.repetition_penalty for option in options])
    scores = _banned(scores, [banned_by_ngram(g, o.no_repeat_ngram) for g, o in zip(generated, options, strict=True)])
    ids, leads = best_two(scores)
    # A penalty stretches what rounding does. The lead of an infinity is no number, and nothing to rely on either.
    stretch = mx.array([max(o.repetition_penalty, 1 / o.repetition_penalty) for o in options])
    return ids, mx.logical_not(leads > NEAR * stretch * size)


def _penalised(scores: mx.array, generated: Sequence[Sequence[int]], penalties: Sequence[float]) -> mx.array:
    seen = [sorted(set(ids)) if penalty != 1.0 else [] for ids, penalty in zip(generated, penalties, strict=True)]
    if not any(seen):
        return scores
    places, real = _ragged(seen)
    penalty = mx.array(list(penalties), dtype=mx.float32)[:, None]
    old = mx.take_along_axis(scores, places, axis=1)
    new = mx.where(old < 0, old * penalty, old / penalty)
    return mx.put_along_axis(scores, places, mx.where(real, new, old), axis=1)


def _banned(scores: mx.array, banned: Sequence[Sequence[int]]) -> mx.array:
    if not any(banned):
        return scores
    places, real = _ragged(banned)
    old = mx.take_along_axis(scores, places, axis=1)
    return mx.put_along_axis(scores, places, mx.where(real, -mx.inf, old), axis=1)


def _ragged(ids: Sequence[Sequence[int]]) -> tuple[mx.array, mx.array]:
    """Pad lists of distinct ids to (B, N), and say which entries count for something.

    The padding repeats an entry that counts, if there is one: of two writes to one place none must undo the other.
    """
    longest = max(map(len, ids))
    rows = [[*one, *[one[0] if one else 0] * (longest - len(one))] for one in ids]
    return mx.array(rows), mx.array([bool(one) for one in ids])[:, None]
