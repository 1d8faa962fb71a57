"""The shapes and values that a kernel is checked, tested and timed on: one table for all three."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ._contract import DTYPES

ROLES = frozenset({"check", "test", "bench"})
"""What a case is for: ``check`` cases are tiny, as the self-check of each machine and the host runner of the tests use
them; ``test`` cases are for the tests alone; ``bench`` cases have the sizes of real models."""

Arguments = dict[str, Any]
"""Keyword arguments of an operation."""


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
    make: Callable[[np.random.Generator, mx.Dtype], Arguments]
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
        return self.make(np.random.default_rng(seed), DTYPES[dtype])
