"""Which kernels may be used: an environment variable for users, `use` for programs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache
from types import TracebackType

from ..errors import ConfigError

VARIABLE = "QWEN4B_ASR_KERNELS"
"""Environment variable: ``on``, ``off``, or names separated by commas. Unset, each operation has its own default."""

NAMES = ("add_rms_norm", "attention", "fsmn", "lfr_cmvn", "logits_argmax", "qk_norm_rope")
"""All operations with a kernel, also those that a copy of some stages does not have."""

Choice = frozenset[str] | bool | None
"""The names to use; all or none of them; None leaves it to each operation's default."""

_KNOWN = set(NAMES)
_CHOICES: list[Choice] = []


def know(name: str) -> None:
    """Allow a name in the choices."""
    _KNOWN.add(name)


def chosen(name: str, default: bool) -> bool:
    """Return whether the operation's kernel may be used.

    Args:
        name: Name of the operation.
        default: What holds if nobody has chosen.

    Raises:
        ConfigError: If the environment variable names an operation that does not exist.
    """
    choice = _CHOICES[-1] if _CHOICES else None
    if choice is None:
        choice = _from_environment(os.environ.get(VARIABLE, ""))
    if choice is None:
        return default
    return choice if isinstance(choice, bool) else name in choice


class use:
    """Choose the kernels for all threads, from here on or for the length of a ``with`` block.

    ``use("off")`` turns them off; ``with use("fsmn", "attention"):`` allows these two alone and puts back what held
    before. What is chosen so wins over the environment variable.

    Args:
        names: ``"on"``, ``"off"``, or names of operations; nothing hands the choice back to the environment.

    Raises:
        ValueError: If there is no such operation.
    """

    def __init__(self, *names: str) -> None:
        try:
            self._choice = _parse(names)
        except ValueError as error:
            raise ValueError(f"[kernels.use] {error}") from None
        _CHOICES.append(self._choice)

    def __enter__(self) -> None:
        self._depth = len(_CHOICES)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del _CHOICES[self._depth - 1 :]


def _parse(names: Iterable[str]) -> Choice:
    """Understand a choice.

    Raises:
        ValueError: If it names something that does not exist; the message ends in a rule and what was given.
    """
    wanted = [name.strip() for name in names]
    if not wanted:
        return None
    if wanted in (["on"], ["off"]):
        return wanted == ["on"]
    if unknown := [name for name in wanted if name not in _KNOWN]:
        raise ValueError(f"must be on, off or some of {', '.join(sorted(_KNOWN))} but got {', '.join(unknown)}")
    return frozenset(wanted)


@lru_cache(maxsize=8)
def _from_environment(value: str) -> Choice:
    try:
        return _parse(value.lower().split(",") if value.strip() else ())
    except ValueError as error:
        raise ConfigError(f"the environment variable {VARIABLE} {error}") from None
