"""Planted defects: each is a mistake that somebody made, or could make, and each must fail a golden check.

A defect that survives means that a tolerance is too wide or a golden too tame to notice it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qwen4b_asr import features

from .support import GoldenMismatch

Patch = pytest.MonkeyPatch
Check = Callable[[], None]
Plant = Callable[[Patch], None]


class Defects(dict[str, tuple[Plant, Check]]):
    """The defects of one test module, each with the check that must notice it."""

    def noticed_by(self, check: Check) -> Callable[[Plant], Plant]:
        """Register a function that plants a defect."""

        def register(plant: Plant) -> Plant:
            self[plant.__name__] = (plant, check)
            return plant

        return register

    def require_notice(self, name: str, patch: Patch) -> None:
        """Plant a defect and make sure that its check fails, having passed before."""
        plant, check = self[name]
        check()  # whole, it passes: the failure below is the defect's doing
        plant(patch)
        try:
            with pytest.raises(GoldenMismatch):
                check()
        finally:
            for held in vars(features).values():  # nothing that a defect computed may outlive it
                if hasattr(held, "cache_clear"):
                    held.cache_clear()


def rewrite(patch: Patch, owner: type, change: Callable[[Any], None]) -> None:
    """Apply `change` to every instance of a class after it is built."""
    original = owner.__init__

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        change(self)

    patch.setattr(owner, "__init__", build)


def override(patch: Patch, owner: type, **fixed: Any) -> None:
    """Give every instance of a configuration other settings than were asked for."""
    original = owner.__init__
    patch.setattr(owner, "__init__", lambda self, **kwargs: original(self, **{**kwargs, **fixed}))


def attend(patch: Patch, change: Callable[..., Any]) -> None:
    """Replace MLX's attention by `change(original, *args, **kwargs)`."""
    import mlx.core as mx

    from qwen4b_asr.kernels import attention

    patch.setattr(attention, "powers_of_two_pay", lambda q, k: False)  # every stage is to come by MLX's
    original = mx.fast.scaled_dot_product_attention
    patch.setattr(mx.fast, "scaled_dot_product_attention", lambda *args, **kw: change(original, *args, **kw))


def unmasked(original: Any, *args: Any, mask: Any = None, **kwargs: Any) -> Any:
    """Attend to everything (for `attend`)."""
    return original(*args, mask=None, **kwargs)
