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


@dataclass(frozen=True)
class PassCost:
    """What passes over several rows cost, in passes over one.

    Args:
        row: Each row beyond those that come free.
        free: Rows for which a pass takes no longer than for a few.
        run: Verifying a run at all: several rows instead of one, choosing a token in each, and waiting for the result.
        group: Rows are computed in groups of so many.
        pair: The whole pass over two rows, where that is less than over a few.
    """

    row: float
    free: int = 1
    run: float = 0.04
    group: int = 1
    pair: float | None = None

    def of(self, rows: int) -> float:
        """Cost of one pass."""
        if rows == 2 and self.pair is not None:
            return self.pair
        computed = -(-rows // self.group) * self.group
        return 1.0 if rows == 1 else 1 + self.run + self.row * max(0, computed - self.free)


# On the CPU they were measured, by `tools/bench/drafts.py --costs`: NumPy has a routine of its own for one row, which
# reads a matrix twice as fast as OpenBLAS packs it for several, but for a matrix in the caches; MLX has it packed
# always. Codes become numbers once for all rows where NumPy multiplies; MLX's products of them, and of 16 bits, go row
# by row. For GPUs they are a guess on the careful side.
_COSTS = {
    ("numpy", "float32"): PassCost(0.115, free=8, run=1.4, group=8, pair=1.7),
    ("numpy", "float32 in cache"): PassCost(0.025, free=8, run=0.4),
    ("numpy", "quantised"): PassCost(0.17, free=8, run=1.5, pair=1.8),
    ("cpu", "float32"): PassCost(0.04, free=8),
    ("cpu", "16 bits"): PassCost(0.36),
    ("cpu", "quantised"): PassCost(0.95),
    ("gpu", "float32"): PassCost(0.05, free=2),
    ("gpu", "16 bits"): PassCost(0.05, free=2),
    ("gpu", "quantised"): PassCost(0.2),
}
# By type of a matrix: its form, and the weights in each element; codes are mostly of 4 bits, their scales few.
_FORMS = {
    mx.float32: ("float32", 1),
    mx.float16: ("16 bits", 1),
    mx.bfloat16: ("16 bits", 1),
    mx.uint32: ("quantised", 8),
}
# Bytes of float32 weights up to which they stay in the caches of a CPU from one pass to the next.
_IN_CACHE = 16 << 20
# Rows that cost more save too little for the work of drafting.
_WORTH_IT = 0.5
# What drafts may waste altogether: a part of the plain cost, and where the draft had the last token right this many
# passes more: a useless draft hardly ever has, and short texts have little to stake.
_STAKE, _TRUST = 0.015, 0.3
# Tokens per cost that a run must promise, where a plain step gives 1.
_GAIN = 1.05
# Hits and misses that a belief starts with: of tokens after a hit, and of those after a miss.
_AFTER_HIT, _AFTER_MISS = (4.0, 0.5), (1.0, 1.0)
# How much of older evidence is left after one more token.
_MEMORY = 0.96


def pass_cost(decoder: Qwen3) -> PassCost:
    """Return what passes cost on the default device; of matrices in several forms the mean, by their sizes."""
    device = "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"
    sizes: dict[str, int] = {}
    weights: list[tuple[str, mx.array]] = tree_flatten(decoder.parameters())  # type: ignore[assignment]
    for _, weight in weights:
        if weight.ndim == 2 and weight.dtype in _FORMS:
            form, elements = _FORMS[weight.dtype]
            sizes[form] = sizes.get(form, 0) + elements * weight.size
    costs = {form: _COSTS[device, form] for form in sizes}
    if decoder.computes_at_once and "float32" in sizes:
        in_cache = 4 * sizes["float32"] <= _IN_CACHE
        costs["float32"] = _COSTS["numpy", "float32 in cache" if in_cache else "float32"]
    if "quantised" in sizes and all(getattr(m, "computes_at_once", False) for m in decoder.modules() if "scales" in m):
        costs["quantised"] = _COSTS["numpy", "quantised"]
    total = max(1, sum(sizes.values()))
    shares = [(costs[form], size / total) for form, size in sizes.items()]
    paired = any(cost.pair is not None for cost, _ in shares)
    return PassCost(
        pair=sum(cost.of(2) * share for cost, share in shares) if paired else None,
        row=sum(cost.row * share for cost, share in shares),
        free=int(sum(cost.free * share for cost, share in shares) + 0.5),
        run=sum(cost.run * share for cost, share in shares),
        group=max((cost.group for cost, share in shares if share > 0.5), default=1),
    )


def row_cost(decoder: Qwen3) -> float:
    """Return what each row costs that does not come free, in passes over one."""
    return pass_cost(decoder).row


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
        cost: What passes cost.
        tokens: About how many plain steps it will be: what may be wasted is a small part of their cost.
        longest: Drafted tokens of a pass at most.
    """

    cost: PassCost
    tokens: int
    longest: int = 23
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
        self.debt += self.cost.of(rows) - tokens

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
        stake = _STAKE * max(done, self.tokens)
        loss_allowed = stake + (_TRUST if self._hit else 0.0) - self.debt
        again = self.after_hit.value
        reach = again if self._hit else self.after_miss.value  # chance that a run gets as far as its last token
        expected, best, best_rate = 1.0, 0, _GAIN
        for length in range(1, min(most, self.longest) + 1):
            cost = self.cost.of(1 + length)
            if cost - 1 > loss_allowed:
                break
            expected += reach
            reach *= again
            if expected / cost > best_rate:
                best, best_rate = length, expected / cost
        return best
