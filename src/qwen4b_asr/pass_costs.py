"""When it pays to let the decoder verify a run of drafted tokens: what a pass costs, and what it may be hoped to give.

A pass over several rows reads the same weights as one over a single row, so it costs little more wherever reading
them is what takes time. Source of the expectation: Leviathan, Kalman and Matias, "Fast Inference from Transformers via
Speculative Decoding" (2023), with the chance of a first hit kept apart from that of the following ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
from mlx.utils import tree_flatten

from .decoder import Qwen3

# Cost of each row after the first, in passes of one row. On the CPU it was measured, by `tools/bench/drafts.py`:
# OpenBLAS packs the whole matrix for any number of rows, MLX's own products go row by row. For GPUs it is a guess on
# the careful side.
_ROW_COSTS = {
    ("cpu", "float32"): 0.03,
    ("cpu", "16 bits"): 0.36,
    ("cpu", "quantised"): 0.95,
    ("gpu", "float32"): 0.05,
    ("gpu", "16 bits"): 0.05,
    ("gpu", "quantised"): 0.2,
}
# By type of a matrix: its form, and the weights in each element; codes are mostly of 4 bits, their scales few.
_FORMS = {
    mx.float32: ("float32", 1),
    mx.float16: ("16 bits", 1),
    mx.bfloat16: ("16 bits", 1),
    mx.uint32: ("quantised", 8),
}
# Rows that cost more save too little for the work of drafting.
_WORTH_IT = 0.5
# What drafts may waste altogether: a part of the plain cost, and this many passes more where the draft had the last
# token right. A useless draft hardly ever has, and short texts have little to stake.
_STAKE, _TRUST = 0.015, 0.3
# Hits and misses that a belief starts with: of tokens after a hit, and of those after a miss.
_AFTER_HIT, _AFTER_MISS = (6.0, 0.5), (1.0, 1.0)
# How much of older evidence is left after one more token.
_MEMORY = 0.96


def row_cost(decoder: Qwen3) -> float:
    """Return the cost of each further row of a pass on the default device, in passes of one row.

    Of matrices in several forms it is the mean, by their sizes.
    """
    device = "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"
    sizes: dict[str, int] = {}
    weights: list[tuple[str, mx.array]] = tree_flatten(decoder.parameters())  # type: ignore[assignment]
    for _, weight in weights:
        if weight.ndim == 2 and weight.dtype in _FORMS:
            form, elements = _FORMS[weight.dtype]
            sizes[form] = sizes.get(form, 0) + elements * weight.size
    return sum(_ROW_COSTS[device, form] * size for form, size in sizes.items()) / max(1, sum(sizes.values()))


def drafts_pay(decoder: Qwen3) -> bool:
    """Tell whether verifying a good draft is faster than decoding by itself, with something to spare."""
    return row_cost(decoder) < _WORTH_IT


@dataclass
class Chance:
    """A chance that is learnt, the latest evidence counting most."""

    hits: float
    misses: float

    @property
    def value(self) -> float:
        """Expected share of hits."""
        return self.hits / (self.hits + self.misses)

    def learn(self, hit: bool) -> None:
        """Take note of one more trial."""
        self.hits = _MEMORY * self.hits + hit
        self.misses = _MEMORY * self.misses + (not hit)


@dataclass
class Stakes:
    """Decides how many drafted tokens the next pass verifies, and keeps the account of what that gains and costs.

    Args:
        row_cost: Cost of each row after the first, in passes of one row.
        tokens: About how many tokens will come: what may be wasted is a small part of their plain cost.
        longest: Drafted tokens of a pass at most.
    """

    row_cost: float
    tokens: int
    longest: int = 31
    after_hit: Chance = field(default_factory=lambda: Chance(*_AFTER_HIT))
    after_miss: Chance = field(default_factory=lambda: Chance(*_AFTER_MISS))
    debt: float = 0.0
    _hit: bool = False
    _ever_hit: bool = False

    def learn(self, hit: bool) -> None:
        """Take note of whether the draft had the next token right, verified by a run or not."""
        (self.after_hit if self._hit else self.after_miss).learn(hit)
        self._hit = hit
        self._ever_hit = self._ever_hit or hit

    def pay(self, rows: int, tokens: int) -> None:
        """Enter a pass over `rows` rows that gave `tokens` tokens."""
        self.debt += 1 + self.row_cost * (rows - 1) - tokens

    def run_length(self, done: int, most: int) -> int:
        """Choose how many drafted tokens to verify next.

        The number with the most tokens expected per cost, as long as all that was lost, and this run too, could not
        be more than the stake. Nothing is staked before the draft has had a token right: plain steps tell as much of
        a draft, and most useless ones end there.

        Args:
            done: Tokens generated so far.
            most: Drafted tokens there are, or room for.

        Returns:
            0 to take a plain step.
        """
        if not self._ever_hit:
            return 0
        most = min(most, self.longest)
        loss_allowed = _STAKE * max(done, self.tokens) + _TRUST * self._hit - self.debt
        if self.row_cost > 0:
            most = min(most, int(loss_allowed / self.row_cost)) if loss_allowed > 0 else 0
        again = self.after_hit.value
        reach = again if self._hit else self.after_miss.value  # chance that a run gets as far as its last token
        expected, best, best_rate = 1.0, 0, 1.0
        for length in range(1, most + 1):
            expected += reach
            reach *= again
            rate = expected / (1 + self.row_cost * length)
            if rate > best_rate:
                best, best_rate = length, rate
        return best
