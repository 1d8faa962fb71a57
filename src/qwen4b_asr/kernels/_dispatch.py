"""From an operation's arguments to the kernel where it is trusted, and to the plain operations everywhere else."""

from __future__ import annotations

import hashlib
import inspect
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from ._cases import Case
from ._loader import Kernel, backend, current_override
from ._selfcheck import find_mismatch, has_passed, machine, remember_passed
from ._switch import chosen, know


class KernelWarning(RuntimeWarning):
    """A kernel failed on this machine, and the plain operations take its place."""


@dataclass(frozen=True)
class State:
    """How things stand with an operation's kernel.

    Attributes:
        status: ``used``, ``off`` by choice or default, ``failed``, or ``plain`` where no GPU is in use.
        detail: Why, in a line.
    """

    status: Literal["used", "off", "failed", "plain"]
    detail: str


class Operation:
    """An operation that has a kernel.

    Called, it gives the kernel's result where there is a GPU, nobody turned the kernel off, and a comparison with the
    plain operations on small inputs passed on this machine; else the plain operations' result. A kernel that fails
    once is left alone for the rest of the process, with one `KernelWarning`.

    Gradients are those of the plain operations if the sources' contracts say ``vjp: reference``.

    Args:
        name: Its name.
        kernel: Launches the kernel.
        reference: Computes the same by MLX's own operations.
        cases: What both are compared on.
        files: The Metal sources that the kernel launches.
        default: Whether the kernel is used when nobody has chosen.
    """

    def __init__(
        self,
        name: str,
        *,
        kernel: Callable[..., Any],
        reference: Callable[..., Any],
        cases: Sequence[Case],
        files: Sequence[str],
        default: bool = True,
    ) -> None:
        self.name = name
        self.kernel = kernel
        self.reference = reference
        self.cases = tuple(cases)
        self.files = tuple(files)
        self.default = default
        self._lock = threading.RLock()
        self._checking = False
        self._states: dict[object, State] = {}
        know(name)

    def __repr__(self) -> str:
        return f"Operation({self.name!r})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute; arguments and result are those of `reference`."""
        if not self.ready():
            return self.reference(*args, **kwargs)
        override = current_override()
        if override and override[1]:
            return self._launch(args, kwargs)
        try:
            return self._launch(args, kwargs)
        except Exception as error:
            result = self.reference(*args, **kwargs)  # raises by itself if the arguments were to blame
            self._fail(error)
            return result

    def ready(self) -> bool:
        """Return whether the next call will use the kernel; the first time, find out.

        Raises:
            ConfigError: If the environment variable `QWEN4B_ASR_KERNELS` names an operation that does not exist.
        """
        override = current_override()
        trusted = override is not None and override[1]
        if not chosen(self.name, self.default or trusted):
            return False
        on = backend()
        if on is None:
            return False
        if trusted:
            return True
        state = self._states.get(self._where(on))
        return (state or self._check(on)).status == "used"

    def state(self) -> State:
        """Return how things stand with the kernel, after finding out as `ready` does."""
        on = backend()
        if not chosen(self.name, True):
            return State("off", "turned off")
        if on is None:
            return State("plain", "plain operations: the default device is not a GPU")
        if not chosen(self.name, self.default):
            return State("off", "off unless asked for: no measurement shows that it pays")
        self.ready()
        return self._states.get(self._where(on)) or State("used", "trusted without a self-check")

    @cached_property
    def sources(self) -> tuple[Kernel, ...]:
        """The Metal sources, for their contracts and hashes."""
        return tuple(Kernel(file) for file in self.files)

    def _where(self, on: str) -> object:
        """What a check holds for: the stand-in of a test, or the backend."""
        override = current_override()
        return override[0] if override else on

    def _check(self, on: str) -> State:
        """Find out whether the kernel can be trusted; other threads wait for the answer."""
        where = self._where(on)
        with self._lock:
            if where in self._states:
                return self._states[where]
            if self._checking:  # the check itself came by here
                return State("plain", "being checked")
            self._checking = True
            try:
                # What fails here is reported, not raised: the plain operations are always there.
                key = self._key(on)
                if current_override() is None and has_passed(key):
                    self._states[where] = State("used", "self-check passed earlier")
                elif mismatch := find_mismatch(self.kernel, self.reference, self.cases):
                    self._fail(mismatch)
                else:
                    self._states[where] = State("used", "self-check passed")
                    if current_override() is None:
                        remember_passed(key)
            except Exception as error:
                self._fail(error)
            finally:
                self._checking = False
            return self._states[where]

    def _key(self, on: str) -> dict[str, str]:
        """What a remembered check is valid for: kernel, wrapper, MLX, machine."""
        wrapper = Path(inspect.getfile(self.kernel)).read_bytes()
        digest = hashlib.sha256(b"\0".join([wrapper, *(source.hash.encode() for source in self.sources)]))
        return {"kernel": self.name, "sources": digest.hexdigest(), **machine(on)}

    def _fail(self, error: Exception | str) -> None:
        """Leave the kernel alone from now on, and say so once."""
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        where = self._where(backend() or "")
        with self._lock:
            known = self._states.get(where)
            self._states[where] = State("failed", text)
        if known is None or known.status != "failed":
            first = next((line for line in text.splitlines() if line.strip()), "no reason given")
            message = f"the kernel {self.name} is not used, plain operations take its place: {first}"
            warnings.warn(f"{message} (`qwen4b-asr doctor` says more)", KernelWarning, stacklevel=4)

    def _launch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not all(source.contract.differentiable for source in self.sources):
            return self.kernel(*args, **kwargs)
        slots: list[int | str] = [i for i, value in enumerate(args) if isinstance(value, mx.array)]
        slots += [name for name, value in kwargs.items() if isinstance(value, mx.array)]

        def with_arrays(function: Callable[..., Any], arrays: Sequence[mx.array]) -> Any:
            positional, named = list(args), dict(kwargs)
            for slot, array in zip(slots, arrays, strict=True):
                if isinstance(slot, int):
                    positional[slot] = array
                else:
                    named[slot] = array
            return function(*positional, **named)

        # Made anew for each call (under a microsecond), as only arrays may be arguments of a custom function.
        function = mx.custom_function(lambda *arrays: with_arrays(self.kernel, arrays))

        def vjp(primals: Any, cotangents: Any, _: Any) -> list[mx.array]:
            def plain(*arrays: mx.array) -> list[mx.array]:
                return _as_list(with_arrays(self.reference, arrays))

            return mx.vjp(plain, _as_list(primals), _as_list(cotangents))[1]

        function.vjp(vjp)
        return function(*(args[slot] if isinstance(slot, int) else kwargs[slot] for slot in slots))


def _as_list(value: Any) -> list[mx.array]:
    return [value] if isinstance(value, mx.array) else list(value)
