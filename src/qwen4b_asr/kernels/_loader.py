"""Metal sources as callables: found, read, checked and built at their first launch.

`Kernel("fsmn.metal")` costs nothing until it is called. MLX builds a kernel's text from its source and from what a
launch looks like (`_signature`), and keeps what it compiled under the kernel's name alone. So the name that MLX gets
carries a hash of the source and of the launch's form: two texts never share a name.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from ._contract import Contract, Template, parse_contract
from ._cuda import to_cuda

Backend = Literal["metal", "cuda"]
Factory = Callable[..., Any]
"""Builds a callable kernel; the signature is that of `mx.fast.metal_kernel`."""

HEADER_MARK = "// --- header"
BODY_MARK = "// --- body"
SMALL = 8
"""MLX passes inputs with fewer elements than this in Metal's `constant` address space."""

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([\w./-]+)"[^\n]*$', re.MULTILINE)


@dataclass(eq=False)
class _Override:
    """A stand-in for the GPU, and the kernels built with it."""

    backend: Backend
    factory: Factory
    trusted: bool
    built: dict[object, Any] = field(default_factory=dict)


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


def kernel_sources() -> Path:
    """Return the folder of Metal sources.

    An installed package carries it as ``metal`` beside this file; a checkout keeps it at the top level as ``kernels``.
    The module's own copy comes first, so an old installation is never read by a newer checkout.

    Raises:
        FileNotFoundError: If neither folder is there, that is, the installation is damaged.
    """
    here = Path(__file__).resolve().parent
    candidates = [here / "metal"]
    if len(here.parents) > 2:
        candidates.append(here.parents[2] / "kernels")
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"[kernel_sources] the Metal sources must be in one of {[str(c) for c in candidates]}")


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
        self._built: dict[object, Any] = {}
        self._checked: set[object] = set()
        self._proven: set[object] = set()

    def __repr__(self) -> str:
        return f"Kernel({self.filename!r})"

    @cached_property
    def source_text(self) -> str:
        """The whole source.

        Raises:
            FileNotFoundError: If there is no such source.
            ValueError: If it is not plain ASCII, which Metal's compiler needs.
        """
        return _read(kernel_sources() / self.filename)

    @cached_property
    def contract(self) -> Contract:
        """What the head of the source says of it."""
        return parse_contract(self.source_text)

    @cached_property
    def parts(self) -> tuple[str, str]:
        """Helper code with its own includes put in, and the kernel's body."""
        header, body = _split(self.source_text, self.filename)
        return _with_includes(header, kernel_sources(), {self.filename}), body

    @cached_property
    def hash(self) -> str:
        """Hash of the source and all that it includes."""
        return _digest(*self.parts, self.contract.name)

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
        self._check(inputs, template, call)
        signature = _signature(inputs, template, output_dtypes)
        entry = _OVERRIDES[-1] if _OVERRIDES else None
        launch = self._build(signature, entry)
        if entry is None:
            self._prove(launch, (signature, threadgroup), inputs, call)
        outputs: list[mx.array] = launch(inputs=list(inputs), **call)
        return outputs

    def _check(self, inputs: Sequence[mx.array], template: Template, call: dict[str, Any]) -> None:
        shapes = tuple((tuple(array.shape), array.dtype) for array in inputs)
        launch = (call["grid"], call["threadgroup"], tuple(call["output_shapes"]), tuple(call["output_dtypes"]))
        key = (shapes, tuple(template), launch)
        if key in self._checked:  # decoding launches the same thing for every token
            return
        self.contract.check_call(inputs, template, call["output_shapes"], call["output_dtypes"])
        self.contract.check_launch(call["grid"], call["threadgroup"])
        if len(self._checked) < 1024:
            self._checked.add(key)

    def _build(self, signature: tuple[object, ...], entry: _Override | None) -> Any:
        """Return MLX's callable for this source and form of launch."""
        on = entry.backend if entry else backend()
        if on is None:
            raise RuntimeError(f"[{self.contract.name}] the kernel needs a GPU as the default device but got none")
        built = entry.built if entry else self._built
        key = (id(self), on, signature) if entry else (on, signature)
        with _LOCK:
            if key not in built:
                built[key] = self._make(on, signature, entry.factory if entry else None)
            return built[key]

    def _make(self, on: Backend, signature: tuple[object, ...], factory: Factory | None) -> Any:
        header, body = self.parts
        contract = self.contract
        options: dict[str, Any] = {
            "name": f"qwen4b_asr_{contract.name}_{self.hash[:12]}_{_digest(repr(signature))[:8]}",
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
        make = factory or (mx.fast.cuda_kernel if on == "cuda" else mx.fast.metal_kernel)
        return make(source=body, header=header, **options)

    def _prove(self, launch: Any, key: object, inputs: Sequence[mx.array], call: dict[str, Any]) -> None:
        """Run a new form of launch once on zeros, so that a compile error is raised here and not in somebody's eval."""
        if key in self._proven:
            return
        mx.eval(launch(inputs=[mx.zeros(array.shape, array.dtype) for array in inputs], **call))
        self._proven.add(key)


def _signature(inputs: Sequence[mx.array], template: Template, output_dtypes: Sequence[mx.Dtype]) -> tuple[object, ...]:
    """What of a launch is in the text that MLX builds: types, template, and how each input is passed."""
    forms = tuple((str(array.dtype), array.ndim == 0, array.size < SMALL) for array in inputs)
    return forms, tuple((name, str(value)) for name, value in template), tuple(str(dtype) for dtype in output_dtypes)


def _read(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if not text.isascii():
        raise ValueError(f"[{path.name}] must be plain ASCII, comments too, but got {set(text) - _ASCII}")
    return text


_ASCII = {chr(code) for code in range(128)}


def _split(text: str, filename: str) -> tuple[str, str]:
    """Take a source apart into helper code and body."""
    head, mark, rest = text.partition(f"{BODY_MARK}\n")
    if not mark or BODY_MARK in rest:
        raise ValueError(f"[{filename}] must have one line `{BODY_MARK}` but got {text.count(BODY_MARK)}")
    contract, _, header = head.partition(f"{HEADER_MARK}\n")
    code = [line for line in contract.splitlines() if line.strip() and not line.startswith("//")]
    if code:
        raise ValueError(f"[{filename}] helper code must be behind `{HEADER_MARK}` but got {code[0]!r} before it")
    return header, rest


def _with_includes(text: str, folder: Path, seen: set[str]) -> str:
    """Put the folder's own files in place of the ``#include "..."`` lines, each file once."""

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        if name in seen:
            return ""
        seen.add(name)
        return _with_includes(_read(folder / name), folder, seen)

    return _INCLUDE.sub(replace, text)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
