"""The ways to compute an operation that are held against each other."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from .facts import Device
from .timing import Arguments, Call

if TYPE_CHECKING:
    from qwen4b_asr.kernels._dispatch import Operation

NAMES = ("kernel", "reference", "compiled", "mlx")
PLAIN = NAMES[1:]
"""What MLX gives without a kernel of ours."""

IS_REFERENCE = "the reference is MLX's own fused operation"
NO_GPU = "no GPU in use: kernels run on Metal and CUDA only"


@dataclass(frozen=True)
class Way:
    """One way, or why there is none: exactly one of the two is set."""

    call: Call | None = None
    reason: str = ""


@dataclass(frozen=True)
class Fused:
    """What MLX itself has for an operation.

    Attributes:
        name: Its functions, for people.
        same_on: Devices on which the reference already is that.
        call: From the reference and its arguments, the result by way of it; not needed where it is the reference.
    """

    name: str
    same_on: frozenset[str]
    call: Callable[[Callable[..., Any], Arguments], Any] | None = None


FUSED: Mapping[str, Fused] = {
    "attention": Fused("mx.fast.scaled_dot_product_attention", frozenset({"cpu", "gpu"})),
    "qk_norm_rope": Fused("mx.fast.rms_norm, mx.fast.rope", frozenset({"cpu", "gpu"})),
    "fsmn": Fused(
        "mx.conv1d(groups=D)",
        frozenset({"gpu"}),
        lambda reference, arguments: reference(**{**arguments, "shifted_adds": False}),
    ),
}
"""By operation; one that is not here has no fused counterpart in MLX."""


def ways(operation: Operation, arguments: Arguments, device: Device) -> dict[str, Way]:
    """Return every way of `NAMES` to compute `operation`.

    The kernel is called directly, not through the dispatching operation: that would step aside for the reference on an
    error, and the reference's time would stand where the kernel's should.

    Args:
        operation: What to compute.
        arguments: One set of arguments: which of them are arrays decides the compiled form.
        device: MLX's default device, on which all of them run.
    """
    return {
        "kernel": _kernel(operation, device.backend),
        "reference": Way(lambda given: operation.reference(**given)),
        "compiled": _compiled(operation, arguments, device.type),
        "mlx": _fused(operation, device.type),
    }


def _kernel(operation: Operation, backend: str | None) -> Way:
    from qwen4b_asr.kernels._loader import current_override

    if backend is None:
        return Way(reason=NO_GPU)
    if current_override():
        return Way(reason="kernels are built by a stand-in for the GPU: its times say nothing of a kernel")
    return Way(lambda given: operation.kernel(**given))


def _compiled(operation: Operation, arguments: Arguments, device: str) -> Way:
    if device == "cpu" and not has_compiler():
        return Way(reason="mx.compile needs g++ on the CPU")
    constants = {name: value for name, value in arguments.items() if not isinstance(value, mx.array)}
    # Constants stay outside: mx.compile takes arrays, and would trace anew for every other value.
    compiled = mx.compile(lambda arrays: operation.reference(**arrays, **constants))
    return Way(lambda given: compiled({name: given[name] for name in given if name not in constants}))


def _fused(operation: Operation, device: str) -> Way:
    fused = FUSED.get(operation.name)
    if fused is None:
        return Way(reason="MLX has no fused operation for it")
    if device in fused.same_on or fused.call is None:
        return Way(reason=IS_REFERENCE)
    call = fused.call
    return Way(lambda given: call(operation.reference, given))


@lru_cache(maxsize=1)
def has_compiler() -> bool:
    """Whether `mx.compile` compiles on the CPU: without ``g++`` it silently runs the operations as they are."""
    try:
        return subprocess.run(["g++", "--version"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False
