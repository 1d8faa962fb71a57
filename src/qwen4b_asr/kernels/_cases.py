"""The shapes and values that a kernel is checked, tested and timed on: one table for all three."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ._contract import DTYPES

ROLES = frozenset({"check", "test", "bench"})
"""What a case is for: ``check`` cases are tiny, as the self-check of each machine and the host runner of the tests use
them; ``test`` cases are for the tests alone; ``bench`` cases have the sizes of real models."""

Arguments = dict[str, Any]
"""Keyword arguments of an operation."""


class Generator:
    """Random numbers by NumPy's names, from MLX: a stage that is copied elsewhere should need nothing more.

    They are made on the CPU, the same on every machine, and leave `mx.random`'s own state alone.

    Args:
        seed: Which numbers.
    """

    def __init__(self, seed: int) -> None:
        self._key = mx.random.key(seed)

    def standard_normal(self, shape: int | Sequence[int]) -> mx.array:
        """Draw from the normal distribution, as float32."""
        return mx.random.normal(_axes(shape), key=self._next(), stream=mx.cpu)

    def uniform(self, low: float, high: float, shape: int | Sequence[int]) -> mx.array:
        """Draw evenly from `low` to `high`, as float32."""
        return mx.random.uniform(low, high, _axes(shape), key=self._next(), stream=mx.cpu)

    def integers(self, low: int, high: int, shape: int | Sequence[int]) -> mx.array:
        """Draw from `low` to `high` - 1, as int32."""
        return mx.random.randint(low, high, _axes(shape), key=self._next(), stream=mx.cpu)

    def choice(self, values: mx.array, shape: int | Sequence[int]) -> mx.array:
        """Draw from `values` (N,), with repetition."""
        return values[self.integers(0, values.size, shape)]

    def _next(self) -> mx.array:
        self._key, key = mx.random.split(self._key, stream=mx.cpu)
        return key


def _axes(shape: int | Sequence[int]) -> list[int]:
    return [shape] if isinstance(shape, int) else list(shape)


@dataclass(frozen=True)
class Case:
    """One set of arguments for an operation.

    Attributes:
        name: What is special about it, in a word or two; unique within its operation.
        make: From a random generator and the element type, the keyword arguments of the operation.
        dtypes: Names of the element types to try, such as ``float32``.
        roles: Any of `ROLES`.
        bytes: From the arguments, how many bytes have to be read and written at the least.
        flops: From the arguments, how many multiplications and additions it takes.
    """

    name: str
    make: Callable[[Generator, mx.Dtype], Arguments]
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    roles: frozenset[str] = field(default_factory=lambda: frozenset({"check", "test"}))
    bytes: Callable[[Arguments], int] | None = None
    flops: Callable[[Arguments], int] | None = None

    def __post_init__(self) -> None:
        if not self.roles or not self.roles <= ROLES:
            raise ValueError(f"[Case] roles of {self.name} must be some of {sorted(ROLES)} but got {set(self.roles)}")
        if not self.dtypes or not set(self.dtypes) <= set(DTYPES):
            raise ValueError(f"[Case] dtypes of {self.name} must be some of {list(DTYPES)} but got {self.dtypes}")

    def arguments(self, dtype: str, seed: int = 0) -> Arguments:
        """Make the keyword arguments of the operation, the same ones for the same seed.

        Args:
            dtype: One of `dtypes`.
            seed: Which random numbers.
        """
        if dtype not in self.dtypes:
            raise ValueError(f"[Case] dtype of {self.name} must be one of {self.dtypes} but got {dtype}")
        return self.make(Generator(seed), DTYPES[dtype])
