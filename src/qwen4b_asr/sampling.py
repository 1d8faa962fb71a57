"""From logits to the next token: repetition penalty, n-gram ban, then argmax or a draw.

The order and the arithmetic are transformers' (``generation/logits_process.py``): penalty, ban, temperature,
top-k, top-p. Only *generated* tokens count; with prompts given as embeddings there is nothing else to see.
Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .kernels.logits_argmax import OPERATION as LOGITS_ARGMAX
from .kernels.logits_argmax import logits_argmax

NEAR = 256 * 2.0**-23
"""Part of the largest logit by which rounding in float32 may change the lead of a token, with room to spare.

Measured, in units of 2**-23 of the largest logit: passes over 3 to 16 rows and a batch of eight, against single rows,
with the keys that they leave, moved no logit of models with 2 to 56 layers by more than 26 units (10 where NumPy
multiplies with float32 weights), so no lead by more than 52.
"""

# Tokens by which the history on the device grows.
_HISTORY_STEP = 256


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the most likely token; above 0 the distribution is drawn from at this temperature.
        top_k: Keep the k most likely tokens; 0 keeps all. Only used when drawing.
        top_p: Keep the smallest set of tokens whose probability reaches p. Only used when drawing.
        repetition_penalty: Divide positive and multiply negative logits of tokens already generated; 1 is off.
        no_repeat_ngram: Never generate the same n tokens in a row twice; 0 is off.
        seed: Seed of the draws; None takes MLX's global stream.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"[SamplingOptions] temperature must not be negative but got {self.temperature}")
        if self.top_k < 0 or self.no_repeat_ngram < 0:
            raise ValueError(
                f"[SamplingOptions] top_k and no_repeat_ngram must not be negative but got "
                f"{self.top_k} and {self.no_repeat_ngram}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"[SamplingOptions] top_p must lie in (0, 1] but got {self.top_p}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"[SamplingOptions] repetition_penalty must be positive but got {self.repetition_penalty}")


def penalise_repetition(logits: mx.array, generated: Sequence[int], penalty: float) -> mx.array:
    """Make tokens that were generated less likely: s · p if s < 0, else s / p, once per distinct token.

    Args:
        logits: (V,).
        generated: Token ids so far.
        penalty: p; 1 changes nothing.

    Returns:
        Logits (V,).
    """
    if penalty == 1.0 or not generated:
        return logits
    ids = mx.array(sorted(set(generated)))
    scores = logits[ids]
    logits = mx.array(logits)
    logits[ids] = _penalise(scores, penalty)
    return logits


def _penalise(scores: mx.array, penalty: float) -> mx.array:
    return mx.where(scores < 0, scores * penalty, scores / penalty)


def banned_by_ngram(generated: Sequence[int], size: int) -> list[int]:
    """Return the tokens that would complete an n-gram of `size` tokens a second time."""
    if size < 1 or len(generated) < size:
        return []
    tail = tuple(generated[len(generated) - size + 1 :])
    starts = range(len(generated) - size + 1)
    return sorted({generated[i + size - 1] for i in starts if tuple(generated[i : i + size - 1]) == tail})


def ban_repeated_ngrams(logits: mx.array, generated: Sequence[int], size: int) -> mx.array:
    """Set the logits (V,) of tokens that would repeat an n-gram of `size` tokens to minus infinity."""
    banned = banned_by_ngram(generated, size)
    if banned:
        logits = mx.array(logits)
        logits[mx.array(banned)] = -mx.inf
    return logits


def keep_top_k(logits: mx.array, k: int) -> mx.array:
    """Set all but the `k` largest logits (V,) to minus infinity; ties with the k-th stay."""
    if k == 0 or k >= logits.size:
        return logits
    threshold = mx.min(mx.topk(logits, k))
    return mx.where(logits < threshold, -mx.inf, logits)


def keep_top_p(logits: mx.array, p: float) -> mx.array:
    """Keep the most likely tokens of logits (V,) until their probability reaches `p`, at least one."""
    if p >= 1.0:
        return logits
    order = mx.argsort(-logits)
    probabilities = mx.softmax(logits[order], precise=True)
    before = mx.cumsum(probabilities) - probabilities
    cut = mx.where(before < p, logits[order], -mx.inf)
    return mx.put_along_axis(mx.zeros_like(logits), order, cut, axis=0)


def run_changes(
    options: SamplingOptions, generated: Sequence[int], run: Sequence[int] = ()
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the entries (row, token id) that the penalty and the ban change in a run; see `Sampler.process_run`."""
    history, seen = list(generated), set(generated)
    penalised: list[tuple[int, int]] = []
    banned: list[tuple[int, int]] = []
    for row in range(len(run) + 1):
        if options.repetition_penalty != 1.0:
            penalised += [(row, token) for token in seen]
        banned += [(row, token) for token in banned_by_ngram(history, options.no_repeat_ngram)]
        if row < len(run):
            history.append(run[row])
            seen.add(run[row])
    return penalised, banned


def best_two(scores: mx.array) -> tuple[mx.array, mx.array]:
    """Return the best token of each row of scores (K, V), and by how much it leads: ids (K,) and leads (K,).

    The lead is no number where the two best scores are infinite or one of them is no number.
    """
    ids = mx.argmax(scores, axis=-1, keepdims=True)
    best = mx.take_along_axis(scores, ids, axis=-1)
    others = mx.put_along_axis(scores, ids, mx.array(-mx.inf, dtype=scores.dtype), axis=-1)
    return ids[:, 0], best[:, 0] - mx.max(others, axis=-1)


class Sampler:
    """Chooses tokens one by one under fixed options.

    Args:
        options: How to choose.
    """

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self._key = None if options.seed is None else mx.random.key(options.seed)

    def process(self, logits: mx.array, generated: Sequence[int]) -> mx.array:
        """Apply penalty and ban to logits (V,); float32 out, the input is left alone."""
        logits = penalise_repetition(logits.astype(mx.float32), generated, self.options.repetition_penalty)
        return ban_repeated_ngrams(logits, generated, self.options.no_repeat_ngram)

    def process_run(self, logits: mx.array, generated: Sequence[int], run: Sequence[int]) -> mx.array:
        """Apply penalty and ban to the logits of a run, each row with the history that it would have.

        Args:
            logits: (K, V); row i is what follows `generated` and the first i tokens of `run`.
            generated: Token ids so far.
            run: K - 1 token ids.

        Returns:
            Logits (K, V), float32; each row as `process` gives it.
        """
        logits = mx.array(logits.astype(mx.float32))
        penalised, banned = run_changes(self.options, generated, run)
        if penalised:
            rows, ids = (mx.array(places) for places in zip(*penalised, strict=True))
            logits[rows, ids] = _penalise(logits[rows, ids], self.options.repetition_penalty)
        if banned:
            rows, ids = (mx.array(places) for places in zip(*banned, strict=True))
            logits[rows, ids] = -mx.inf
        return logits

    def choose(self, logits: mx.array, generated: Sequence[int]) -> int:
        """Choose the next token.

        Args:
            logits: (V,) of the last position.
            generated: Token ids generated so far.

        Returns:
            A token id.
        """
        scores = self.process(logits, generated)
        if self.options.temperature == 0:
            return int(mx.argmax(scores))
        scores = keep_top_p(keep_top_k(scores / self.options.temperature, self.options.top_k), self.options.top_p)
        key = None
        if self._key is not None:
            self._key, key = mx.random.split(self._key)
        return int(mx.random.categorical(scores, key=key))


class GreedyChain:
    """Chooses the most likely tokens one by one on the device, its own choices being the history.

    The tokens are those of `Sampler` at temperature 0. As neither they nor the history have to reach the host, the
    next step of the decoder can be queued while the device still works on this one.

    Args:
        options: How to choose; the temperature must be 0.
        generated: Token ids that were generated before.

    Raises:
        ValueError: If it is not.
    """

    def __init__(self, options: SamplingOptions, generated: Sequence[int] = ()) -> None:
        if options.temperature != 0:
            raise ValueError(f"[GreedyChain] temperature must be 0 but got {options.temperature}")
        self.options = options
        self._by_kernel = LOGITS_ARGMAX.ready()
        # The kernel reads a history with room to spare, which is one form for all steps; plain operations cost least
        # on one that is just as long as the text.
        self._length = len(generated)
        room = _HISTORY_STEP * (self._length // _HISTORY_STEP + 1) if self._by_kernel else self._length
        self._history = mx.zeros((1, room), dtype=mx.int32)
        if generated:
            self._history[0, : self._length] = mx.array(list(generated), dtype=mx.int32)

    @staticmethod
    def pays(options: SamplingOptions) -> bool:
        """Whether tokens can be chosen so."""
        return options.temperature == 0

    def choose(self, logits: mx.array) -> mx.array:
        """Choose the next token.

        Args:
            logits: (V,) of the last position.

        Returns:
            The token id (1,), int32, not evaluated.
        """
        if not self._by_kernel:
            token = self._choose_plainly(logits.astype(mx.float32))
            self._history = mx.concatenate([self._history, token[None]], axis=1)
            return token
        token = logits_argmax(
            logits[None],
            self._history,
            mx.array([self._length], dtype=mx.int32),
            penalty=self.options.repetition_penalty,
            ngram=self.options.no_repeat_ngram,
        )
        if self._length == self._history.shape[1]:
            self._history = mx.concatenate([self._history, mx.zeros((1, _HISTORY_STEP), dtype=mx.int32)], axis=1)
        self._history[:, self._length] = token
        self._length += 1
        return token

    def _choose_plainly(self, scores: mx.array) -> mx.array:
        """Choose from scores (V,) with work that grows with the history, hardly with the vocabulary."""
        tokens, penalty, size = self._history[0], self.options.repetition_penalty, self.options.no_repeat_ngram
        if tokens.size and penalty != 1.0:  # a token that is there twice gets the same score twice
            scores = mx.put_along_axis(scores, tokens, _penalise(scores[tokens], penalty), axis=0)
        starts = tokens.size - size + 1
        if size and starts > 0:
            same = mx.ones((starts,), dtype=mx.bool_)
            for j in range(size - 1):
                same = same & (tokens[j : j + starts] == tokens[starts + j])
            scores = scores.at[tokens[size - 1 :]].minimum(mx.where(same, -mx.inf, mx.inf))
        return mx.argmax(scores, keepdims=True).astype(mx.int32)
