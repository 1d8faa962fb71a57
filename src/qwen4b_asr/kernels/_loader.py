"""Metal sources as callables: found, read, checked and built at their first launch.

`Kernel("fsmn.metal")` costs nothing until it is called. MLX builds a kernel's text from its source and from what a
launch looks like (`_form`), and keeps what it compiled under the kernel's name alone. So the name that MLX gets
carries a hash of the source and of the launch's form: two texts never share a name.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import mlx.core as mx

from ._contract import Contract, Template, parse_contract
from ._cuda import to_cuda
from ._sources import digest, read_source, split_source

Backend = Literal["metal", "cuda"]
Factory = Callable[..., Any]
"""Builds a callable kernel; the signature is that of `mx.fast.metal_kernel`."""

SMALL = 8
"""MLX passes inputs with fewer elements than this in Metal's `constant` address space."""

REMEMBERED = 1024
"""Launches of one kernel that need no second check."""


@dataclass(eq=False)
class _Override:
    """A stand-in for the GPU, and the kernels built with it."""

    backend: Backend
    factory: Factory
    trusted: bool
    built: dict[Kernel, dict[object, Any]] = field(default_factory=dict)
    launches: dict[Kernel, dict[object, Any]] = field(default_factory=dict)


_LOCK = threading.RLock()
_OVERRIDES: list[_Override] = []


def backend() -> Backend | None:
    """Return what runs kernels: ``metal``, ``cuda``, or None where the plain operations are all there is.

    On a Mac, `mx.fast.metal_kernel` would use the GPU even when the default device is the CPU, so this asks for both.
    """
    if _OVERRIDES:
        return _OVERRIDES[-1].backend
    if mx.default_device().type != mx.DeviceType.gpu:
        return None
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else None


@contextmanager
def override(backend: Backend, factory: Factory, *, trusted: bool = True) -> Iterator[None]:
    """Build kernels with another factory, on any machine; for tests.

    Holds for all threads. Kernels built inside are forgotten at the end.

    Args:
        backend: What `backend()` says inside.
        factory: What builds the kernels; the signature is that of `mx.fast.metal_kernel`. For ``cuda`` it is handed
            the converted text, as `mx.fast.cuda_kernel` would be.
        trusted: Operations use their kernels without a self-check, and an error is raised instead of falling back:
            a test must not pass because the plain operations stepped in.
    """
    entry = _Override(backend, factory, trusted)
    with _LOCK:
        _OVERRIDES.append(entry)
    try:
        yield
    finally:
        with _LOCK:
            _OVERRIDES.remove(entry)


def current_override() -> tuple[object, bool] | None:
    """Return the innermost override's identity and whether it is trusted, or None outside of any."""
    return (_OVERRIDES[-1], _OVERRIDES[-1].trusted) if _OVERRIDES else None


class Kernel:
    """One Metal source, callable.

    Args:
        filename: Its name in the sources' folder, as a literal: by it `tools/vendor.py` finds what to copy along.
        ensure_row_contiguous: Have MLX copy inputs whose rows do not follow each other in memory. Without it the
            source must go by ``NAME_strides``.
        atomic_outputs: Make outputs atomic; Metal only.
    """

    def __init__(self, filename: str, *, ensure_row_contiguous: bool = True, atomic_outputs: bool = False) -> None:
        self.filename = filename
        self.ensure_row_contiguous = ensure_row_contiguous
        self.atomic_outputs = atomic_outputs
        self._built: dict[object, Any] = {}  # by form of launch
        self._launches: dict[object, Any] = {}  # by everything but the contents of the inputs
        self._tried: set[object] = set()

    def __repr__(self) -> str:
        return f"Kernel({self.filename!r})"

    @cached_property
    def source_text(self) -> str:
        """The whole source.

        Raises:
            FileNotFoundError: If there is no such source.
            ValueError: If it is not plain ASCII, which Metal's compiler needs.
        """
        return read_source(self.filename)

    @cached_property
    def contract(self) -> Contract:
        """What the head of the source says of it."""
        return parse_contract(self.source_text)

    @cached_property
    def parts(self) -> tuple[str, str]:
        """Helper code with its own includes put in, and the kernel's body."""
        return split_source(self.source_text, self.filename)

    @cached_property
    def hash(self) -> str:
        """Hash of the source and all that it includes."""
        return digest(*self.parts, self.contract.name)

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        template: Template = (),
        init_value: float | None = None,
    ) -> list[mx.array]:
        """Launch it.

        Args:
            inputs: The contract's inputs.
            grid: Number of threads along each axis.
            threadgroup: Threads of a threadgroup along each axis.
            output_shapes: Shape of each output.
            output_dtypes: Element type of each output.
            template: Name and value of each template argument.
            init_value: What outputs are filled with first; they are uninitialised without.

        Returns:
            The outputs, not evaluated.

        Raises:
            ValueError: If anything is not as the contract says.
            RuntimeError: If there is no GPU, or the source does not compile on it.
        """
        call: dict[str, Any] = {
            "grid": grid,
            "threadgroup": threadgroup,
            "output_shapes": [tuple(shape) for shape in output_shapes],
            "output_dtypes": list(output_dtypes),
            "init_value": init_value,
        }
        if template:
            call["template"] = list(template)
        stand_in = _OVERRIDES[-1] if _OVERRIDES else None
        on = stand_in.backend if stand_in else backend()
        if on is None:
            raise RuntimeError(f"[{self.contract.name}] the kernel needs a GPU as the default device but got none")
        launches = stand_in.launches.setdefault(self, {}) if stand_in else self._launches
        key = (
            on,
            tuple((tuple(array.shape), array.dtype) for array in inputs),
            (grid, threadgroup, init_value, tuple(template), tuple(call["output_shapes"]), tuple(output_dtypes)),
        )
        launch = launches.get(key)
        if launch is None:
            self.contract.check_call(inputs, template, output_shapes, output_dtypes)
            self.contract.check_launch(grid, threadgroup)
            launch = self._build(on, inputs, call, stand_in)
            if len(launches) >= REMEMBERED:
                launches.clear()
            launches[key] = launch  # decoding launches the same thing for every token
        outputs: list[mx.array] = launch(inputs=list(inputs), **call)
        return outputs

    def _build(self, on: Backend, inputs: Sequence[mx.array], call: dict[str, Any], stand_in: _Override | None) -> Any:
        """Return MLX's callable for this form of launch, made and tried out if it is a new one."""
        form = _form(inputs, call)
        built = stand_in.built.setdefault(self, {}) if stand_in else self._built
        with _LOCK:
            if (on, form) not in built:
                built[on, form] = self._make(on, form, stand_in.factory if stand_in else None)
            launch = built[on, form]
            trial = (on, form, call["threadgroup"])
            if stand_in is None and trial not in self._tried:
                # On zeros, so that a compiler's complaint is raised here and not in somebody's mx.eval.
                mx.eval(launch(inputs=[mx.zeros(array.shape, array.dtype) for array in inputs], **call))
                self._tried.add(trial)
        return launch

    def _make(self, on: Backend, form: object, factory: Factory | None) -> Any:
        header, body = self.parts
        contract = self.contract
        options: dict[str, Any] = {
            "input_names": [spec.name for spec in contract.inputs],
            "output_names": [spec.name for spec in contract.outputs],
            "ensure_row_contiguous": self.ensure_row_contiguous,
        }
        if on == "cuda":
            header, body = to_cuda(header, body, contract)
        else:
            options["atomic_outputs"] = self.atomic_outputs
            if contract.math == "fast":
                options["compile_options"] = {"math_mode": "fast"}
        name = f"qwen4b_asr_{contract.name}_{digest(header, body, repr(form), repr(options))[:16]}"
        make = factory or (mx.fast.cuda_kernel if on == "cuda" else mx.fast.metal_kernel)
        return make(name=name, source=body, header=header, **options)


def _form(inputs: Sequence[mx.array], call: dict[str, Any]) -> tuple[object, ...]:
    """What of a launch is in the text that MLX builds: types, template, and how each input is passed."""
    arrays = tuple((str(array.dtype), array.ndim == 0, array.size < SMALL) for array in inputs)
    template = tuple((name, str(value)) for name, value in call.get("template", ()))
    return arrays, template, tuple(str(dtype) for dtype in call["output_dtypes"])
