"""Connectionist temporal classification: from scores to symbols, and when each was said.

Graves et al., "Connectionist Temporal Classification" (2006): a path gives each row a symbol or the blank; it
spells a text by merging repeats and dropping blanks. `greedy` takes the best path. `prefix_beam_search` looks for
the best *text*, whose probability is the sum over all of its paths (Graves' thesis, section 7.5.2; Hannun et al.,
"First-Pass Large Vocabulary Continuous Speech Recognition using Bi-Directional Recurrent DNNs", 2014). `align` finds
the best path that spells a given text.
Shapes: R rows, V symbols, U text length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_NEVER = -math.inf


@dataclass(frozen=True)
class CtcToken:
    """A symbol of a text, and the rows [start, end) that carry it."""

    id: int
    start: int
    end: int


@dataclass(frozen=True)
class CtcHypothesis:
    """A text and the natural logarithm of its probability: the sum over the paths that the search has seen."""

    ids: tuple[int, ...]
    log_prob: float


def ctc_log_probs(logits: mx.array, banned: Sequence[int] = ()) -> mx.array:
    """Normalise scores over the symbols.

    Args:
        logits: (..., V), any float type.
        banned: Symbols that must not appear; the rest keep the probabilities that they would have beside them, as
            in funasr's ``ban_emo_unk``.

    Returns:
        Natural logarithms of the probabilities (..., V), float32.
    """
    scores = logits.astype(mx.float32)
    scores = scores - mx.logsumexp(scores, axis=-1, keepdims=True)
    if banned:
        scores[..., mx.array(list(banned))] = _NEVER
    return scores


def greedy(log_probs: mx.array | Floats, *, blank: int = 0) -> tuple[list[CtcToken], float]:
    """Take the best symbol of every row, merge repeats and drop blanks.

    Args:
        log_probs: (R, V), from `ctc_log_probs`; padding rows left out.
        blank: The blank symbol.

    Returns:
        The symbols with their rows, and the log-probability of the path.
    """
    rows = _require_rows(log_probs, "greedy", blank)
    if not rows:
        return [], 0.0
    scores = mx.array(log_probs)
    path = mx.argmax(scores, axis=1)
    log_prob = mx.sum(mx.take_along_axis(scores, path[:, None], axis=1))
    return collapse([int(symbol) for symbol in np.asarray(path)], blank=blank), float(log_prob)


def collapse(path: Sequence[int], *, blank: int = 0) -> list[CtcToken]:
    """Merge the repeats of a path (R,) and drop its blanks, keeping the rows of each symbol."""
    changes = [row for row in range(1, len(path)) if path[row] != path[row - 1]]
    borders = [0, *changes, len(path)]
    return [CtcToken(path[start], start, end) for start, end in pairwise(borders) if end and path[start] != blank]


def prefix_beam_search(
    log_probs: mx.array | Floats, *, beam_size: int = 10, symbols_per_row: int | None = 20, blank: int = 0
) -> list[CtcHypothesis]:
    """Search for the most probable texts, adding up the paths that spell the same one.

    Each prefix keeps two numbers: the probability of its paths that end in a blank, and of those that end in its
    last symbol; only after a blank may that symbol come again as a new one. With a beam that holds every prefix and
    no limit on the symbols the result is exact.

    Args:
        log_probs: (R, V), from `ctc_log_probs`; padding rows left out.
        beam_size: Prefixes kept after each row.
        symbols_per_row: Best symbols of a row that may extend a prefix; None for all of them. The blank, and
            staying on the last symbol, are always possible.
        blank: The blank symbol.

    Returns:
        Up to `beam_size` texts, the best first.
    """
    if beam_size < 1 or (symbols_per_row is not None and symbols_per_row < 1):
        raise ValueError(
            f"[prefix_beam_search] beam_size and symbols_per_row must be at least 1 but got "
            f"{beam_size} and {symbols_per_row}"
        )
    _require_rows(log_probs, "prefix_beam_search", blank)
    scores = np.asarray(log_probs, np.float32)
    if np.isnan(scores).any():
        raise ValueError("[prefix_beam_search] log_probs must be numbers but got NaN")
    prefixes = _Prefixes()
    beam: dict[int, tuple[float, float]] = {_Prefixes.EMPTY: (0.0, _NEVER)}
    for row in scores:
        candidates = [(int(s), float(row[s])) for s in _best_symbols(row, symbols_per_row) if s != blank]
        blank_score = float(row[blank])
        ends_blank: dict[int, float] = {}
        ends_symbol: dict[int, float] = {}
        for prefix, (after_blank, after_symbol) in beam.items():
            either = log_add(after_blank, after_symbol)
            last = prefixes.last[prefix]
            ends_blank[prefix] = either + blank_score
            if last is not None:
                stayed = after_symbol + float(row[last])
                ends_symbol[prefix] = log_add(ends_symbol.get(prefix, _NEVER), stayed)
            for symbol, score in candidates:
                longer = prefixes.extend(prefix, symbol)
                came = (after_blank if symbol == last else either) + score
                ends_symbol[longer] = log_add(ends_symbol.get(longer, _NEVER), came)
        reached = {
            prefix: (ends_blank.get(prefix, _NEVER), ends_symbol.get(prefix, _NEVER))
            for prefix in ends_blank.keys() | ends_symbol.keys()
        }
        beam = dict(_best(reached, beam_size))
    return [CtcHypothesis(prefixes.ids(prefix), log_add(*ends)) for prefix, ends in _best(beam, beam_size)]


class _Prefixes:
    """A tree of prefixes under small numbers, so that equal ones are one and none is copied to be extended."""

    EMPTY = 0

    def __init__(self) -> None:
        self.last: list[int | None] = [None]
        self._parent = [self.EMPTY]
        self._children: dict[tuple[int, int], int] = {}

    def extend(self, prefix: int, symbol: int) -> int:
        """Return the number of the prefix with one more symbol."""
        number = self._children.setdefault((prefix, symbol), len(self.last))
        if number == len(self.last):
            self.last.append(symbol)
            self._parent.append(prefix)
        return number

    def ids(self, prefix: int) -> tuple[int, ...]:
        """Spell a prefix out."""
        found = []
        while (symbol := self.last[prefix]) is not None:
            found.append(symbol)
            prefix = self._parent[prefix]
        return tuple(reversed(found))


def log_add(a: float, b: float) -> float:
    """Return log(exp(a) + exp(b)) without overflow; either may be minus infinity."""
    if a < b:
        a, b = b, a
    return a if b == _NEVER else a + math.log1p(math.exp(b - a))


def _best(beam: dict[int, tuple[float, float]], count: int) -> list[tuple[int, tuple[float, float]]]:
    """Return the most probable prefixes, the best first; of equal ones the older, so that runs repeat."""
    possible = [(prefix, ends) for prefix, ends in beam.items() if max(ends) > _NEVER]
    return sorted(possible, key=lambda item: (-log_add(*item[1]), item[0]))[:count]


def _best_symbols(row: Floats, count: int | None) -> npt.NDArray[np.intp]:
    """Return the places of the largest values of a row, in no order but the same each time."""
    if count is None or count >= row.size:
        return np.arange(row.size)
    return np.argpartition(row, row.size - count)[row.size - count :]


def align(log_probs: mx.array | Floats, ids: Sequence[int], *, blank: int = 0) -> list[CtcToken]:
    """Find the most probable path that spells a text (Viterbi), and the rows of each of its symbols.

    The states are blank, first symbol, blank, second symbol, ..., blank; a path stays, goes on by one, or leaves
    out the blank between two different symbols. funasr's ``ctc_forced_align`` computes the same.

    Args:
        log_probs: (R, V), from `ctc_log_probs`; padding rows left out.
        ids: The text (U,), without blanks.
        blank: The blank symbol.

    Raises:
        ValueError: If the text holds a blank or an unknown symbol, or if no path spells it in so few rows.
    """
    rows = _require_rows(log_probs, "align", blank)
    symbols = log_probs.shape[1]
    if any(s == blank or not 0 <= s < symbols for s in ids):
        raise ValueError(f"[align] ids must lie in 0..{symbols - 1} without the blank {blank} but got {list(ids)}")
    needed = len(ids) + sum(a == b for a, b in pairwise(ids))
    if rows < needed:
        raise ValueError(f"[align] the text must fit in {rows} rows but needs {needed}")
    if not ids:
        return []
    labels = np.full(2 * len(ids) + 1, blank, np.int64)
    labels[1::2] = ids
    if isinstance(log_probs, mx.array):  # only the columns that matter leave the device
        scores = np.asarray(log_probs[:, mx.array(labels)].astype(mx.float32))
    else:
        scores = log_probs[:, labels]
    may_jump = np.zeros(labels.size, bool)
    may_jump[3::2] = labels[3::2] != labels[1:-2:2]
    best = np.full(labels.size, _NEVER)
    best[:2] = scores[0, :2]
    steps = np.zeros((rows, labels.size), np.int8)  # how many states back the best way into each came from
    ways = np.full((3, labels.size), _NEVER)
    for row in range(1, rows):
        ways[0] = best
        ways[1, 1:] = best[:-1]
        ways[2, 2:] = np.where(may_jump[2:], best[:-2], _NEVER)
        steps[row] = ways.argmax(axis=0)
        best = ways.max(axis=0) + scores[row]
    state = labels.size - 1 if best[-1] > best[-2] else labels.size - 2
    if best[state] == _NEVER:
        raise ValueError("[align] the text must be possible but each of its paths has probability 0")
    states = [state]
    for row in range(rows - 1, 0, -1):
        state -= int(steps[row, state])
        states.append(state)
    states.reverse()
    # Collapsing states rather than symbols keeps the two of a doubled symbol apart.
    spans = collapse([s if s % 2 else -1 for s in states], blank=-1)
    return [CtcToken(int(labels[span.id]), span.start, span.end) for span in spans]


def row_times_ms(token: CtcToken, *, row_ms: int = 60, lead_ms: int = 30) -> tuple[int, int]:
    """Return when a symbol begins and ends.

    Args:
        token: With rows counted from the recording's first, so without query frames.
        row_ms: Time from one row to the next: 6 frames of 10 ms.
        lead_ms: How much earlier than its row a symbol is said: the 7 stacked frames reach half a row back, as in
            funasr's ``SenseVoiceSmall.inference``.

    Returns:
        Milliseconds from the recording's start, not before it.
    """
    return max(token.start * row_ms - lead_ms, 0), max(token.end * row_ms - lead_ms, 0)


def _require_rows(log_probs: mx.array | Floats, owner: str, blank: int) -> int:
    """Check the scores of one recording (R, V) and return R."""
    if log_probs.ndim != 2:
        raise ValueError(f"[{owner}] log_probs must have the shape (rows, symbols) but got {tuple(log_probs.shape)}")
    rows, symbols = log_probs.shape
    if not 0 <= blank < symbols:
        raise ValueError(f"[{owner}] blank must lie in 0..{symbols - 1} but got {blank}")
    return int(rows)
