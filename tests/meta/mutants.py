"""Mutants: texts with one planted mistake, and the checks that must find it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from tests.helpers import metal_host


@dataclass(frozen=True)
class Mutant:
    """A mistake to plant.

    Attributes:
        name: What it is.
        old: Text of the correct source; must occur in it.
        new: What stands there instead.
        killed_by: ``compile`` (the host's compiler refuses it), ``launch`` (it did something undefined), ``schedule``
            (runs differ), ``numbers`` (the result is wrong) or ``lint`` (clang refuses what all others let pass).
        says: Part of the message.
        dtype: Element type of the run.
    """

    name: str
    old: str
    new: str
    killed_by: str
    says: str = ""
    dtype: str = "float32"

    def plant(self, source: str) -> str:
        """Return the source with the mistake in it."""
        assert source.count(self.old) == 1, (
            f"the mutant '{self.name}' replaces text that should occur once but occurs {source.count(self.old)} times; "
            "if the kernel has changed, the mutant has to change with it"
        )
        return source.replace(self.old, self.new)


def verdict(
    call: Callable[[], mx.array | Sequence[mx.array]],
    problem: Callable[[mx.array | Sequence[mx.array]], str | None],
    texts: Callable[[], Sequence[str]],
) -> tuple[str, str]:
    """Hold a kernel against all checks.

    Args:
        call: Launches it once on the host.
        problem: What is wrong with a result, or None.
        texts: The Metal texts to lint; asked for only when all else is well and clang is here.

    Returns:
        The first check that kills it, and its message; ``("none", "")`` if it survives.
    """
    try:
        result = metal_host.verify(call)
    except metal_host.CompileError as error:
        return "compile", str(error)
    except metal_host.LaunchError as error:
        return "launch", str(error)
    except metal_host.ScheduleError as error:
        return "schedule", str(error)
    if message := problem(result):
        return "numbers", message
    if metal_host.lint_unavailable() is None:
        for text in texts():
            if found := metal_host.lint(text):
                return "lint", "; ".join(found)
    return "none", ""
