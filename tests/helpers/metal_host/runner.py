"""`metal_kernel`: a drop-in for `mx.fast.metal_kernel` that runs on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from . import arrays
from .build import kernel_library
from .capture import capture, text_form
from .engine_library import OUTPUT, Buffer, Schedule, kernel_entry, launch
from .errors import CompileError
from .translate import TranslationError, translate

DEFAULT = Schedule("in order")


@dataclass(frozen=True)
class Statistics:
    """What a launch did, in numbers that do not depend on the machine.

    Attributes:
        threads: Run altogether.
        switches: Between threads, by the engine.
        barriers: Calls of threadgroup_barrier, per thread.
        simd_calls: Calls of SIMD-group functions, per thread.
        threadgroup_bytes: Of threadgroup variables.
    """

    threads: int
    switches: int
    barriers: int
    simd_calls: int
    threadgroup_bytes: int


@dataclass
class Record:
    """A launch as `verify` remembers it: the kernel's name, its Metal text, and its outputs as bytes."""

    kernel: str
    text: str
    names: list[str]
    shapes: list[tuple[int, ...]]
    item_bytes: list[int]
    outputs: list[np.ndarray]


@dataclass
class _Settings(threading.local):
    schedule: Schedule = DEFAULT
    records: list[Record] | None = None


_SETTINGS = _Settings()
BUILT: dict[Any, tuple[Any, bool, str]] = {}
"""What has been built in this process, by form of launch: entry point, whether it uses vectors, Metal text."""


@contextmanager
def scheduled(schedule: Schedule) -> Iterator[list[Record]]:
    """Run every kernel called in the block, on this thread, under one schedule; yields their launches."""
    before = _SETTINGS.schedule, _SETTINGS.records
    records: list[Record] = []
    _SETTINGS.schedule, _SETTINGS.records = schedule, records
    try:
        yield records
    finally:
        _SETTINGS.schedule, _SETTINGS.records = before


def launches(call: Callable[[], Any]) -> list[Record]:
    """Call a function once and return the launches it made, each with its Metal text."""
    with scheduled(DEFAULT) as records:
        call()
    return records


class HostKernel:
    """What `metal_kernel` returns: called as MLX's own, it computes at once and on the CPU.

    Attributes:
        text: The Metal text of the last launch, as MLX generated it.
        statistics: Of the last launch.
    """

    text: str = ""
    statistics: Statistics | None = None

    def __init__(self, **parameters: Any) -> None:
        self.parameters = parameters
        self._kernel = mx.fast.metal_kernel(**parameters)
        self._identity = tuple(sorted((key, repr(value)) for key, value in parameters.items()))

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        """Run it.

        Raises:
            ValueError: If MLX finds the call wrong.
            CompileError: If the text does not compile.
            LaunchError: If it does something undefined.
        """
        arrays_in = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        call = {
            "grid": tuple(grid),
            "threadgroup": tuple(threadgroup),
            "output_shapes": [tuple(shape) for shape in output_shapes],
            "output_dtypes": list(output_dtypes),
            "template": list(template or []),
        }
        entry, vectors = self._build(arrays_in, call)
        if verbose:
            print(self.text)
        schedule = _SETTINGS.schedule
        buffers: list[Buffer] = []
        for name, array in zip(self.parameters["input_names"], arrays_in, strict=True):
            buffers += arrays.input_buffers(
                name,
                array,
                schedule.poison,
                ensure_row_contiguous=self.parameters["ensure_row_contiguous"],
                **{part: f"{name}_{part}" in self.parameters["source"] for part in ("shape", "strides", "ndim")},
            )
        for name, shape, dtype in zip(
            self.parameters["output_names"], call["output_shapes"], output_dtypes, strict=True
        ):
            content = arrays.filled(shape, dtype, init_value, schedule.poison)
            buffers.append(Buffer(name, OUTPUT, content, item_bytes=dtype.size))
        outputs, report = launch(
            entry, self.parameters["name"], buffers, call["grid"], call["threadgroup"], schedule, vectors
        )
        self.statistics = Statistics(
            report.threads, report.switches, report.barriers, report.simd_calls, report.threadgroup_bytes
        )
        if _SETTINGS.records is not None:
            _SETTINGS.records.append(
                Record(
                    self.parameters["name"],
                    self.text,
                    list(self.parameters["output_names"]),
                    call["output_shapes"],
                    [dtype.size for dtype in output_dtypes],
                    outputs,
                )
            )
        return [
            arrays.from_bytes(content, shape, dtype)
            for content, shape, dtype in zip(outputs, call["output_shapes"], output_dtypes, strict=True)
        ]

    def _build(self, inputs: list[mx.array], call: dict[str, Any]) -> tuple[Any, bool]:
        """Return the entry point for such a call and whether the text uses vectors."""
        form = (self._identity, text_form(inputs), tuple(call["output_dtypes"]), repr(call["template"]))
        if len(inputs) != len(self.parameters["input_names"]) or form not in BUILT:
            text = capture(self._kernel, inputs, **call)
            try:
                translation = translate(text)
            except TranslationError as error:
                raise CompileError(f"[{self.parameters['name']}] {error}") from error
            entry = kernel_entry(kernel_library(translation, self.parameters["name"]))
            BUILT[form] = (entry, translation.uses_vectors, text)
        entry, vectors, self.text = BUILT[form]
        return entry, vectors


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: dict[str, Any] | None = None,
) -> HostKernel:
    """Build a kernel as `mx.fast.metal_kernel` does, to be run on the CPU.

    ``compile_options`` are checked by MLX and otherwise without effect: the host computes as Metal's safe mode does.
    """
    parameters: dict[str, Any] = {
        "name": name,
        "input_names": list(input_names),
        "output_names": list(output_names),
        "source": source,
        "header": header,
        "ensure_row_contiguous": ensure_row_contiguous,
        "atomic_outputs": atomic_outputs,
    }
    if compile_options is not None:
        parameters["compile_options"] = compile_options
    return HostKernel(**parameters)
